from __future__ import annotations

import numpy as np
import pytest
from makers import make_affine, make_arrays, make_case, make_dataset, write_nifti

from volseg.data.check import check_dataset
from volseg.data.layouts import find_dataset


@pytest.fixture
def folder(tmp_path):
    return make_dataset(tmp_path, "nnunet", num_channels=2)


def check(folder):
    return check_dataset(find_dataset(folder))


def check_one(folder):
    (finding,) = check(folder)
    return finding


def test_sound_dataset_has_no_findings(tmp_path):
    folder = make_dataset(tmp_path, "msd", num_channels=2, spacing_mm=(0.7, 0.9, 3), oblique=True)
    assert check(folder) == []


def test_truncated_image_is_an_error(folder):
    path = folder / "imagesTr" / "case_01_0001.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    finding = check_one(folder)
    assert (finding.case_id, finding.severity, finding.file) == ("case_01", "error", path)
    assert str(path) not in finding.problem


def test_missing_files_are_errors_of_their_cases(tmp_path):
    folder = make_dataset(tmp_path, "msd")
    gone = [folder / "imagesTr" / "case_01.nii.gz", folder / "labelsTr" / "case_02.nii.gz"]
    for file in gone:
        file.unlink()
    findings = check_dataset(find_dataset(folder, complete=False))
    assert [(f.case_id, f.severity, f.file) for f in findings] == [
        ("case_01", "error", gone[0]),
        ("case_02", "error", gone[1]),
    ]
    assert all(finding.problem.startswith("does not exist") for finding in findings)


def test_nan_voxel_is_an_error(folder):
    image, _ = make_arrays()
    image[3, 4, 5] = np.nan
    write_nifti(folder / "imagesTr" / "case_00_0000.nii.gz", image[..., 0])
    finding = check_one(folder)
    assert finding.severity == "error"
    assert "NaN" in finding.problem


def test_wrong_number_of_channels_is_an_error(tmp_path):
    folder = make_dataset(tmp_path, "msd", num_channels=2)
    make_case(folder / "imagesTr" / "case_02.nii.gz", num_channels=3)
    finding = check_one(folder)
    assert finding.case_id == "case_02"
    assert finding.problem == "3 channels; expected 2 (MR0, MR1)"


def test_channels_on_different_grids_are_an_error(folder):
    image, _ = make_arrays(shape=(12, 11, 9))
    path = write_nifti(folder / "imagesTr" / "case_00_0001.nii.gz", image[..., 0])
    finding = check_one(folder)
    assert finding.file == path
    assert "shape (12, 11, 9) differs from (12, 11, 10)" in finding.problem


def test_shifted_label_tells_the_distance(folder):
    _, label = make_arrays(values=(1, 2))
    affine = make_affine()
    affine[:3, 3] += (3, 0, 4)
    write_nifti(folder / "labelsTr" / "case_03.nii.gz", label, affine)
    finding = check_one(folder)
    assert (finding.case_id, finding.severity) == ("case_03", "error")
    assert "up to 5 mm away to the image" in finding.problem


def test_label_on_another_shape_is_an_error(folder):
    _, label = make_arrays(shape=(12, 11, 9), values=(1, 2))
    write_nifti(folder / "labelsTr" / "case_03.nii.gz", label)
    assert "shape (12, 11, 9) differs from (12, 11, 10)" in check_one(folder).problem


def test_undeclared_label_value_is_an_error(folder):
    _, label = make_arrays(values=(1, 9))
    write_nifti(folder / "labelsTr" / "case_02.nii.gz", label)
    finding = check_one(folder)
    assert finding.severity == "error"
    assert finding.problem == ("label values [9]; expected only 0 background, 1 organ_1, 2 organ_2")


def test_label_of_fractions_is_an_error(folder):
    _, label = make_arrays(values=(1, 2))
    write_nifti(folder / "labelsTr" / "case_02.nii.gz", label * np.float32(0.5))
    assert check_one(folder).severity == "error"


def test_label_without_foreground_is_a_warning(folder):
    _, label = make_arrays(values=())
    write_nifti(folder / "labelsTr" / "case_02.nii.gz", label)
    finding = check_one(folder)
    assert (finding.severity, finding.problem) == ("warning", "the label is background everywhere")


def test_constant_image_is_a_warning(folder):
    image = np.full((12, 11, 10), -1024, np.int16)
    path = write_nifti(folder / "imagesTr" / "case_02_0000.nii.gz", image)
    finding = check_one(folder)
    assert (finding.severity, finding.file) == ("warning", path)
    assert finding.problem == "the image has the value -1024 everywhere"


@pytest.mark.parametrize("size", [13, 1.3])
def test_unusual_spacing_is_a_warning(tmp_path, size):
    folder = make_dataset(tmp_path, spacing_mm=(1, 1, 4))
    odd = (folder / "images" / "odd.nii.gz", folder / "labels" / "odd.nii.gz")
    make_case(*odd, spacing_mm=(1, 1, size))
    finding = check_one(folder)
    assert (finding.case_id, finding.severity) == ("odd", "warning")
    assert finding.problem == f"voxels of 1 x 1 x {size} mm; the dataset's median is 1 x 1 x 4 mm"


def test_spacing_is_compared_whatever_the_axis_order(tmp_path):
    folder = make_dataset(tmp_path, spacing_mm=(1, 1, 4))
    image, label = make_arrays(values=(1, 2))
    turned = make_affine((1, 1, 4))[:, [2, 1, 0, 3]]
    write_nifti(folder / "images" / "turned.nii.gz", image[..., 0], turned)
    write_nifti(folder / "labels" / "turned.nii.gz", label, turned)
    assert check(folder) == []


def test_findings_follow_the_cases_and_include_unlabelled_ones(folder):
    make_case([folder / "imagesTs" / f"new_000{channel}.nii.gz" for channel in range(2)])
    broken = ("imagesTs/new_0001", "labelsTr/case_03", "imagesTr/case_01_0000")
    for name in broken:
        (folder / f"{name}.nii.gz").write_bytes(b"not an image")
    assert [finding.case_id for finding in check(folder)] == ["case_01", "case_03", "new"]


def test_progress_counts_every_case(folder):
    seen = []
    check_dataset(find_dataset(folder), on_case=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_picture_among_volumes_is_an_error(tmp_path):
    folder = make_dataset(tmp_path, num_cases=2)
    for part in ("images", "labels"):
        write_nifti(folder / part / "flat.nii.gz", np.eye(8, dtype=np.uint8))
    problems = [finding.problem for finding in check(folder)]
    assert problems == ["2 axes; expected 3 as in the other cases"]


def test_real_sarcoma_images_are_sound(shared_data):
    assert [f for f in check(shared_data / "sarcoma_ct") if f.severity == "error"] == []
