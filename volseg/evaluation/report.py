"""Scores of predictions on a dataset as files for people: montage and ``report.html``.

The page is one file with its pictures inside and no script; names from the data are escaped.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from volseg.atomic import write_text
from volseg.data.cases import Dataset
from volseg.evaluation.evaluate import ClassSummary, Evaluation, evaluate, find_labels
from volseg.evaluation.folds import CrossValidation
from volseg.evaluation.pictures import SOFT_TISSUE_WINDOW_HU, draw_montage, pick_cases, read_panel

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
"""


def score_dataset(predictions: Path, dataset: Dataset, output: Path) -> Evaluation:
    """Score `predictions` of cases of `dataset`; writes scores, ``montage.png``, ``report.html``.

    Args:
        predictions: folder of label maps named by case id.
        dataset: gives references, images and class names.
        output: folder.

    Raises:
        DataError: no prediction matches a labelled case.
    """
    labels = {case.case_id: case.label for case in dataset.cases if case.label is not None}
    annotated = {c.case_id: c.annotated for c in dataset.cases if c.annotated is not None}
    evaluation = evaluate(predictions, labels, output, dataset.classes, annotated)
    if _draw_cases(evaluation, predictions, dataset, output / "montage.png"):
        write_report(output / "report.html", dataset, evaluation, [output / "montage.png"])
    else:
        write_report(output / "report.html", dataset, evaluation, [])
    return evaluation


def _draw_cases(evaluation: Evaluation, predictions: Path, dataset: Dataset, path: Path) -> bool:
    """Worst, median and best case, if their images are there; False if there is nothing to draw."""
    cases = {case.case_id: case for case in dataset.cases}
    files, dice = find_labels(predictions), evaluation.mean_dice_by_case()
    panels, has_first = [], True
    for case_id in pick_cases(evaluation):
        case = cases[case_id]
        image = next((file for file in case.files if file.is_file()), None)
        if image is not None and case.label is not None:
            has_first = has_first and image == case.images[0]
            panels.append(read_panel(case_id, dice[case_id], image, files[case_id], case.label))
    if panels:
        is_ct = has_first and dataset.channels[0].upper() in ("CT", "HU")
        draw_montage(path, panels, dataset.classes, SOFT_TISSUE_WINDOW_HU if is_ct else None)
    return bool(panels)


def write_report(
    path: Path, dataset: Dataset, evaluation: Evaluation, pictures: Sequence[Path]
) -> None:
    """Write the page.

    Args:
        path: ``report.html``.
        dataset: its name leads the page.
        evaluation: scores by class and by case.
        pictures: PNG files, embedded in this order.
    """
    summary = evaluation.summary
    mean = _number(summary.mean_dice)
    classes = [_class_row(row) for row in summary.classes]
    dice = sorted(evaluation.mean_dice_by_case().items(), key=lambda item: item[1])
    cases = [(case_id, _number(value)) for case_id, value in dice]
    images = "\n".join(_embed(picture) for picture in pictures)
    notes = [f"{len(summary.missing)} references have no prediction and are not scored."]
    notes = notes if summary.missing else []
    notes += [f"{case_id} failed: {reason}" for case_id, reason in summary.failed.items()]
    name = html.escape(dataset.name)
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style></head>
<body>
<h1>{name}</h1>
<p>Mean Dice {mean} over {len(summary.classes)} classes and {summary.num_cases} cases.
A class that is absent from both prediction and reference of a case is not counted there.</p>
{_table(("class", "mean Dice", "std", "median", "cases", "absent"), classes)}
{_folds_table(summary.cross_validation)}
{images}
{"".join(f"<p>{html.escape(note)}</p>" for note in notes)}
<h2>Cases</h2>
{_table(("case", "mean Dice"), cases)}
</body></html>
"""
    write_text(path, text)


def _folds_table(scores: CrossValidation | None) -> str:
    if scores is None:
        return ""
    header = ("class", "mean of folds", "std", *(f"fold {number}" for number in scores.folds))
    rows = [
        (row.class_name, *map(_number, (row.mean_dice, row.std_dice, *row.by_fold)))
        for row in scores.classes
    ]
    rows.append(("mean", *map(_number, (scores.mean_dice, scores.std_dice, *scores.by_fold))))
    return f"<h2>Folds</h2>{_table(header, rows)}"


def _class_row(row: ClassSummary) -> tuple[str, ...]:
    values = (row.mean_dice, row.std_dice, row.median_dice)
    counts = (row.num_cases, row.num_empty)
    return (row.class_name, *map(_number, values), *map(str, counts))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f"<table>{line(header, 'th')}\n{body}</table>"


def _embed(picture: Path) -> str:
    data = base64.b64encode(picture.read_bytes()).decode()
    return f'<p><img alt="{html.escape(picture.stem)}" src="data:image/png;base64,{data}"></p>'
