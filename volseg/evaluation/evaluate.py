"""Scores a folder of predicted label files against their references.

Takes two folders (or a mapping of case ids to reference files), gives an `Evaluation`: one row per
case and class, and a summary. Written as ``metrics.csv`` and ``summary.json``.
Pictures are left to `volseg.evaluation.pictures`.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from volseg.atomic import write_text
from volseg.config import Record
from volseg.cores import count_readers
from volseg.data.cases import Classes
from volseg.data.splits import read_folds
from volseg.errors import DataError, VolsegError
from volseg.evaluation.folds import CrossValidation, summarise_folds
from volseg.evaluation.metrics import Overlap, compute_voxel_ml, count_overlap, count_overlaps
from volseg.images import IMAGE_SUFFIXES, image_stem, read_labels

logger = logging.getLogger(__name__)


class CaseClassMetrics(Record):
    """How well one class, or region, was found in one case: a row of ``metrics.csv``."""

    case_id: str
    class_name: str
    value: int | None
    """Value of the class in the label files; None for a region, which has several."""
    dice: float | None
    """None if the class is absent from both prediction and reference."""
    reference_voxels: int
    prediction_voxels: int
    reference_ml: float | None
    """None for pictures (2D)."""
    prediction_ml: float | None


class ClassSummary(Record):
    """Dice of one class, or region, over the cases."""

    class_name: str
    value: int | None
    mean_dice: float | None
    """None if no case counts."""
    std_dice: float | None
    """Population standard deviation."""
    median_dice: float | None
    num_cases: int
    """Cases that count: the class is in the prediction, the reference, or both."""
    num_empty: int
    """Cases left out, since the class is absent from both."""


class Summary(Record):
    """What ``summary.json`` holds."""

    mean_dice: float | None
    """Mean over classes of the mean over cases."""
    num_cases: int
    """Cases that were scored."""
    classes: tuple[ClassSummary, ...]
    missing: tuple[str, ...]
    """References without a prediction: not scored, and not in any mean."""
    unmatched: tuple[str, ...]
    """Predictions without a reference."""
    failed: dict[str, str]
    """Cases that could not be scored, with the reason: not in any mean."""
    cross_validation: CrossValidation | None = None
    """Where the predictions are of several folds, each of cases that it did not see."""


class Evaluation(Record):
    """Every row, and their summary."""

    rows: tuple[CaseClassMetrics, ...]
    summary: Summary

    def mean_dice_by_case(self) -> dict[str, float]:
        """Mean Dice over the classes of each case; cases without any class are left out."""
        values: dict[str, list[float]] = {}
        for row in self.rows:
            if row.dice is not None:
                values.setdefault(row.case_id, []).append(row.dice)
        return {case_id: float(np.mean(dice)) for case_id, dice in values.items()}

    def write(self, folder: Path) -> None:
        """Write ``metrics.csv`` and ``summary.json`` into `folder`, each whole or not at all."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [*CaseClassMetrics.model_fields], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.model_dump() for row in self.rows)
        write_text(folder / "metrics.csv", text.getvalue())
        self.summary.write_json(folder / "summary.json")


