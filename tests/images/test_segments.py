"""Label maps for viewers: 3D Slicer's segments and DICOM segmentations, read back by others."""

from __future__ import annotations

import itertools
from pathlib import Path

import nrrd
import numpy as np
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


@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
def test_a_dicom_segmentation_lies_where_its_series_lies(signs, tmp_path: Path) -> None:
    import highdicom

    stored = np.random.default_rng(0).integers(0, 1000, (9, 7, 5))
    folder = write_series(tmp_path / "s", stored, make_series_affine((0, 1, 2), signs))
    source = read_image(folder)
    labels = make_labels((9, 7, 5))
    path = tmp_path / "case.dcm"
    write_labels(path, labels, source.geometry, NAMES, folder)
    segmentation = highdicom.seg.segread(path)
    found = [segmentation.get_segment_description(n) for n in segmentation.segment_numbers]
    assert [part.segment_label for part in found] == ["left lung", "tumour"]
    volume = segmentation.get_volume(combine_segments=False)
    # Voxel by voxel through the affines: an independent reader may turn the axes.
    ras = np.diag([-1, -1, 1, 1]) @ np.asarray(volume.affine)
    for channel, value in enumerate((3, 7)):
        ours = np.argwhere(labels == value) @ source.geometry.affine[:3, :3].T
        ours += source.geometry.affine[:3, 3]
        theirs = np.argwhere(volume.array[..., channel]) @ ras[:3, :3].T + ras[:3, 3]
        assert sort(theirs) == pytest.approx(sort(ours), abs=1e-4)


def sort(points: np.ndarray) -> np.ndarray:
    return points[np.lexsort(np.round(points, 3).T)]


def test_what_a_dicom_segmentation_cannot_hold_is_refused(tmp_path: Path) -> None:
    stored = np.zeros((9, 7, 5), np.int16)
    folder = write_series(tmp_path / "s", stored, np.eye(4))
    geometry = read_image(folder).geometry
    labels = make_labels((9, 7, 5))
    with pytest.raises(ConfigError, match="needs the DICOM series that it is of"):
        write_labels(tmp_path / "a.dcm", labels, geometry, NAMES)
    with pytest.raises(DataError, match="cannot be empty"):
        write_labels(tmp_path / "a.dcm", np.zeros_like(labels), geometry, NAMES, folder)
    other = Geometry(geometry.shape, np.eye(4) * [2, 2, 2, 1])
    with pytest.raises(ConfigError, match="is not on the grid of"):
        write_labels(tmp_path / "a.dcm", labels, other, NAMES, folder)
    with pytest.raises(DataError, match="a folder without DICOM files"):
        write_labels(tmp_path / "a.dcm", labels, geometry, NAMES, tmp_path)
    assert not (tmp_path / "a.dcm").exists()
