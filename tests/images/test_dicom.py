"""DICOM series: every voxel where the headers say, or one clear line."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import write_series
from makers import OBLIQUE
from pydicom.dataset import Dataset

from volseg.errors import DataError
from volseg.images import is_series, read_header, read_image

STORED = np.random.default_rng(0).integers(-500, 3000, (9, 7, 5)).astype(np.int16)


def make_affine(order, signs, oblique: bool) -> np.ndarray:
    directions = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        directions[world, axis] = sign
    affine = np.eye(4)
    turned = OBLIQUE @ directions if oblique else directions
    affine[:3, :3] = turned * [0.7, 0.9, 2.5]
    affine[:3, 3] = (-12.5, 7, 30.25)
    return affine


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_voxels_lie_where_they_were_written(order, oblique: bool, tmp_path: Path) -> None:
    for number, signs in enumerate(itertools.product((1, -1), repeat=3)):
        affine = make_affine(order, signs, oblique)
        folder = write_series(tmp_path / str(number), STORED, affine)
        image = read_image(folder)
        assert image.array.dtype.kind == "i"
        # Slices are sorted along the normal of rows and columns, which may be the other way round.
        is_turned = np.linalg.det(np.diag([-1, -1, 1]) @ affine[:3, :3]) < 0
        array, expected = image.array[0], STORED.astype(int) - 1024
        place = image.geometry.affine
        if is_turned:
            expected = expected[:, :, ::-1]
            affine = affine.copy()
            affine[:3, 3] += affine[:3, 2] * (STORED.shape[2] - 1)
            affine[:3, 2] *= -1
        assert np.array_equal(array, expected)
        assert place == pytest.approx(affine, abs=1e-6)
        assert read_header(folder)[0].is_same_grid(image.geometry)


def test_every_slice_has_a_slope_of_its_own(tmp_path: Path) -> None:
    slopes = [1.0, 0.5, 2.25, 0.125, 3.0]
    folder = write_series(tmp_path / "s", STORED, np.eye(4), slopes=slopes, intercept=0)
    image = read_image(folder)
    assert image.array.dtype == np.float32
    # The identity is left-handed in DICOM's axes, so slices come in their own order.
    assert image.array[0] == pytest.approx(STORED * np.array(slopes), rel=1e-6)


def refuse(folder: Path, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        read_image(folder)
    assert str(caught.value).startswith(str(folder))


def test_a_missing_slice_is_refused(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", STORED, np.diag([1, 1, 2.0, 1]))
    by_place = {read_place(path): path for path in folder.iterdir()}
    by_place[4.0].unlink()
    refuse(folder, r"1 slices missing between I\d+\.dcm and I\d+\.dcm: they lie 4 mm apart")


def read_place(path: Path) -> float:
    import pydicom

    return float(pydicom.dcmread(path).ImagePositionPatient[2])


def test_slices_at_one_place_are_refused(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", STORED, np.eye(4))
    extra = write_series(tmp_path / "t", STORED, np.eye(4))

    def same_series(index: int, dataset: Dataset) -> None:
        dataset.SeriesInstanceUID = "1.2.3"

    for part in (folder, extra):
        write_series(part, STORED, np.eye(4), change=same_series)
    (extra / "I0000.dcm").rename(folder / "again.dcm")
    refuse(folder, "two slices at one place")


def test_two_series_are_refused(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", STORED, np.eye(4))
    for path in write_series(tmp_path / "t", STORED, np.eye(4)).iterdir():
        path.rename(folder / f"other_{path.name}")
    refuse(folder, r"2 series in one folder: 'abdomen' \(5 files\), 'abdomen' \(5 files\)")


def test_a_series_may_have_several_descriptions(tmp_path: Path) -> None:
    def describe(index: int, dataset: Dataset) -> None:
        dataset.SeriesDescription = f"abdomen {index}"

    folder = write_series(tmp_path / "s", STORED, np.eye(4), change=describe)
    assert read_image(folder).array.shape == (1, *STORED.shape)


def test_a_tilted_gantry_is_refused(tmp_path: Path) -> None:
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[1, 2] = 2 * np.tan(np.radians(10))

    def keep_upright(index: int, dataset: Dataset) -> None:
        dataset.ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]
        dataset.SliceThickness = 2

    folder = write_series(tmp_path / "s", STORED, affine, change=keep_upright)
    refuse(folder, r"gantry tilt of 10\.0 degrees")


def test_a_slice_beside_its_place_is_refused(tmp_path: Path) -> None:
    def move(index: int, dataset: Dataset) -> None:
        if index == 2:
            dataset.ImagePositionPatient[0] += 30

    folder = write_series(tmp_path / "s", STORED, np.diag([1, 1, 2.0, 1]), change=move)
    refuse(folder, r"I\d+\.dcm lies 30 mm beside its place among the other slices")


def test_gaps_that_add_up_are_refused(tmp_path: Path) -> None:
    """Each within a hundredth of the usual one, and the middle half a voxel off."""

    def stretch(index: int, dataset: Dataset) -> None:
        dataset.ImagePositionPatient[2] = index * 1.0 + max(0, index - 100) * 0.0095

    stored = np.zeros((3, 4, 200), np.int16)
    folder = write_series(tmp_path / "s", stored, np.eye(4), change=stretch)
    refuse(folder, r"lies 0\.\d+ mm beside its place")


def test_places_that_were_rounded_are_even(tmp_path: Path) -> None:
    """To hundredths of a millimetre, as some scanners write them."""

    def shorten(index: int, dataset: Dataset) -> None:
        dataset.ImagePositionPatient[2] = f"{index * 0.6253:.2f}"

    stored = np.zeros((3, 4, 90), np.int16)
    affine = np.diag([1, 1, 0.6253, 1])
    folder = write_series(tmp_path / "s", stored, affine, change=shorten)
    assert read_image(folder).geometry.spacing_mm[2] == pytest.approx(0.6253, abs=1e-3)


def test_a_thickness_that_is_no_number_is_not_needed(tmp_path: Path) -> None:
    def empty(index: int, dataset: Dataset) -> None:
        del dataset.SliceThickness

    folder = write_series(tmp_path / "s", STORED, np.diag([1, 1, 2.0, 1]), change=empty)
    assert read_image(folder).geometry.spacing_mm == (1, 1, 2)


def test_a_localiser_among_the_slices_is_refused(tmp_path: Path) -> None:
    def turn_first(index: int, dataset: Dataset) -> None:
        if index == 0:
            dataset.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]

    folder = write_series(tmp_path / "s", STORED, np.eye(4), change=turn_first)
    refuse(folder, "has another size, voxel size or direction")


def test_a_slice_without_place_or_voxels_is_refused(tmp_path: Path) -> None:
    def forget_position(index: int, dataset: Dataset) -> None:
        if index == 2:
            del dataset.ImagePositionPatient

    folder = write_series(tmp_path / "s", STORED, np.eye(4), change=forget_position)
    refuse(folder, r"has no usable \(0020,0032\); expected 3 numbers")
    folder = write_series(tmp_path / "t", STORED, np.eye(4))
    path = folder / "I0003.dcm"
    path.write_bytes(path.read_bytes()[:-40])
    refuse(folder, r"I0003\.dcm is damaged")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "a folder without slices")


def test_frames_and_colours_are_refused(tmp_path: Path) -> None:
    def add_frames(index: int, dataset: Dataset) -> None:
        dataset.NumberOfFrames = 2
        dataset.PixelData = dataset.PixelData * 2

    folder = write_series(tmp_path / "s", STORED, np.eye(4), change=add_frames)
    refuse(folder, "holds several frames or colours")


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", STORED, np.eye(4))
    (folder / "notes.txt").write_text("nothing")
    (folder / ".hidden.dcm").write_text("nothing")
    assert read_image(folder).array.shape == (1, 9, 7, 5)


STORAGE = "1.2.840.10008.5.1.4.1.1."


def write_as(folder: Path, number: str) -> Path:
    """One DICOM file that says that it is of a class of objects."""

    def declare(index: int, dataset: Dataset) -> None:
        dataset.SOPClassUID = f"{STORAGE}{number}"

    write_series(folder, STORED[..., :1], np.eye(4), change=declare)
    return folder / "I0000.dcm"


@pytest.mark.parametrize(
    "number",
    ["481.2", "481.3", "481.5", "88.11", "88.59", "11.1", "66.1", "66.4", "104.1", "9.1.1", "30"],
)
def test_what_is_no_image_of_the_patient_is_left_out(
    number: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_series(tmp_path / "s", STORED, np.eye(4))
    alone = write_as(tmp_path / "alone", number)
    assert not is_series(alone.parent)
    refuse(alone.parent, "a folder without slices")
    caplog.clear()
    for name in ("a.dcm", "b.dcm"):
        shutil.copy(alone, folder / name)
    assert is_series(folder)
    assert read_image(folder).array.shape == (1, *STORED.shape)
    assert read_header(folder)[0].shape == STORED.shape
    assert caplog.messages == [f"{folder}: 2 DICOM files that are no slices are left out."]


@pytest.mark.parametrize("number", ["4", "128", "481.1", "3.1", "300"])
def test_what_may_be_an_image_is_looked_at(number: str, tmp_path: Path) -> None:
    assert is_series(write_as(tmp_path / "s", number).parent)


def test_a_file_that_does_not_say_what_it_is_is_looked_at(tmp_path: Path) -> None:
    for content in (b"", b"\0" * 128 + b"DICM", b"\0" * 128 + b"DICM\2\0\0\0UL"):
        (tmp_path / "a.dcm").write_bytes(content)
        assert is_series(tmp_path)
        refuse(tmp_path, r"a\.dcm is damaged or no image")


def test_a_tag_of_strange_content_is_refused(tmp_path: Path) -> None:
    def repeat(index: int, dataset: Dataset) -> None:
        dataset.Rows = [dataset.Rows, dataset.Rows]

    folder = write_series(tmp_path / "s", STORED, np.eye(4), change=repeat)
    refuse(folder, r"has no usable \(0028,0010\); expected a number")


def test_a_slice_alone_says_what_to_give(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", STORED, np.eye(4))
    for name in ("I0001.dcm", "I0001"):
        path = shutil.copy(folder / "I0000.dcm", folder / name)
        with pytest.raises(DataError, match="is a slice of a DICOM series; expected the folder"):
            read_image(path)


def test_real_slices_lie_where_their_headers_say(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "tricky" / "dicom_series" / "ct_rtstruct"
    assert not is_series(source / "mask")
    folder = tmp_path / "both"
    folder.mkdir()
    for path in (*(source / "image").iterdir(), source / "mask" / "RS.dcm"):
        shutil.copy(path, folder)
    image = read_image(folder)
    parts = [pydicom.dcmread(path) for path in sorted((source / "image").iterdir())]
    assert image.array.shape[1:] == (parts[0].Columns, parts[0].Rows, len(parts))
    # Every slice by itself: the one of the volume that lies at its place has its values.
    for part in parts:
        place = np.array([*part.ImagePositionPatient, 1.0]) * [-1, -1, 1, 1]
        index = np.linalg.solve(image.geometry.affine, place)
        assert index == pytest.approx([0, 0, round(index[2]), 1], abs=1e-3)
        corner = np.array([part.Columns - 1, part.Rows - 1])
        along = np.reshape(part.ImageOrientationPatient, (2, 3)).astype(float)
        steps = corner * [float(part.PixelSpacing[1]), float(part.PixelSpacing[0])]
        far = place[:3] + np.array([-1, -1, 1]) * (steps @ along)
        found = image.geometry.affine @ [*corner, round(index[2]), 1]
        assert found[:3] == pytest.approx(far, abs=1e-3)
        values = part.pixel_array.T * float(part.RescaleSlope) + float(part.RescaleIntercept)
        assert np.array_equal(image.array[0, ..., round(index[2])], values)


def test_a_real_gantry_that_is_tilted_is_refused_with_its_angle(shared_data: Path) -> None:
    """Its slices are unevenly spaced as well."""
    folder = shared_data / "tricky" / "dicom_series" / "ct_gantry_tilt"
    (path, *_) = sorted(folder.iterdir())
    angle = float(pydicom.dcmread(path, stop_before_pixels=True).GantryDetectorTilt)
    refuse(folder, rf"gantry tilt of {angle:.1f} degrees")
