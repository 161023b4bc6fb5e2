from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from volseg.data.cases import Classes
from volseg.errors import DataError
from volseg.evaluation import evaluate
from volseg.geometry import Geometry
from volseg.images import write_labels

TWO_CLASSES = Classes(names=("background", "liver", "tumour"), values=(0, 1, 2))
VOXEL_ML = 2 * 1 * 5 / 1000


def write_case(path: Path, voxels: dict[int, int], shape=(4, 4, 4), shift_mm=0.0) -> None:
    """A label file whose first voxels hold each value the given number of times, in order."""
    labels = np.zeros(shape, dtype=np.uint8)
    values = [value for value, count in voxels.items() for _ in range(count)]
    labels.flat[: len(values)] = values
    affine = np.diag([2.0, 1.0, 5.0, 1.0])
    affine[0, 3] = shift_mm
    write_labels(path, labels, Geometry(shape, affine))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two cases. Case a: liver 8 of 8 voxels and 4 of 4 of the tumour. Case b: liver 4 of 8."""
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    write_case(predictions / "a.nii.gz", {1: 8, 2: 4})
    write_case(references / "a.nii.gz", {1: 8, 2: 4})
    write_case(predictions / "b.nii.gz", {1: 4})
    write_case(references / "b.nii.gz", {1: 8})
    return predictions, references


def test_means_count_out_the_classes_absent_from_both_sides(folders):
    summary = evaluate(*folders, classes=TWO_CLASSES).summary
    liver, tumour = summary.classes
    dice_b = 2 * 4 / (4 + 8)
    assert liver.mean_dice == pytest.approx((1 + dice_b) / 2)
    assert liver.std_dice == pytest.approx((1 - dice_b) / 2)
    assert (liver.num_cases, liver.num_empty) == (2, 0)
    assert (tumour.mean_dice, tumour.num_cases, tumour.num_empty) == (1.0, 1, 1)
    assert summary.mean_dice == pytest.approx((liver.mean_dice + 1) / 2)


def test_a_false_positive_counts_as_zero(folders):
    predictions, references = folders
    write_case(predictions / "b.nii.gz", {1: 8, 2: 1})
    tumour = evaluate(predictions, references, classes=TWO_CLASSES).summary.classes[1]
    assert (tumour.mean_dice, tumour.num_cases) == (0.5, 2)


def test_rows_hold_volumes_in_ml(folders):
    rows = evaluate(*folders, classes=TWO_CLASSES).rows
    liver_b = next(row for row in rows if (row.case_id, row.class_name) == ("b", "liver"))
    assert liver_b.reference_ml == pytest.approx(8 * VOXEL_ML)
    assert liver_b.prediction_ml == pytest.approx(4 * VOXEL_ML)


def test_without_classes_the_values_found_are_the_names(folders):
    predictions, references = folders
    write_case(references / "b.nii.gz", {1: 8, 205: 3})
    evaluation = evaluate(predictions, references)
    assert [item.class_name for item in evaluation.summary.classes] == ["1", "2", "205"]


def test_files_hold_the_same_as_the_evaluation(folders, tmp_path):
    evaluation = evaluate(*folders, output=tmp_path / "scores", classes=TWO_CLASSES)
    with open(tmp_path / "scores" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case_id"], row["class_name"]) for row in rows] == [
        ("a", "liver"),
        ("a", "tumour"),
        ("b", "liver"),
        ("b", "tumour"),
    ]
    assert rows[3]["dice"] == ""
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary["mean_dice"] == evaluation.summary.mean_dice


def test_cases_on_one_side_only_are_listed_and_not_scored(folders):
    predictions, references = folders
    write_case(references / "c.nii.gz", {1: 8})
    write_case(predictions / "d.nii.gz", {1: 8})
    summary = evaluate(predictions, references, classes=TWO_CLASSES).summary
    assert (summary.missing, summary.unmatched, summary.num_cases) == (("c",), ("d",), 2)
    assert summary.classes[0].num_cases == 2


def test_references_may_be_files_of_any_name(folders):
    predictions, references = folders
    files = {"a": references / "b.nii.gz"}
    summary = evaluate(predictions, files, classes=TWO_CLASSES).summary
    assert summary.classes[0].mean_dice == 1.0
    assert summary.unmatched == ("b",)


def test_a_damaged_file_fails_its_case_and_no_other(folders):
    predictions, references = folders
    file = predictions / "b.nii.gz"
    file.write_bytes(file.read_bytes()[:60])
    summary = evaluate(predictions, references, classes=TWO_CLASSES).summary
    assert list(summary.failed) == ["b"]
    assert "b.nii.gz" in summary.failed["b"]
    assert (summary.num_cases, summary.classes[0].mean_dice) == (1, 1.0)


def test_a_shifted_grid_fails_and_names_files_and_distance(folders):
    predictions, references = folders
    write_case(predictions / "b.nii.gz", {1: 8}, shift_mm=1.5)
    failed = evaluate(predictions, references).summary.failed["b"]
    assert str(predictions / "b.nii.gz") in failed
    assert str(references / "b.nii.gz") in failed
    assert "1.5 mm apart" in failed


def test_another_shape_fails_and_names_both(folders):
    predictions, references = folders
    write_case(predictions / "b.nii.gz", {1: 8}, shape=(4, 4, 5))
    failed = evaluate(predictions, references).summary.failed["b"]
    assert "(4, 4, 5)" in failed
    assert "(4, 4, 4)" in failed


def test_a_value_of_no_class_fails_and_names_the_file(folders):
    predictions, references = folders
    write_case(references / "b.nii.gz", {1: 8, 3: 1})
    failed = evaluate(predictions, references, classes=TWO_CLASSES).summary.failed["b"]
    assert f"{references / 'b.nii.gz'} holds label value 3; expected only [0, 1, 2]" in failed


def test_nothing_that_matches_is_an_error(tmp_path):
    write_case(tmp_path / "predictions" / "case_1.nii.gz", {1: 8})
    write_case(tmp_path / "references" / "label_1.nii.gz", {1: 8})
    with pytest.raises(DataError, match=r"the first is 'case_1'; expected names such as 'label_1'"):
        evaluate(tmp_path / "predictions", tmp_path / "references")


def test_a_folder_without_label_files_is_an_error(tmp_path):
    write_case(tmp_path / "references" / "a.nii.gz", {1: 8})
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "notes.txt").write_text("")
    with pytest.raises(DataError, match="predictions holds no label files"):
        evaluate(tmp_path / "predictions", tmp_path / "references")


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        evaluate(tmp_path / "nowhere", {})


def test_two_files_of_one_case_are_an_error(folders):
    predictions, references = folders
    write_case(predictions / "a.nii", {1: 8})
    with pytest.raises(DataError, match="are both case 'a'"):
        evaluate(predictions, references)


def test_real_labels_agree_with_themselves(shared_data):
    labels = shared_data / "hippocampus" / "labelsTr"
    files = {name: labels / f"{name}.nii.gz" for name in ("hippocampus_001", "hippocampus_003")}
    summary = evaluate(labels, files).summary
    assert [item.class_name for item in summary.classes] == ["1", "2"]
    assert summary.mean_dice == 1.0


def test_regions_are_scored_as_unions_of_their_classes(tmp_path):
    write_case(tmp_path / "p" / "a.nii.gz", {1: 3, 2: 5})
    write_case(tmp_path / "r" / "a.nii.gz", {1: 5, 2: 1})
    organ = {"name": "organ", "values": (1, 2)}
    classes = Classes(**TWO_CLASSES.model_dump(exclude={"regions"}), regions=(organ,))
    evaluation = evaluate(tmp_path / "p", tmp_path / "r", tmp_path / "s", classes=classes)
    (row,) = evaluation.rows
    assert (row.class_name, row.value) == ("organ", None)
    assert (row.prediction_voxels, row.reference_voxels) == (8, 6)
    assert row.dice == pytest.approx(2 * 6 / (8 + 6))
    assert evaluation.summary.mean_dice == row.dice
    assert "organ,," in (tmp_path / "s" / "metrics.csv").read_text()