def evaluate(
    predictions: Path,
    references: Path | Mapping[str, Path],
    output: Path | None = None,
    classes: Classes | None = None,
    annotated: Mapping[str, Sequence[str]] | None = None,
) -> Evaluation:
    """Score predicted label files against references of the same case id.

    A case id is the file name without its image suffix. A case whose files cannot be read, lie on
    different grids or hold values of no class is reported in ``summary.failed``; the others are
    scored. A reference without a prediction is reported in ``summary.missing``: it is not scored
    as 0, so look there before comparing two means. Predictions of ``volseg predict --validation``
    say which fold made them, and are also summarised by fold.

    Args:
        predictions: folder of label files.
        references: folder of label files, or the reference file of each case id.
        output: folder for ``metrics.csv`` and ``summary.json``; None to write nothing.
        classes: names and values to score, the first being background; with regions, these are
            scored instead. By default every value found in any file other than 0, named by its
            value. Voxels that a reference leaves out (`ignore`) are not scored.
        annotated: by case id the classes that a reference shows, if not all; no other class, and
            no region with another class, is scored there.

    Raises:
        DataError: a folder is absent, holds two files for one case, or nothing matches.
    """
    predicted = find_labels(predictions)
    known = find_labels(references) if isinstance(references, Path) else dict(references)
    case_ids = sorted(predicted.keys() & known.keys())
    if not case_ids:
        raise DataError(_describe_no_match(predictions, predicted, known))
    pairs = [(predicted[case_id], known[case_id]) for case_id in case_ids]
    scored, failed = _score_all(case_ids, pairs, classes)
    rows = _make_rows(scored, classes or _find_classes(scored), annotated or {})
    summaries = _summarise(rows)
    summary = Summary(
        mean_dice=_mean([item.mean_dice for item in summaries if item.mean_dice is not None]),
        num_cases=len(scored),
        classes=summaries,
        missing=tuple(sorted(known.keys() - predicted.keys())),
        unmatched=tuple(sorted(predicted.keys() - known.keys())),
        failed=failed,
        cross_validation=summarise_folds(_dice_by_class(rows), read_folds(predictions)),
    )
    evaluation = Evaluation(rows=rows, summary=summary)
    if output is not None:
        evaluation.write(output)
        logger.info("evaluation: %d cases -> %s", len(scored), output)
    return evaluation


