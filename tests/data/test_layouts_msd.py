from __future__ import annotations

import json

import pytest
from makers import make_dataset

from volseg.data.layouts import find_dataset
from volseg.errors import DataError


def edit(folder, **changes):
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_channels_of_a_4d_file_are_named_by_number(tmp_path):
    folder = make_dataset(tmp_path, "msd", num_channels=11, num_cases=1)
    dataset = find_dataset(folder)
    assert dataset.channels == tuple(f"MR{number}" for number in range(11))
    assert len(dataset.cases[0].images) == 1


def test_test_images_are_listed_as_paths_or_objects(tmp_path):
    folder = make_dataset(tmp_path, "msd")
    pair = {"image": "imagesTr/case_00.nii.gz", "label": "labelsTr/case_00.nii.gz"}
    test = ["./imagesTr/case_01.nii.gz", {"image": "./imagesTr/case_02.nii.gz"}]
    edit(folder, training=[pair], test=test)
    dataset = find_dataset(folder)
    assert [case.case_id for case in dataset.cases] == ["case_00"]
    assert [case.case_id for case in dataset.unlabelled] == ["case_01", "case_02"]
    assert dataset.unlabelled[0].label is None


def test_macos_forks_in_the_list_are_ignored(tmp_path):
    folder = make_dataset(tmp_path, "msd", num_cases=1)
    edit(folder, test=["./imagesTr/._case_00.nii.gz"])
    assert find_dataset(folder).unlabelled == ()


def test_background_comes_first_under_any_value(tmp_path):
    folder = make_dataset(tmp_path, "msd", num_cases=1)
    edit(folder, labels={"1": "tumour", "0": "liver", "255": "Background"})
    classes = find_dataset(folder).classes
    assert classes.names == ("Background", "liver", "tumour")
    assert classes.values == (255, 0, 1)


def test_undeclared_background_is_added(tmp_path):
    folder = make_dataset(tmp_path, "msd", num_cases=1)
    edit(folder, labels={"7": "spleen"})
    assert find_dataset(folder).classes.values == (0, 7)


@pytest.mark.parametrize(
    "listed",
    ["../secret.nii.gz", "imagesTr/../../secret.nii.gz", "/etc/hostname", "C:\\x.nii", "..\\x.nii"],
)
def test_paths_out_of_the_dataset_are_refused(tmp_path, listed):
    folder = make_dataset(tmp_path / "set", "msd", num_cases=1)
    (tmp_path / "secret.nii.gz").write_bytes(b"x")
    edit(folder, test=[listed])
    with pytest.raises(DataError, match=r"test\[0\]: .* is outside the dataset; expected a path"):
        find_dataset(folder)


def test_listed_files_that_are_missing_are_all_named(tmp_path):
    folder = make_dataset(tmp_path, "msd")
    gone = [folder / "imagesTr" / "case_01.nii.gz", folder / "labelsTr" / "case_02.nii.gz"]
    for file in gone:
        file.unlink()
    with pytest.raises(
        DataError, match=rf"names files that do not exist \(2 of 8\): {gone[0]}, {gone[1]};"
    ):
        find_dataset(folder)
    assert len(find_dataset(folder, complete=False).cases) == 4


def test_of_many_missing_files_some_are_named(tmp_path):
    folder = make_dataset(tmp_path, "msd", num_cases=6)
    for file in (folder / "imagesTr").iterdir():
        file.unlink()
    with pytest.raises(
        DataError, match=r"do not exist \(6 of 12\): .*case_04\.nii\.gz, \.\.\.; expected"
    ):
        find_dataset(folder)


def test_a_test_image_that_is_missing_hinders_no_training(tmp_path):
    folder = make_dataset(tmp_path, "msd")
    edit(folder, test=["./imagesTs/elsewhere.nii.gz"])
    assert [case.case_id for case in find_dataset(folder).unlabelled] == ["elsewhere"]


def test_training_entry_without_label_is_refused(tmp_path):
    folder = make_dataset(tmp_path, "msd", num_cases=1)
    edit(folder, training=[{"image": "./imagesTr/case_00.nii.gz"}])
    with pytest.raises(DataError, match=r"training\[0\] has no label"):
        find_dataset(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ["background", "liver"]}, "expected names by value"),
        ({"labels": {"zero": "background"}}, "a key that is not an integer"),
        ({"labels": {"0": "background"}}, "expected background and at least one class"),
        ({"labels": {"1": "liver", "2": "liver"}}, "2 label values are named 'liver'"),
        ({"modality": "CT"}, "expected names by number from 0"),
        ({"modality": {"1": "CT"}}, "expected names by number from 0"),
        ({"training": {}}, "'training' is not a list"),
    ],
)
def test_malformed_declarations_are_refused_by_key(tmp_path, changes, message):
    folder = make_dataset(tmp_path, "msd", num_cases=1)
    edit(folder, **changes)
    with pytest.raises(DataError, match=message):
        find_dataset(folder)


def test_missing_key_is_named(tmp_path):
    (tmp_path / "dataset.json").write_text('{"modality": {"0": "CT"}}')
    with pytest.raises(DataError, match="key 'labels' is missing"):
        find_dataset(tmp_path)


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "dataset.json").write_text('{"modality": ')
    with pytest.raises(DataError, match=r"dataset.json is not valid JSON"):
        find_dataset(tmp_path)


def test_hippocampus_has_200_cases_and_two_classes(shared_data):
    dataset = find_dataset(shared_data / "hippocampus")
    assert len(dataset.cases) == 200
    assert dataset.classes.names == ("background", "Anterior", "Posterior")
    assert dataset.classes.values == (0, 1, 2)
    assert dataset.channels == ("MRI",)
