from __future__ import annotations

import pytest
from makers import make_case, make_dataset

from volseg.data.check import check_dataset
from volseg.data.layouts import find_dataset
from volseg.errors import DataError


@pytest.mark.parametrize(
    ("images", "labels"),
    [("images", "masks"), ("imagesTr", "labelsTr"), ("Image", "Segmentations")],
)
def test_usual_folder_names_are_known(tmp_path, images, labels):
    make_case(tmp_path / images / "a.nii.gz", tmp_path / labels / "a.nii.gz")
    (case,) = find_dataset(tmp_path).cases
    assert case.images == (tmp_path / images / "a.nii.gz",)
    assert case.label == tmp_path / labels / "a.nii.gz"


def test_classes_are_the_values_of_all_labels(tmp_path):
    make_case(tmp_path / "images/a.nii.gz", tmp_path / "labels/a.nii.gz", values=(3,))
    make_case(tmp_path / "images/b.nii.gz", tmp_path / "labels/b.nii.gz", values=(1, 200))
    classes = find_dataset(tmp_path).classes
    assert classes.values == (0, 1, 3, 200)
    assert classes.names == ("background", "label_1", "label_3", "label_200")


def test_channels_are_files_with_numbers(tmp_path):
    dataset = find_dataset(make_dataset(tmp_path, num_channels=2))
    assert dataset.channels == ("channel_0", "channel_1")
    assert [path.name for path in dataset.cases[2].images] == [
        "case_02_0000.nii.gz",
        "case_02_0001.nii.gz",
    ]


def test_channels_of_a_4d_file_are_counted(tmp_path):
    make_case(tmp_path / "images/a.nii.gz", tmp_path / "labels/a.nii.gz", num_channels=3)
    dataset = find_dataset(tmp_path)
    assert dataset.channels == ("channel_0", "channel_1", "channel_2")
    assert len(dataset.cases[0].images) == 1


def test_label_with_a_number_is_a_case_not_a_channel(tmp_path):
    for name in ("p", "p_0000"):
        make_case(tmp_path / f"images/{name}.nii.gz", tmp_path / f"labels/{name}.nii.gz")
    assert [case.case_id for case in find_dataset(tmp_path).cases] == ["p", "p_0000"]


def test_suffixes_of_image_and_label_may_differ(tmp_path):
    make_case(tmp_path / "images/a.nii", tmp_path / "labels/a.nii.gz")
    assert len(find_dataset(tmp_path).cases) == 1


def test_image_without_label_is_unlabelled(tmp_path):
    folder = make_dataset(tmp_path, num_cases=2)
    make_case(folder / "images" / "new.nii.gz")
    dataset = find_dataset(folder)
    assert [case.case_id for case in dataset.unlabelled] == ["new"]
    assert len(dataset.cases) == 2


def test_hidden_files_are_ignored(tmp_path):
    folder = make_dataset(tmp_path, num_cases=1)
    (folder / "images" / "._case_00.nii.gz").write_bytes(b"fork")
    (folder / "labels" / "notes.txt").write_text("by AB")
    assert len(find_dataset(folder).cases) == 1


def test_label_without_image_is_refused(tmp_path):
    folder = make_dataset(tmp_path, num_cases=2)
    (folder / "images" / "case_01.nii.gz").rename(folder / "images" / "case_1.nii.gz")
    with pytest.raises(DataError, match=r"case_01.nii.gz has no image; expected .*case_01.nii.gz"):
        find_dataset(folder)


def test_missing_channel_is_named(tmp_path):
    folder = make_dataset(tmp_path, num_channels=2)
    (folder / "images" / "case_03_0000.nii.gz").unlink()
    with pytest.raises(DataError, match=r"case 'case_03' has no image of channel 0 .*_0000.nii.gz"):
        find_dataset(folder)


def test_two_folders_of_labels_are_not_guessed_between(tmp_path):
    folder = make_dataset(tmp_path, num_cases=1)
    (folder / "masks").mkdir()
    with pytest.raises(DataError, match="holds both labels and masks; expected one of them"):
        find_dataset(folder)


def test_two_files_with_one_stem_are_refused(tmp_path):
    folder = make_dataset(tmp_path, num_cases=1)
    make_case(folder / "images" / "case_00.nii")
    with pytest.raises(DataError, match=r"case_00.nii.gz have the same stem"):
        find_dataset(folder)


def test_labels_of_background_only_are_refused(tmp_path):
    make_case(tmp_path / "images/a.nii.gz", tmp_path / "labels/a.nii.gz", values=())
    with pytest.raises(DataError, match="the 1 label files hold only the value 0"):
        find_dataset(tmp_path)


def test_damaged_label_is_named(tmp_path):
    folder = make_dataset(tmp_path)
    label = folder / "labels" / "case_02.nii.gz"
    label.write_bytes(label.read_bytes()[:60])
    with pytest.raises(DataError, match=r"labels/case_02.nii.gz"):
        find_dataset(folder)


def test_sarcoma_has_22_cases_of_one_class(shared_data):
    dataset = find_dataset(shared_data / "sarcoma_ct")
    assert len(dataset.cases) == 22
    assert dataset.classes.values == (0, 1)
    assert dataset.channels == ("channel_0",)


def test_a_numbered_file_may_hold_all_channels(tmp_path):
    for name in ("a", "b"):
        image = tmp_path / "images" / f"{name}_0000.nii.gz"
        make_case(image, tmp_path / "labels" / f"{name}.nii.gz", num_channels=3)
    dataset = find_dataset(tmp_path)
    assert dataset.channels == ("channel_0", "channel_1", "channel_2")
    assert dataset.cases[0].images == (tmp_path / "images" / "a_0000.nii.gz",)


@pytest.mark.parametrize("suffix", ["", "_0000"])
def test_a_damaged_first_file_hinders_no_other_case(tmp_path, suffix):
    for name in ("a", "b"):
        image = tmp_path / "images" / f"{name}{suffix}.nii.gz"
        make_case(image, tmp_path / "labels" / f"{name}.nii.gz", num_channels=3)
    (tmp_path / "images" / f"a{suffix}.nii.gz").write_bytes(b"nothing")
    dataset = find_dataset(tmp_path)
    assert len(dataset.channels) == 3
    assert {finding.case_id for finding in check_dataset(dataset)} == {"a"}
    (tmp_path / "images" / f"b{suffix}.nii.gz").write_bytes(b"nothing")
    with pytest.raises(DataError, match=rf"a{suffix}\.nii\.gz"):
        find_dataset(tmp_path)
