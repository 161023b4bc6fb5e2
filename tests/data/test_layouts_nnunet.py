from __future__ import annotations

import json

import numpy as np
import pytest
from makers import make_case, make_dataset
from PIL import Image

from volseg.data.check import check_dataset
from volseg.data.layouts import find_dataset
from volseg.data.reading import read_case
from volseg.errors import DataError


def edit(folder, **changes):
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_version_1(folder, image_suffix=""):
    make_dataset(folder, "nnunet", num_channels=2, num_cases=2)
    entries = [
        {
            "image": f"./imagesTr/case_0{n}{image_suffix}.nii.gz",
            "label": f"./labelsTr/case_0{n}.nii.gz",
        }
        for n in range(2)
    ]
    description = {
        "modality": {"0": "T1", "1": "T2"},
        "labels": {"0": "background", "1": "a", "2": "b"},
        "training": entries,
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def test_channel_files_are_in_the_order_of_their_numbers(tmp_path):
    dataset = find_dataset(make_dataset(tmp_path, "nnunet", num_channels=2))
    assert dataset.channels == ("MR0", "MR1")
    assert [path.name for path in dataset.cases[1].images] == [
        "case_01_0000.nii.gz",
        "case_01_0001.nii.gz",
    ]


@pytest.mark.parametrize("image_suffix", ["", "_0000"])
def test_version_1_is_told_from_msd_by_its_files(tmp_path, image_suffix):
    dataset = find_dataset(write_version_1(tmp_path, image_suffix))
    assert dataset.layout == "nnU-Net"
    assert [case.case_id for case in dataset.cases] == ["case_00", "case_01"]
    assert len(dataset.cases[0].images) == 2


def test_version_1_is_told_though_a_file_is_missing(tmp_path):
    folder = write_version_1(tmp_path)
    (folder / "imagesTr" / "case_00_0000.nii.gz").unlink()
    with pytest.raises(DataError, match="case_00"):
        find_dataset(folder)
    assert find_dataset(folder, ["T1"]).layout == "nnU-Net"


def test_msd_names_that_end_in_four_digits_are_no_channels(tmp_path):
    folder = make_dataset(tmp_path, "msd", num_cases=1)
    make_case(folder / "imagesTr" / "p_0001.nii.gz", folder / "labelsTr" / "p_0001.nii.gz")
    pair = {"image": "imagesTr/p_0001.nii.gz", "label": "labelsTr/p_0001.nii.gz"}
    edit(folder, training=[pair])
    dataset = find_dataset(folder)
    assert (dataset.layout, dataset.cases[0].case_id) == ("MSD", "p_0001")


def test_images_ts_are_unlabelled_cases(tmp_path):
    folder = make_dataset(tmp_path, "nnunet")
    make_case(folder / "imagesTs" / "new_0000.nii.gz")
    dataset = find_dataset(folder)
    assert [case.case_id for case in dataset.unlabelled] == ["new"]


def test_regions_are_made_of_the_values_that_they_list(tmp_path):
    folder = make_dataset(tmp_path, "nnunet")
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    edit(folder, labels=labels, regions_class_order=[1, 2, 3])
    classes = find_dataset(folder).classes
    assert classes.values == (0, 1, 2, 3)
    assert classes.names == ("background", "label_1", "label_2", "enhancing")
    regions = {region.name: region.values for region in classes.regions}
    assert regions == {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}


def test_labels_of_single_values_are_no_regions(tmp_path):
    folder = make_dataset(tmp_path, "nnunet")
    edit(folder, labels={"background": 0, "liver": [1], "tumour": 2})
    assert find_dataset(folder).classes.regions == ()


def test_background_of_any_spelling_is_no_region(tmp_path):
    folder = make_dataset(tmp_path / "d", "nnunet", num_cases=1)
    edit(folder, labels={"Background": 0, "whole": [1, 2], "core": 2})
    classes = find_dataset(folder).classes
    assert [region.name for region in classes.regions] == ["whole", "core"]


def test_several_ignored_values_are_refused(tmp_path):
    folder = make_dataset(tmp_path / "d", "nnunet", num_cases=1)
    edit(folder, labels={"background": 0, "liver": 1, "ignore": [2, 3]})
    with pytest.raises(DataError, match=r"'ignore' has the values \[2, 3\]; expected one"):
        find_dataset(folder)


def test_ignore_label_is_no_class(tmp_path):
    folder = make_dataset(tmp_path, "nnunet")
    edit(folder, labels={"background": 0, "liver": 1, "ignore": 2})
    classes = find_dataset(folder).classes
    assert (classes.values, classes.ignore) == ((0, 1), 2)
    assert classes.candidates == ((0, 1),)


def test_missing_channel_names_case_channel_and_file(tmp_path):
    folder = make_dataset(tmp_path, "nnunet", num_channels=2)
    (folder / "imagesTr" / "case_01_0001.nii.gz").unlink()
    message = r"case 'case_01' has no image of channel 1 \(MR1\); expected .*case_01_0001.nii.gz"
    with pytest.raises(DataError, match=message):
        find_dataset(folder)


def test_undeclared_channel_is_refused(tmp_path):
    folder = make_dataset(tmp_path, "nnunet", num_channels=2)
    edit(folder, channel_names={"0": "T1"})
    with pytest.raises(DataError, match=r"case_00_0001.nii.gz is of channel 1; expected only 1"):
        find_dataset(folder)


def test_image_without_label_is_refused(tmp_path):
    folder = make_dataset(tmp_path, "nnunet")
    (folder / "labelsTr" / "case_03.nii.gz").unlink()
    with pytest.raises(DataError, match=r"case 'case_03' has no label; expected .*case_03.nii.gz"):
        find_dataset(folder)


def test_incomplete_copy_is_seen_by_num_training(tmp_path):
    folder = make_dataset(tmp_path, "nnunet")
    edit(folder, numTraining=5)
    with pytest.raises(DataError, match="4 training cases; expected 5 as numTraining"):
        find_dataset(folder)


def test_file_without_channel_number_is_refused(tmp_path):
    folder = make_dataset(tmp_path, "nnunet")
    make_case(folder / "imagesTr" / "extra.nii.gz")
    with pytest.raises(DataError, match=r"extra.nii.gz has no channel number; .*extra_0000.nii.gz"):
        find_dataset(folder)


def test_dataset_entry_points_to_files_elsewhere(tmp_path):
    folder = make_dataset(tmp_path / "raw", "nnunet", num_cases=1)
    make_case(tmp_path / "archive" / "scan.nii.gz", tmp_path / "archive" / "truth.nii.gz")
    files = {"images": ["../archive/scan.nii.gz"], "label": "../archive/truth.nii.gz"}
    edit(folder, dataset={"p1": files}, numTraining=1)
    (case,) = find_dataset(folder).cases
    assert case.case_id == "p1"
    assert case.images[0].samefile(tmp_path / "archive" / "scan.nii.gz")


def test_missing_key_is_named(tmp_path):
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "CT"}}')
    with pytest.raises(DataError, match="key 'labels' is missing"):
        find_dataset(tmp_path)


