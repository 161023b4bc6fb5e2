"""What every format shares: refusals that name the file, whole-number labels, dispatch by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from volseg.errors import ConfigError, DataError
from volseg.geometry import Geometry
from volseg.images import (
    Image,
    image_stem,
    read_header,
    read_image,
    read_labels,
    write_image,
    write_labels,
)

REFUSED = {
    "cifti_connectivity.dconn.nii": "CIFTI",
    "complex64.nii.gz": "complex64",
    "fuzzed_header_1.nii": "header is damaged",
    "fuzzed_header_2.nii": "header is damaged",
    "git_lfs_pointer.nii.gz": "git lfs pull",
    "nan_voxels.nii": "153 voxels are NaN",
    "not_nifti.nii": "not a NIfTI file",
    "rgb.nii": "RGB",
    "rgba_4d.nii": "RGB",
    "vector_5d_crashes_simpleitk.nii": "5 axes",
    "zero_bytes.nii.gz": "is empty",
}


def _save(path, array):
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return path


def test_every_file_to_refuse_is_listed(shared_data):
    folder = shared_data / "tricky" / "refuse"
    assert {path.name for path in folder.iterdir()} == set(REFUSED)


@pytest.mark.parametrize("read", [read_image, read_labels])
@pytest.mark.parametrize("name", REFUSED)
def test_unusable_files_end_in_one_line_that_names_them(shared_data, name, read):
    path = shared_data / "tricky" / "refuse" / name
    reason = "label value nan" if (name, read) == ("nan_voxels.nii", read_labels) else REFUSED[name]
    with pytest.raises(DataError, match=reason) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_files_folders_and_strange_names_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"a\.nii\.gz does not exist\."):
        read_image(tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match="a folder without slices"):
        read_header(tmp_path)
    with pytest.raises(DataError, match=r"notes\.txt is not an image by its name; expected \.nii"):
        read_image(tmp_path / "notes.txt")


def test_reasons_of_other_libraries_are_put_on_one_line(tmp_path, monkeypatch):
    def fail(_):
        raise DataError("first\nsecond")

    path = _save(tmp_path / "two  spaces.nii", np.zeros((2, 2, 2), np.uint8))
    monkeypatch.setattr("volseg.images.nifti.read", fail)
    with pytest.raises(DataError, match=r"/two  spaces\.nii: first second$"):
        read_image(path)


def test_text_with_an_image_name_is_refused_in_every_format(tmp_path):
    for suffix in (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".mgh", ".mgz", ".png", ".tif"):
        path = tmp_path / f"a{suffix}"
        path.write_text("this is no image\n" * 50)
        with pytest.raises(DataError) as caught:
            read_image(path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)


def test_whole_numbers_in_a_float_file_become_the_smallest_type(tmp_path):
    for highest, expected in ((255, np.uint8), (256, np.int16), (70000, np.int32)):
        path = _save(tmp_path / "a.nii", np.array([0, highest], np.float32).reshape(2, 1, 1))
        array = read_labels(path).array
        assert (array.dtype, array.max()) == (expected, highest)


@pytest.mark.parametrize("value", [1.0001, np.nan, np.inf])
def test_label_that_is_no_whole_number_is_placed(tmp_path, value):
    array = np.zeros((2, 3, 4))
    array[1, 2, 3] = value
    with pytest.raises(
        DataError, match=rf"label value {value} at index \(1, 2, 3\); expected whole"
    ):
        read_labels(_save(tmp_path / "a.nii", array))


def test_integer_labels_keep_their_type(tmp_path):
    path = _save(tmp_path / "a.nii", np.array([-2, 300], np.int32).reshape(2, 1, 1))
    assert read_labels(path).array.dtype == np.int32


def test_labels_of_two_channels_are_refused(tmp_path):
    with pytest.raises(DataError, match="2 channels; expected a label map of one channel"):
        read_labels(_save(tmp_path / "a.nii", np.zeros((3, 3, 3, 2), np.uint8)))


def test_freesurfer_labels_agree_with_nibabel(shared_data):
    path = shared_data / "tricky" / "read_ok" / "freesurfer_labels.mgz"
    image, expected = read_labels(path), nib.load(path)
    assert np.array_equal(image.array[0], np.asarray(expected.dataobj))
    assert np.array_equal(image.geometry.affine, expected.affine)
    assert len(np.unique(image.array[0, ::2, ::2, ::2])) > 150


def test_truncated_mgz_is_refused(shared_data, tmp_path):
    content = (shared_data / "tricky" / "read_ok" / "freesurfer_labels.mgz").read_bytes()
    (tmp_path / "a.mgz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.mgz: truncated"):
        read_labels(tmp_path / "a.mgz")


def test_array_must_fit_its_grid():
    with pytest.raises(
        DataError, match=r"shape \(1, 2, 3, 4\); expected \(channels, \*\(2, 3, 5\)\)"
    ):
        Image(np.zeros((1, 2, 3, 4)), Geometry((2, 3, 5), np.eye(4)))


def test_stem_is_the_name_without_its_image_suffix():
    names = ["case_1.nii.gz", "CASE.NII.GZ", "a.b.mha", "x.img", "scan.seg.nrrd"]
    assert [image_stem(Path(name)) for name in names] == ["case_1", "CASE", "a.b", "x", "scan"]


@pytest.mark.parametrize("name", ["a.mgz", "a.hdr", "a.img", "a.mhd", "a.npy", "a"])
def test_unwritable_suffixes_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"cannot write .*; expected \.nii\.gz"):
        write_labels(tmp_path / name, np.zeros((2, 2, 2), int), Geometry((2, 2, 2), np.eye(4)))
    assert not list(tmp_path.iterdir())


def test_labels_that_are_floats_or_do_not_fit_are_not_written(tmp_path):
    geometry = Geometry((2, 2, 2), np.eye(4))
    with pytest.raises(DataError, match="labels of type float64; expected integers"):
        write_labels(tmp_path / "a.nii", np.zeros((2, 2, 2)), geometry)
    with pytest.raises(DataError, match=r"shape \(2, 2\); expected the grid's \(2, 2, 2\)"):
        write_labels(tmp_path / "a.nii", np.zeros((2, 2), int), geometry)
    with pytest.raises(DataError, match="voxels of type complex128; expected numbers"):
        write_image(tmp_path / "a.nii", np.zeros((1, 2, 2, 2), complex), geometry)


def test_masks_are_written_as_bytes_and_half_floats_as_float32(tmp_path):
    geometry = Geometry((2, 2, 2), np.eye(4))
    write_labels(tmp_path / "a.nii", np.ones((2, 2, 2), bool), geometry)
    write_image(tmp_path / "b.nii", np.ones((1, 2, 2, 2), np.float16), geometry)
    assert read_labels(tmp_path / "a.nii").array.dtype == np.uint8
    assert read_image(tmp_path / "b.nii").array.dtype == np.float32


def test_importing_the_package_loads_no_image_library():
    code = "import sys, volseg.images; print({'nibabel', 'SimpleITK', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
