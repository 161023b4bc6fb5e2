"""What ``volseg evaluate`` does: which references belong to the predictions, and the table."""

from __future__ import annotations

import io
from pathlib import Path

from volseg.data.cases import Dataset
from volseg.data.layouts import find_dataset
from volseg.errors import ConfigError, DataError
from volseg.evaluation import Evaluation, evaluate
from volseg.evaluation.folds import CrossValidation
from volseg.evaluation.report import score_dataset
from volseg.images import IMAGE_SUFFIXES
from volseg.run_folder import DATASET_FILE, PLAN_FILE

_WRITTEN = ("summary.json", "metrics.csv", "montage.png", "report.html")


def score(predictions: Path, references: Path, output: Path, overwrite: bool = False) -> Evaluation:
    """Score a folder of predictions.

    Args:
        predictions: folder of label maps.
        references: a dataset, the run folder that was trained on one, or a folder of label files.
        output: folder for ``metrics.csv`` and ``summary.json``; for a dataset, whose images are
            known, also ``montage.png`` and ``report.html``.
        overwrite: replace scores that are there.

    Raises:
        ConfigError: `output` holds scores already.
        DataError: nothing matches.
    """
    there = [output / name for name in _WRITTEN if (output / name).exists()]
    if there and not overwrite:
        raise ConfigError(
            f"{there[0]} exists already; nothing was changed. Choose another folder, or "
            "--overwrite."
        )
    dataset = _find_references(references)
    if dataset is None:
        return evaluate(predictions, references, output)
    return score_dataset(predictions, dataset, output)


def _find_references(path: Path) -> Dataset | None:
    """The dataset at `path`; None if it is a folder of label files."""
    if (path / PLAN_FILE).is_file() and (path / DATASET_FILE).is_file():
        return Dataset.read_json(path / DATASET_FILE)
    if path.is_dir() and any(
        file.name.lower().endswith(tuple(IMAGE_SUFFIXES)) for file in path.iterdir()
    ):
        return None
    if not path.exists():
        raise DataError(f"{path} does not exist; expected a dataset or a folder of label maps.")
    # Whatever images a case lacks, its label is what counts.
    return find_dataset(path, None, complete=False)


def _format_folds(scores: CrossValidation) -> str:
    """Dice by class and fold as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("class", "mean of folds", "std", *(f"fold {n}" for n in scores.folds))
    for row in scores.classes:
        table.add_row(row.class_name, *map(_number, (row.mean_dice, row.std_dice, *row.by_fold)))
    table.add_section()
    table.add_row("mean", *map(_number, (scores.mean_dice, scores.std_dice, *scores.by_fold)))
    table.add_row("cases", "", "", *map(str, scores.num_cases))
    text = io.StringIO()
    Console(file=text, width=max(80, 50 + 10 * len(scores.folds))).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def format_summary(evaluation: Evaluation) -> str:
    """Dice by class as a table for the terminal, with what was not scored."""
    from rich.console import Console
    from rich.table import Table

    summary = evaluation.summary
    table = Table("class", "mean Dice", "std", "median", "cases", "absent")
    for row in summary.classes:
        values = (row.mean_dice, row.std_dice, row.median_dice)
        table.add_row(
            row.class_name,
            *map(_number, values),
            str(row.num_cases),
            str(row.num_empty),
        )
    table.add_section()
    table.add_row("mean", _number(summary.mean_dice), "", "", str(summary.num_cases), "")
    text = io.StringIO()
    Console(file=text, width=80).print(table)
    lines = [text.getvalue().rstrip()]
    if summary.cross_validation is not None:
        lines.append(_format_folds(summary.cross_validation))
    if summary.missing:
        lines.append(f"{len(summary.missing)} references have no prediction and are not scored.")
    if summary.unmatched:
        lines.append(f"{len(summary.unmatched)} predictions have no reference.")
    lines += [f"failed: {case_id}: {reason}" for case_id, reason in summary.failed.items()]
    return "\n".join(lines)
