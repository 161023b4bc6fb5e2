"""What `find_dataset` decides before a layout is read, and refuses after."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from makers import make_case, make_dataset

from volseg.data.cases import Dataset
from volseg.data.layouts import find_dataset
from volseg.errors import DataError


@pytest.mark.parametrize(
    ("layout", "name"), [("msd", "MSD"), ("nnunet", "nnU-Net"), ("folders", "folders")]
)
def test_the_same_cases_are_found_in_every_layout(tmp_path, layout, name):
    dataset = find_dataset(make_dataset(tmp_path / "set", layout))
    assert dataset.layout == name
    assert [case.case_id for case in dataset.cases] == ["case_00", "case_01", "case_02", "case_03"]
    assert dataset.classes.values == (0, 1, 2)
    assert all(case.images[0].is_file() and case.label.is_file() for case in dataset.cases)


def test_dataset_json_may_be_given_instead_of_its_folder(tmp_path):
    folder = make_dataset(tmp_path, "msd")
    assert find_dataset(folder / "dataset.json") == find_dataset(folder)


def test_relative_path_gives_absolute_paths(tmp_path, monkeypatch):
    make_dataset(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    dataset = find_dataset("set")
    assert dataset.root == tmp_path / "set"
    assert dataset.cases[0].images[0].is_absolute()


def test_dataset_survives_its_json_file(tmp_path):
    dataset = find_dataset(make_dataset(tmp_path / "set"))
    dataset.write_json(tmp_path / "dataset.json")
    assert Dataset.read_json(tmp_path / "dataset.json") == dataset


def test_unknown_layout_lists_what_is_accepted(tmp_path):
    with pytest.raises(DataError, match=r"no known layout; expected an MSD .* datalist\. Arrange"):
        find_dataset(tmp_path)


def test_the_one_dataset_a_level_below_is_named_not_taken(tmp_path):
    make_dataset(tmp_path / "Task04")
    with pytest.raises(DataError, match=r"Give .*Task04, which is in a known layout"):
        find_dataset(tmp_path)


def test_two_datasets_below_are_not_guessed_between(tmp_path):
    make_dataset(tmp_path / "a", num_cases=1)
    make_dataset(tmp_path / "b", num_cases=1)
    with pytest.raises(DataError, match="Arrange the files"):
        find_dataset(tmp_path)


def test_absent_path_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_dataset(tmp_path / "nowhere")


def test_dataset_without_labelled_case_is_refused(tmp_path):
    folder = make_dataset(tmp_path, "msd")
    description = json.loads((folder / "dataset.json").read_text())
    description["test"] = [entry["image"] for entry in description.pop("training")]
    (folder / "dataset.json").write_text(json.dumps({**description, "training": []}))
    with pytest.raises(DataError, match=r"no case has a label \(4 images without\)"):
        find_dataset(folder)


def test_case_listed_twice_is_refused(tmp_path):
    make_case(tmp_path / "a.nii.gz", tmp_path / "a_label.nii.gz")
    (tmp_path / "list.csv").write_text("image,label\n" + "a.nii.gz,a_label.nii.gz\n" * 2)
    with pytest.raises(DataError, match="2 cases are named 'a'; expected each case id once"):
        find_dataset(tmp_path / "list.csv")


@pytest.mark.parametrize("case_id", ["../escape", "a/b", ".hidden", "a\\b"])
def test_case_id_that_is_no_file_name_is_refused(tmp_path, case_id):
    make_case(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
    (tmp_path / "list.csv").write_text(f"image,label,case_id\na.nii.gz,b.nii.gz,{case_id}\n")
    with pytest.raises(DataError, match="expected a plain file name"):
        find_dataset(tmp_path / "list.csv")


def test_finding_needs_neither_torch_nor_monai():
    code = (
        "import sys, volseg.data.layouts, volseg.data.check, volseg.data.splits;"
        "sys.exit(bool({'torch', 'monai', 'SimpleITK', 'nibabel'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
