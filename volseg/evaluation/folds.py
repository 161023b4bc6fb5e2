"""Scores of a cross-validation: Dice of every fold, and how much folds differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from volseg.config import Record


class ClassOverFolds(Record):
    """Dice of one class, or region, by fold."""

    class_name: str
    value: int | None
    """Value of the class in the label files; None for a region."""
    by_fold: tuple[float | None, ...]
    """Mean over the fold's cases; None if none of them counts."""
    mean_dice: float | None
    """Of the folds, each of which counts the same."""
    std_dice: float | None
    """Population standard deviation of the folds."""


class CrossValidation(Record):
    """Cases predicted by the fold that did not see them, scored fold by fold."""

    folds: tuple[int, ...]
    num_cases: tuple[int, ...]
    """Cases of each fold that were scored."""
    classes: tuple[ClassOverFolds, ...]
    by_fold: tuple[float | None, ...]
    """Mean over the classes."""
    mean_dice: float | None
    std_dice: float | None


def summarise_folds(
    dice: Mapping[tuple[str, int | None], Mapping[str, float | None]], folds: Mapping[str, int]
) -> CrossValidation | None:
    """Mean and standard deviation over folds, by class; None where the cases are of one fold.

    Args:
        dice: by name and value of the class, then by case id; None for a case that does not count.
        folds: number of the fold that predicted a case, by its id; other cases are left out.
    """
    scored = {case_id for by_case in dice.values() for case_id in by_case}
    numbers = sorted({fold for case_id, fold in folds.items() if case_id in scored})
    if len(numbers) < 2:
        return None
    members = [{c for c in scored if folds.get(c) == number} for number in numbers]
    classes = []
    for (name, value), by_case in dice.items():
        by_fold = tuple(_mean_of([by_case.get(c) for c in cases]) for cases in members)
        mean, std = _mean_of(by_fold), _std_of(by_fold)
        classes.append(
            ClassOverFolds(
                class_name=name, value=value, by_fold=by_fold, mean_dice=mean, std_dice=std
            )
        )
    overall = tuple(_mean_of([c.by_fold[i] for c in classes]) for i in range(len(numbers)))
    return CrossValidation(
        folds=tuple(numbers),
        num_cases=tuple(map(len, members)),
        classes=tuple(classes),
        by_fold=overall,
        mean_dice=_mean_of(overall),
        std_dice=_std_of(overall),
    )


def _mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of those that are there; None of none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _std_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.std(known)) if known else None
