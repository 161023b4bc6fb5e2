"""Label maps for viewers: 3D Slicer's segments and DICOM segmentations, read back by others."""

from __future__ import annotations

import itertools
from pathlib import Path

import nrrd
import numpy as np
import pydicom
import pytest
from dicom_files import write_series
from makers import OBLIQUE, make_affine

from volseg.errors import ConfigError, DataError
from volseg.geometry import Geometry
from volseg.images import read_image, read_labels, write_labels
from volseg.images.formats import image_stem

NAMES = {3: "left lung", 7: "tumour", 9: "nowhere"}


def make_labels(shape: tuple[int, int, int]) -> np.ndarray:
    labels = np.zeros(shape, np.uint8)
    labels[1:4, 2:5, 1:3] = 3
    labels[5:7, 1, 2:4] = 7
    return labels


def test_slicer_finds_names_values_and_extents(tmp_path: Path) -> None:
    labels, affine = make_labels((9, 7, 5)), make_affine((0.7, 0.9, 2.5), oblique=True)
    path = tmp_path / "case_1.seg.nrrd"
    write_labels(path, labels, Geometry(labels.shape, affine), NAMES)
    data, header = nrrd.read(str(path))
    assert np.array_equal(data, labels)
    assert header["space"] == "left-posterior-superior"
    lps = np.diag([-1, -1, 1]) @ affine[:3]
    assert header["space directions"].T == pytest.approx(lps[:, :3], abs=1e-6)
    assert header["space origin"] == pytest.approx(lps[:, 3], abs=1e-6)
    assert [header[f"Segment{n}_Name"] for n in range(3)] == list(NAMES.values())
    assert [header[f"Segment{n}_LabelValue"] for n in range(3)] == ["3", "7", "9"]
    assert header["Segment0_Extent"] == "1 3 2 4 1 2"
    assert header["Segment1_Extent"] == "5 6 1 1 2 3"
    assert header["Segment2_Extent"] == "0 -1 0 -1 0 -1"
    colours = {header[f"Segment{n}_Color"] for n in range(3)}
    assert len(colours) == 3
    assert all(0 <= float(part) <= 1 for colour in colours for part in colour.split())
    assert header["Segmentation_ContainedRepresentationNames"] == "Binary labelmap|"
    assert image_stem(path) == "case_1"
    assert np.array_equal(read_labels(path).array[0], labels)


def make_series_affine(order, signs) -> np.ndarray:
    directions = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        directions[world, axis] = sign
    affine = np.eye(4)
    affine[:3, :3] = OBLIQUE @ directions * [0.7, 0.9, 2.5]
    affine[:3, 3] = (-12.5, 7, 30.25)
    return affine


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_dicom_segmentation_lies_where_its_series_lies(order, tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 1000, (9, 7, 5))
    labels = make_labels((9, 7, 5))
    for number, signs in enumerate(itertools.product((1, -1), repeat=3)):
        folder = write_series(tmp_path / str(number), stored, make_series_affine(order, signs))
        geometry = read_image(folder).geometry
        path = tmp_path / f"{number}.dcm"
        write_labels(path, labels, geometry, NAMES, folder)
        found = read_segments(path)
        assert list(found) == ["left lung", "tumour"]
        for name, value in (("left lung", 3), ("tumour", 7)):
            ours = np.argwhere(labels == value) @ geometry.affine[:3, :3].T + geometry.affine[:3, 3]
            assert sort(found[name]) == pytest.approx(sort(ours), abs=1e-4)


def read_segments(path: Path) -> dict[str, np.ndarray]:
    """Where the voxels (N, 3) of each segment lie in RAS+ mm, by the standard's own words."""
    seg = pydicom.dcmread(path)
    (shared,) = seg.SharedFunctionalGroupsSequence
    along = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    spacing = np.array(shared.PixelMeasuresSequence[0].PixelSpacing, float)
    # From row to row is down a column, which is the second direction.
    steps = np.stack([along[3:] * spacing[0], along[:3] * spacing[1]])
    places: dict[int, list[np.ndarray]] = {}
    for pixels, frame in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        group = frame if "SegmentIdentificationSequence" in frame else shared
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        corner = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        lps = corner + np.argwhere(pixels) @ steps
        places.setdefault(number, []).append(lps * [-1, -1, 1])
    labels = {part.SegmentNumber: part.SegmentLabel for part in seg.SegmentSequence}
    return {labels[number]: np.concatenate(parts) for number, parts in sorted(places.items())}


def test_nothing_found_is_a_dicom_segmentation_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_series(tmp_path / "s", np.zeros((9, 7, 5), np.int16), np.eye(4))
    labels, path = np.zeros((9, 7, 5), np.uint8), tmp_path / "a.dcm"
    write_labels(path, labels, read_image(folder).geometry, NAMES, folder)
    found = read_segments(path)
    assert {name: len(places) for name, places in found.items()} == dict.fromkeys(NAMES.values(), 0)
    # Of as many slices as there may be, an empty one for each.
    assert pydicom.dcmread(path).NumberOfFrames == len(NAMES)
    # Nor does anybody warn of it.
    assert not caplog.records


def sort(points: np.ndarray) -> np.ndarray:
    return points[np.lexsort(np.round(points, 3).T)]


def test_what_a_dicom_segmentation_cannot_hold_is_refused(tmp_path: Path) -> None:
    stored = np.zeros((9, 7, 5), np.int16)
    folder = write_series(tmp_path / "s", stored, np.eye(4))
    geometry = read_image(folder).geometry
    labels = make_labels((9, 7, 5))
    with pytest.raises(ConfigError, match="needs the DICOM series that it is of"):
        write_labels(tmp_path / "a.dcm", labels, geometry, NAMES)
    with pytest.raises(DataError, match="no class has a name"):
        write_labels(tmp_path / "a.dcm", np.zeros_like(labels), geometry, None, folder)
    other = Geometry(geometry.shape, np.eye(4) * [2, 2, 2, 1])
    with pytest.raises(ConfigError, match="is not on the grid of"):
        write_labels(tmp_path / "a.dcm", labels, other, NAMES, folder)
    with pytest.raises(DataError, match="a folder without slices"):
        write_labels(tmp_path / "a.dcm", labels, geometry, NAMES, tmp_path)
    assert not (tmp_path / "a.dcm").exists()
