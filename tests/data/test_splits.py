from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from volseg.data.cases import Case, Classes, Dataset
from volseg.data.splits import Split, choose_splits, make_splits, read_splits, write_splits
from volseg.errors import ConfigError, DataError


def make_cases(num_patients, cases_per_patient=1):
    return [
        Case(
            case_id=f"p{patient}_{visit}",
            images=(Path("x.nii.gz"),),
            label=Path("y.nii.gz"),
            patient_id=f"p{patient}",
        )
        for patient in range(num_patients)
        for visit in range(cases_per_patient)
    ]


def test_every_case_is_validated_once():
    cases = make_cases(13)
    splits = make_splits(cases, num_folds=5, seed=0)
    validated = [case_id for split in splits for case_id in split.validation]
    assert sorted(validated) == sorted(case.case_id for case in cases)
    assert all(len(split.train) + len(split.validation) == 13 for split in splits)


def test_fold_sizes_differ_by_at_most_one():
    sizes = Counter(len(split.validation) for split in make_splits(make_cases(13), 5, seed=3))
    assert sizes == {3: 3, 2: 2}


def test_cases_of_a_patient_stay_together():
    for split in make_splits(make_cases(7, cases_per_patient=3), num_folds=3, seed=1):
        train = {case_id.split("_")[0] for case_id in split.train}
        validation = {case_id.split("_")[0] for case_id in split.validation}
        assert train.isdisjoint(validation)
        assert len(train | validation) == 7


def test_folds_do_not_depend_on_the_order_of_cases():
    cases = make_cases(10)
    forward = make_splits(cases, 5, seed=0)
    backward = make_splits(cases[::-1], 5, seed=0)
    assert [set(s.validation) for s in forward] == [set(s.validation) for s in backward]


def test_folds_depend_on_patients_not_on_their_cases():
    one = make_splits(make_cases(10), 5, seed=0)
    two = make_splits(make_cases(10, cases_per_patient=2), 5, seed=0)
    assert [set(split.validation) for split in one] == [
        {case_id for case_id in split.validation if case_id.endswith("_0")} for split in two
    ]


def test_folds_are_the_same_for_ever():
    # The first digits of sha256("0:p0") ... sha256("0:p5") are c7, fc, 0e, cb, 55, 7a,
    # so the patients are dealt in the order 2 4 5 | 0 3 1.
    splits = make_splits(make_cases(6), num_folds=3, seed=0)
    validation = [split.validation for split in splits]
    assert validation == [("p0_0", "p2_0"), ("p3_0", "p4_0"), ("p1_0", "p5_0")]


def test_another_seed_gives_other_folds():
    cases = make_cases(20)
    assert make_splits(cases, 5, seed=0) != make_splits(cases, 5, seed=1)


def test_fewer_patients_than_folds_names_the_option():
    with pytest.raises(ConfigError, match=r"training.num_folds 5 with 3 patients; expected"):
        make_splits(make_cases(3, cases_per_patient=4), num_folds=5, seed=0)


def test_one_patient_is_told_how_to_train_without_a_fold():
    with pytest.raises(ConfigError, match=r"with 1 patients; .* whose \"validation\" is empty"):
        make_splits(make_cases(1, cases_per_patient=2), num_folds=5, seed=0)


def test_declared_splits_come_before_made_ones(tmp_path):
    cases = make_cases(4)
    declared = Split(train=("p0_0",), validation=("p1_0",))
    dataset = Dataset(
        name="d",
        root=tmp_path,
        layout="datalist",
        channels=("CT",),
        classes=Classes(names=("background", "liver"), values=(0, 1)),
        cases=tuple(cases),
    )
    assert choose_splits(dataset, 2, seed=0) == make_splits(cases, 2, seed=0)
    with_splits = dataset.model_copy(update={"splits": (declared,)})
    assert choose_splits(with_splits, 2, seed=0) == [declared]


def test_splits_survive_their_file(tmp_path):
    cases = make_cases(6)
    splits = make_splits(cases, 3, seed=0)
    write_splits(tmp_path / "splits.json", splits)
    assert read_splits(tmp_path / "splits.json", cases) == splits
    assert list(json.loads((tmp_path / "splits.json").read_text())[0]) == ["train", "validation"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"train": ["p0_0"], "validation": ["who"]}], "split 0: case 'who' is not a labelled"),
        (
            [{"train": ["p0_0", "p1_0"], "validation": ["p1_0"]}],
            "case 'p1_0' is in train and in validation",
        ),
        (
            [{"train": ["p0_0"], "validation": ["p0_1"]}],
            "patient 'p0' has cases in train and in validation",
        ),
        ([{"train": [], "validation": ["p0_0"]}], "split 0 has no training case"),
        ([{"train": ["p0_0"], "val": ["p1_0"]}], "split 0: key 'validation' is missing"),
        ([], "is no list of splits"),
        ({"train": []}, "is no list of splits"),
    ],
)
def test_wrong_own_splits_are_refused(tmp_path, content, message):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_splits(path, make_cases(3, cases_per_patient=2))


def test_damaged_and_absent_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"splits.json cannot be read"):
        read_splits(tmp_path / "splits.json", [])
    (tmp_path / "splits.json").write_text("[")
    with pytest.raises(DataError, match=r"splits.json is not valid JSON"):
        read_splits(tmp_path / "splits.json", [])
