from __future__ import annotations

import json

import pytest
from makers import make_case

from volseg.data.layouts import find_dataset
from volseg.errors import DataError


@pytest.fixture
def folder(tmp_path):
    """Images a0, a1, a2, a3 and labels l0, l1, l2, l3 in the folder ``files``."""
    for number in range(4):
        files = tmp_path / "files"
        make_case(files / f"a{number}.nii.gz", files / f"l{number}.nii.gz", values=(1, 5))
    return tmp_path


def write_csv(folder, *lines):
    path = folder / "list.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_json(folder, content):
    path = folder / "list.json"
    path.write_text(json.dumps(content))
    return path


def entry(number, **more):
    return {"image": f"files/a{number}.nii.gz", "label": f"files/l{number}.nii.gz", **more}


def test_csv_paths_are_relative_to_the_file(folder):
    dataset = find_dataset(
        write_csv(folder, "image,label", "files/a0.nii.gz,files/l0.nii.gz", "files/a1.nii.gz,")
    )
    assert [case.case_id for case in dataset.cases] == ["a0"]
    assert [case.case_id for case in dataset.unlabelled] == ["a1"]
    assert dataset.cases[0].label == folder / "files" / "l0.nii.gz"
    assert dataset.classes.values == (0, 1, 5)
    assert dataset.channels == ("channel_0",)


def test_csv_names_channels_cases_and_patients(folder):
    line = "files/a0.nii.gz,files/a1.nii.gz,files/l0.nii.gz,first,P7"
    path = write_csv(folder, "image_T1,image_FLAIR,label,case_id,patient_id", line)
    dataset = find_dataset(path)
    (case,) = dataset.cases
    assert dataset.channels == ("T1", "FLAIR")
    assert (case.case_id, case.patient_id, len(case.images)) == ("first", "P7", 2)


def test_csv_of_a_spreadsheet_is_read(folder):
    path = write_csv(folder, "\ufeffimage;label", "files/a0.nii.gz;files/l0.nii.gz", ";")
    assert len(find_dataset(path).cases) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["picture,label"], "columns picture, label; expected image"),
        ([], "columns none; expected image"),
        (["image,image_T1,label"], "expected image, or one image_<channel>"),
        (["image,label"], "lists no cases"),
        (["image,lable", "files/a0.nii.gz,x"], "unknown key 'lable'. Did you mean 'label'"),
        (["image,label", "files/a0.nii.gz"], "line 2 has 1 cells; expected 2"),
        (["image,label", ",files/l0.nii.gz"], "line 2: column image is empty"),
        (
            ["image,label", "nope.nii.gz,files/l0.nii.gz"],
            "none of 1 files .*nope.nii.gz; expected",
        ),
        (
            ["image,label", "files/a0.nii.gz,nope.nii.gz"],
            "none of 1 files .*nope.nii.gz; expected",
        ),
        (
            ["image,label", "files/a0.nii.gz,files/l0.nii.gz", "files/a1.nii.gz,nope.nii.gz"],
            "list.csv names files that do not exist .1 of 4.: .*nope.nii.gz; expected",
        ),
        (["image,fold", "files/a0.nii.gz,x"], "line 2: fold: "),
    ],
)
def test_wrong_csv_is_refused_by_line(folder, lines, message):
    with pytest.raises(DataError, match=message):
        find_dataset(write_csv(folder, *lines))


def test_channels_and_classes_are_those_of_files_that_are_there(folder):
    path = write_csv(folder, "image,label", "x.nii.gz,files/l0.nii.gz", "files/a1.nii.gz,x.nii.gz")
    dataset = find_dataset(path, complete=False)
    assert (dataset.channels, dataset.classes.values) == (("channel_0",), (0, 1, 5))


def test_a_folder_in_the_place_of_a_file_is_told(folder):
    path = write_csv(
        folder, "image,label", "files/a0.nii.gz,files/l0.nii.gz", "files,files/l1.nii.gz"
    )
    with pytest.raises(DataError, match=r"do not exist \(1 of 4\): .*files \(a folder\); expected"):
        find_dataset(path)


def test_json_list_and_training_section_are_the_same(folder):
    plain = find_dataset(write_json(folder, [entry(0), entry(1)]))
    sections = find_dataset(write_json(folder, {"training": [entry(0), entry(1)]}))
    assert plain == sections
    assert plain.splits == ()


def test_json_declares_labels_and_channels(folder):
    content = {
        "labels": {"0": "background", "1": "liver", "5": "tumour"},
        "modality": {"0": "CT"},
        "training": [entry(0)],
        "testing": [{"image": "files/a1.nii.gz"}, "files/a2.nii.gz"],
    }
    dataset = find_dataset(write_json(folder, content))
    assert dataset.classes.names == ("background", "liver", "tumour")
    assert dataset.channels == ("CT",)
    assert [case.case_id for case in dataset.unlabelled] == ["a1", "a2"]


def test_json_image_may_be_a_list_of_channels(folder):
    images = ["files/a0.nii.gz", str(folder / "files" / "a1.nii.gz")]
    dataset = find_dataset(write_json(folder, [{"image": images, "label": "files/l0.nii.gz"}]))
    assert dataset.channels == ("channel_0", "channel_1")
    assert dataset.cases[0].images[1] == folder / "files" / "a1.nii.gz"


def test_folds_of_the_list_are_its_splits(folder):
    entries = [entry(0, fold=0), entry(1, fold=1), entry(2, fold=0)]
    first, second = find_dataset(write_json(folder, entries)).splits
    assert (first.train, first.validation) == (("a1",), ("a0", "a2"))
    assert (second.train, second.validation) == (("a0", "a2"), ("a1",))


def test_validation_section_is_the_one_split(folder):
    content = {"training": [entry(0), entry(1)], "validation": [entry(2)]}
    dataset = find_dataset(write_json(folder, content))
    (split,) = dataset.splits
    assert (split.train, split.validation) == (("a0", "a1"), ("a2",))
    assert len(dataset.cases) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", "expected a list of cases"),
        ([{"label": "files/l0.nii.gz"}], r"training\[0\]: key 'image' is missing"),
        ([{"image": []}], r"training\[0\]: no image"),
        ([entry(0, fold=0), entry(1)], "only some labelled cases have a fold"),
        ([entry(0, fold=0), entry(1, fold=0)], "split 0 has no training case"),
        (
            [entry(0, fold=0, patient_id="P"), entry(1, fold=1, patient_id="P")],
            "patient 'P' has cases in train and in validation",
        ),
        ([entry(0), {"image": ["files/a1.nii.gz"] * 2}], "'a1' has 2 images and 'a0' has 1"),
        (
            {"modality": {"0": "CT"}, "training": [{"image": ["files/a1.nii.gz"] * 2}]},
            r"declares 1 channels \(CT\) and lists 2 images",
        ),
    ],
)
def test_wrong_json_is_refused_by_entry(folder, content, message):
    with pytest.raises(DataError, match=message):
        find_dataset(write_json(folder, content))