def write_pictures(folder):
    """As nnU-Net has them: all colours in the one file that is numbered 0000."""
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (9, 7, 3), np.uint8))
    picture.save(folder / "imagesTs" / "c_0000.png")
    for name in ("a", "b"):
        picture.save(folder / "imagesTr" / f"{name}_0000.png")
        label = Image.fromarray((np.arange(63).reshape(9, 7) > 30).astype(np.uint8))
        label.save(folder / "labelsTr" / f"{name}.png")
    description = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "road": 1},
        "numTraining": 2,
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def test_a_coloured_picture_is_one_file(tmp_path):
    write_pictures(tmp_path)
    dataset = find_dataset(tmp_path)
    assert dataset.channels == ("R", "G", "B")
    assert [case.images for case in (*dataset.cases, *dataset.unlabelled)] == [
        (tmp_path / name,)
        for name in ("imagesTr/a_0000.png", "imagesTr/b_0000.png", "imagesTs/c_0000.png")
    ]
    assert check_dataset(dataset) == []
    image, _ = read_case(dataset.cases[0], dataset.channels, dataset.classes)
    assert image.array.shape == (3, 7, 9)


def test_listed_files_may_hold_all_channels(tmp_path):
    write_pictures(tmp_path)
    entry = {"images": ["imagesTr/a_0000.png"], "label": "labelsTr/a.png"}
    edit(tmp_path, dataset={"one": entry})
    (case,) = find_dataset(tmp_path).cases
    assert case.images == (tmp_path / "imagesTr" / "a_0000.png",)
    edit(tmp_path, channel_names={"0": "R", "1": "G"})
    with pytest.raises(DataError, match="1 images; expected 2"):
        find_dataset(tmp_path)


def test_listed_cases_may_lack_a_channel_that_is_optional(tmp_path):
    folder = make_dataset(tmp_path, "nnunet", num_channels=2, num_cases=1)
    images = ["imagesTr/case_00_0000.nii.gz", None]
    edit(folder, dataset={"one": {"images": images, "label": "labelsTr/case_00.nii.gz"}})
    with pytest.raises(
        DataError, match=r"no image of MR1\. Add the file, .*optional_channels=\[MR1"
    ):
        find_dataset(folder)
    (case,) = find_dataset(folder, ["MR1"]).cases
    assert case.images == (folder / "imagesTr" / "case_00_0000.nii.gz", None)


def test_a_damaged_picture_is_told_of_its_case(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "imagesTr" / "a_0000.png").write_bytes(b"nothing")
    dataset = find_dataset(tmp_path)
    assert {finding.case_id for finding in check_dataset(dataset)} == {"a"}
    # Where it may be one channel of several it is taken so.
    assert find_dataset(tmp_path, ["G", "B"]).cases[0].images[1:] == (None, None)
