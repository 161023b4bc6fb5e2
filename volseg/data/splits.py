"""Which cases to learn from and which to validate on, always whole patients on one side.

Takes cases, gives one `Split` per fold; ``splits.json`` holds them as a list of
``{"train": [...], "validation": [...]}``, which people may also write themselves. ``folds.json``
beside predictions of validation cases says which fold made them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from volseg.atomic import write_json
from volseg.config import Record
from volseg.data.cases import Case, Dataset, Split
from volseg.errors import ConfigError, DataError

__all__ = [
    "Split",
    "check_splits",
    "choose_splits",
    "forget_folds",
    "make_splits",
    "read_folds",
    "read_splits",
    "remember_folds",
    "write_splits",
]

FOLDS_FILE = "folds.json"


class _PredictedFolds(Record):
    """Beside predictions: by which fold each case was predicted that it did not see."""

    folds: dict[str, int]


def make_splits(cases: Sequence[Case], num_folds: int, seed: int) -> list[Split]:
    """Split `cases` for cross-validation: every case is validated in exactly one fold.

    Patients are dealt to the folds in the order of a hash of seed and `patient_id`, so the result
    depends on nothing else: not on the order of `cases`, nor on the machine or a library's version.

    Args:
        cases: labelled cases.
        num_folds: their sizes differ by at most one patient.
        seed: another seed gives other folds.

    Raises:
        ConfigError: fewer patients than folds.
    """
    patients = sorted({case.patient_id for case in cases}, key=lambda name: _digest(seed, name))
    if not 2 <= num_folds <= len(patients):
        cure = "Set training.num_folds or add cases."
        if len(patients) == 1:
            cure = 'Add cases, or a splits.json whose "validation" is empty to the run folder.'
        raise ConfigError(
            f"training.num_folds {num_folds} with {len(patients)} patients; expected at least 2 "
            f"folds and no more than patients. {cure}"
        )
    fold_of = {patient: index % num_folds for index, patient in enumerate(patients)}
    return [
        Split(
            train=tuple(c.case_id for c in cases if fold_of[c.patient_id] != fold),
            validation=tuple(c.case_id for c in cases if fold_of[c.patient_id] == fold),
        )
        for fold in range(num_folds)
    ]


def choose_splits(dataset: Dataset, num_folds: int, seed: int) -> list[Split]:
    """The splits that the dataset declares, else `make_splits` of its cases."""
    return list(dataset.splits) or make_splits(dataset.cases, num_folds, seed)


def write_splits(path: Path, splits: Sequence[Split]) -> None:
    """Write ``splits.json``, whole or not at all.

    Raises:
        FileExistsError: there is one, which stays.
    """
    write_json(path, [split.model_dump(mode="json") for split in splits], replaces=False)


def read_splits(path: Path, cases: Sequence[Case]) -> list[Split]:
    """Read ``splits.json``, which `write_splits` or a person wrote.

    Args:
        path: the file.
        cases: the labelled cases that it may name; it need not name all.

    Raises:
        DataError: not such a file, an unknown case, or a case or patient on both sides.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}. Correct the file.") from error
    if not isinstance(content, list) or not content:
        raise DataError(
            f'{path} is no list of splits; expected [{{"train": [...], "validation": [...]}}]. '
            "Correct the file."
        )
    splits = [Split.parse(s, f"{path}: split {i}", DataError) for i, s in enumerate(content)]
    check_splits(splits, cases, path)
    return splits


def check_splits(splits: Sequence[Split], cases: Sequence[Case], source: Path) -> None:
    """Refuse splits that cannot be trained on or whose validation would be too good to be true.

    Args:
        splits: to be checked.
        cases: the labelled cases.
        source: the file that declares the splits, for messages.

    Raises:
        DataError: no case to train on, an unknown case, or a case or patient on both sides.
    """
    patient_of = {case.case_id: case.patient_id for case in cases}
    for index, split in enumerate(splits):
        where = f"{source}: split {index}"
        if not split.train:
            raise DataError(f"{where} has no training case; expected at least one. Add cases.")
        for case_id in (*split.train, *split.validation):
            if case_id not in patient_of:
                raise DataError(
                    f"{where}: case '{case_id}' is not a labelled case of the dataset; expected "
                    f"ids such as '{next(iter(patient_of), '')}'. Correct the id."
                )
        if both := sorted(set(split.train) & set(split.validation)):
            raise DataError(
                f"{where}: case '{both[0]}' is in train and in validation; expected one side. "
                "Remove it from one."
            )
        sides = [{patient_of[c] for c in side} for side in (split.train, split.validation)]
        if both := sorted(sides[0] & sides[1]):
            raise DataError(
                f"{where}: patient '{both[0]}' has cases in train and in validation; expected "
                "whole patients on one side. Move the cases."
            )


def read_folds(predictions: Path) -> dict[str, int]:
    """Fold that predicted each case of a folder, by case id; empty if the folder does not say.

    Raises:
        DataError: its ``folds.json`` is damaged.
    """
    path = predictions / FOLDS_FILE
    return _PredictedFolds.read_json(path, DataError).folds if path.exists() else {}


def remember_folds(predictions: Path, case_ids: Collection[str], fold: int) -> None:
    """Write beside predictions by which fold they were made, none of them seen in its training."""
    folds = {**read_folds(predictions), **dict.fromkeys(case_ids, fold)}
    _PredictedFolds(folds=folds).write_json(predictions / FOLDS_FILE)


def forget_folds(predictions: Path, case_ids: Collection[str]) -> None:
    """Take cases that were predicted otherwise meanwhile out of what `remember_folds` wrote."""
    folds = read_folds(predictions)
    if folds.keys() & set(case_ids):
        kept = {case_id: fold for case_id, fold in folds.items() if case_id not in case_ids}
        _PredictedFolds(folds=kept).write_json(predictions / FOLDS_FILE)


def _digest(seed: int, patient_id: str) -> bytes:
    return hashlib.sha256(f"{seed}:{patient_id}".encode()).digest()