def find_labels(folder: Path) -> dict[str, Path]:
    """Label files in `folder` by case id, hidden files left out."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected a folder of label files. Correct it.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.lower().endswith(IMAGE_SUFFIXES):
            continue
        case_id = image_stem(path)
        if case_id in found:
            raise DataError(
                f"{found[case_id]} and {path.name} are both case '{case_id}'; expected one label "
                "file for each case. Remove one."
            )
        found[case_id] = path
    return found


def _describe_no_match(
    predictions: Path, predicted: Mapping[str, Path], known: Mapping[str, Path]
) -> str:
    if not predicted:
        return f"{predictions} holds no label files; expected files such as case_01.nii.gz."
    example = next(iter(sorted(known)), None)
    rule = f"names such as '{example}'" if example else "references, of which there are none"
    return (
        f"{predictions}: no prediction has a reference, the first is '{min(predicted)}'; "
        f"expected {rule}. Give both files of a case the same name."
    )


@dataclass(frozen=True)
class _Score:
    overlaps: dict[int, Overlap]
    regions: dict[str, Overlap]
    voxel_ml: float | None


def _score_all(
    case_ids: Sequence[str], pairs: Sequence[tuple[Path, Path]], classes: Classes | None
) -> tuple[dict[str, _Score], dict[str, str]]:
    """Scores by case id, and the message of each case that could not be scored."""

    def score(pair: tuple[Path, Path]) -> _Score | str:
        try:
            return _score_case(*pair, classes)
        except VolsegError as error:
            return str(error)

    with ThreadPoolExecutor(count_readers()) as readers:
        results = dict(zip(case_ids, readers.map(score, pairs), strict=True))
    scored = {case_id: result for case_id, result in results.items() if isinstance(result, _Score)}
    failed = {case_id: result for case_id, result in results.items() if isinstance(result, str)}
    return scored, failed


def _score_case(prediction: Path, reference: Path, classes: Classes | None) -> _Score:
    predicted, known = read_labels(prediction), read_labels(reference)
    if predicted.geometry.shape != known.geometry.shape:
        raise DataError(
            f"{prediction} has shape {predicted.geometry.shape} and {reference} has "
            f"{known.geometry.shape}; expected the same grid. Predict on the reference's image."
        )
    if not predicted.geometry.is_same_grid(known.geometry):
        distance_mm = predicted.geometry.distance_mm(known.geometry)
        raise DataError(
            f"{prediction} and {reference} lie {distance_mm:.3g} mm apart; expected the same grid. "
            "Predict on the reference's image, or correct one of the affines."
        )
    background = classes.values[0] if classes else 0
    found, wanted = predicted.array, known.array
    if classes and classes.ignore is not None:
        is_annotated = wanted != classes.ignore
        found, wanted = found[is_annotated], wanted[is_annotated]
    overlaps = count_overlaps(found, wanted, background)
    _check_values(prediction, reference, overlaps, classes)
    regions = {
        region.name: count_overlap(np.isin(found, region.values), np.isin(wanted, region.values))
        for region in (classes.regions if classes else ())
    }
    return _Score(overlaps, regions, compute_voxel_ml(known.geometry))


def _check_values(
    prediction: Path, reference: Path, overlaps: Mapping[int, Overlap], classes: Classes | None
) -> None:
    for value, overlap in overlaps.items():
        if classes and value not in classes.values:
            path = prediction if overlap.prediction_voxels else reference
            raise DataError(
                f"{path} holds label value {value}; expected only {sorted(classes.values)}. "
                "Correct the file or declare the class."
            )


def _find_classes(scored: Mapping[str, _Score]) -> Classes | None:
    """Every value found in any case, named by its value; None if there is none."""
    values = sorted({value for score in scored.values() for value in score.overlaps})
    if not values:
        return None
    return Classes(names=("background", *map(str, values)), values=(0, *values))


def _make_rows(
    scored: Mapping[str, _Score],
    classes: Classes | None,
    annotated: Mapping[str, Sequence[str]],
) -> tuple[CaseClassMetrics, ...]:
    """One row for each case and class but background, or region, cases in order."""
    if classes is None:
        return ()
    names = dict(zip(classes.values, classes.names, strict=True))
    scored_values: list[tuple[str, int | None, tuple[int, ...]]] = [
        (region.name, None, region.values) for region in classes.regions
    ] or [(name, value, (value,)) for value, name in [*names.items()][1:]]
    rows = []
    for case_id, score in scored.items():
        shown = annotated.get(case_id, classes.names)
        for name, value, members in scored_values:
            overlap = score.regions.get(name) if value is None else score.overlaps.get(value)
            if all(names[member] in shown for member in members):
                row = _make_row(case_id, name, value, overlap or Overlap(), score.voxel_ml)
                rows.append(row)
    return tuple(rows)


def _make_row(
    case_id: str, name: str, value: int | None, overlap: Overlap, voxel_ml: float | None
) -> CaseClassMetrics:
    is_empty = overlap.reference_voxels == overlap.prediction_voxels == 0
    return CaseClassMetrics(
        case_id=case_id,
        class_name=name,
        value=value,
        dice=None if is_empty else overlap.dice,
        reference_voxels=overlap.reference_voxels,
        prediction_voxels=overlap.prediction_voxels,
        reference_ml=None if voxel_ml is None else overlap.reference_voxels * voxel_ml,
        prediction_ml=None if voxel_ml is None else overlap.prediction_voxels * voxel_ml,
    )


def _dice_by_class(
    rows: Sequence[CaseClassMetrics],
) -> dict[tuple[str, int | None], dict[str, float | None]]:
    """By name and value of the class, then by case id."""
    by_class: dict[tuple[str, int | None], dict[str, float | None]] = {}
    for row in rows:
        by_class.setdefault((row.class_name, row.value), {})[row.case_id] = row.dice
    return by_class


def _summarise(rows: Sequence[CaseClassMetrics]) -> tuple[ClassSummary, ...]:
    by_class = _dice_by_class(rows)
    return tuple(_summarise_class(*key, [*dice.values()]) for key, dice in by_class.items())


def _summarise_class(name: str, value: int | None, dice: Sequence[float | None]) -> ClassSummary:
    counted = [item for item in dice if item is not None]
    return ClassSummary(
        class_name=name,
        value=value,
        mean_dice=_mean(counted),
        std_dice=float(np.std(counted)) if counted else None,
        median_dice=float(np.median(counted)) if counted else None,
        num_cases=len(counted),
        num_empty=len(dice) - len(counted),
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
