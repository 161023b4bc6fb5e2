"""What is wrong with a dataset, file by file, with the cure.

Takes a `Dataset`, reads every image and label once, gives a list of `Finding` in case order.
Nothing is changed. A dataset that cannot even be listed is refused by `find_dataset` before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mode
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from volseg.config import Record
from volseg.cores import count_readers
from volseg.data.cases import Case, Dataset
from volseg.errors import DataError
from volseg.geometry import Geometry
from volseg.images import read_image, read_labels

LARGEST_SPACING_RATIO = 3.0
"""A case whose voxels are this many times larger or smaller than usual is resampled so much that
its header is more often wrong than right."""


class Finding(Record):
    """One problem of one file. An error stops a training; a warning asks for a look."""

    case_id: str
    file: Path
    severity: Literal["error", "warning"]
    problem: str
    cure: str


@dataclass
class _Checked:
    """What is kept of a case once its arrays are dropped."""

    case: Case
    findings: list[Finding] = field(default_factory=list)
    geometry: Geometry | None = None
    num_channels: int = 0

    def add(
        self, severity: Literal["error", "warning"], file: Path, problem: str, cure: str
    ) -> None:
        self.findings.append(
            Finding(
                case_id=self.case.case_id,
                file=file,
                severity=severity,
                problem=problem,
                cure=cure,
            )
        )


def check_dataset(
    dataset: Dataset, on_case: Callable[[int, int], None] | None = None
) -> list[Finding]:
    """Read every file of `dataset` and report what would spoil a training.

    Memory: one file at a time for each processor.

    Args:
        dataset: labelled and unlabelled cases are checked.
        on_case: called with the numbers of checked and of all cases after each case.

    Returns:
        Findings in case order; an empty list if all is well.
    """
    cases = (*dataset.cases, *dataset.unlabelled)
    checked = []
    pool = ThreadPoolExecutor(count_readers())
    try:
        for case in pool.map(partial(_check_case, dataset=dataset), cases):
            checked.append(case)
            if on_case is not None:
                on_case(len(checked), len(cases))
    finally:
        pool.shutdown(cancel_futures=True)
    _compare_cases(checked)
    return [finding for case in checked for finding in case.findings]


def _check_case(case: Case, dataset: Dataset) -> _Checked:
    checked = _Checked(case)
    for path in case.files:
        _check_image(checked, path)
    # Those that the case may lack.
    checked.num_channels += len(case.images) - len(case.files)
    if not checked.findings and checked.num_channels != len(dataset.channels):
        checked.add(
            "error",
            case.files[0],
            f"{checked.num_channels} channels; expected {len(dataset.channels)} "
            f"({', '.join(dataset.channels)})",
            "Give every case the same channels.",
        )
    if case.label is not None:
        _check_label(checked, case.label, dataset)
    return checked


def _check_image(checked: _Checked, path: Path) -> None:
    try:
        image = read_image(path)
    except DataError as error:
        checked.add("error", path, _reason(error, path), "Restore the file or remove the case.")
        return
    checked.num_channels += len(image.array)
    for channel, values in enumerate(image.array):
        if values.min() == values.max():
            where = f"channel {channel} of the image" if len(image.array) > 1 else "the image"
            checked.add(
                "warning",
                path,
                f"{where} has the value {values.flat[0]:g} everywhere",
                "Look at the file; remove the case if the image is lost.",
            )
    if checked.geometry is None:
        checked.geometry = image.geometry
    elif mismatch := _describe_mismatch(image.geometry, checked.geometry):
        checked.add(
            "error",
            path,
            f"{mismatch} to {checked.case.files[0].name}; expected all channels on one grid",
            "Resample it onto the grid of the first channel.",
        )


def _check_label(checked: _Checked, path: Path, dataset: Dataset) -> None:
    try:
        label = read_labels(path)
    except DataError as error:
        checked.add("error", path, _reason(error, path), "Restore the file or remove the case.")
        return
    geometry = checked.geometry
    if geometry and (mismatch := _describe_mismatch(label.geometry, geometry)):
        checked.add(
            "error",
            path,
            f"{mismatch} to the image; expected image and label on one grid",
            "Resample the label onto the image with nearest neighbour, or correct its header.",
        )
    _check_values(checked, path, label.array, dataset)


def _check_values(checked: _Checked, path: Path, array: NDArray[Any], dataset: Dataset) -> None:
    classes = dataset.classes
    values = set(np.unique(array).tolist())
    if unknown := sorted(values - set(classes.known_values)):
        expected = ", ".join(
            f"{value} {name}" for value, name in zip(classes.values, classes.names, strict=True)
        )
        checked.add(
            "error",
            path,
            f"label values {unknown[:5]}; expected only {expected}",
            "Correct the label or declare the class.",
        )
    elif not values & set(classes.values[1:]):
        checked.add(
            "warning",
            path,
            f"the label is {classes.names[0]} everywhere"
            + (" that was annotated" if classes.ignore in values else ""),
            "Look at the file; keep it only if nothing is to be found in this case.",
        )


def _reason(error: DataError, path: Path) -> str:
    """The message without the file's name, which the finding carries itself."""
    return str(error).removeprefix(f"{path}: ").removeprefix(f"{path} ")


def _describe_mismatch(geometry: Geometry, reference: Geometry) -> str:
    """How `geometry` differs from `reference`; empty if both are the same grid."""
    if geometry.shape != reference.shape:
        return f"shape {geometry.shape} differs from {reference.shape}"
    if geometry.is_same_grid(reference):
        return ""
    return f"the grid lies up to {geometry.distance_mm(reference):.3g} mm away"


def _compare_cases(checked: Sequence[_Checked]) -> None:
    """Add findings that only show beside the other cases: number of axes, unusual spacing."""
    spacings = {id(case): _canonical_spacing(case.geometry) for case in checked if case.geometry}
    if not spacings:
        return
    usual_dims = mode(len(spacing) for spacing in spacings.values())
    usual = np.median([s for s in spacings.values() if len(s) == usual_dims], axis=0)
    for case in checked:
        spacing = spacings.get(id(case), ())
        if spacing and len(spacing) != usual_dims:
            case.add(
                "error",
                case.case.files[0],
                f"{len(spacing)} axes; expected {usual_dims} as in the other cases",
                "Remove the case, or train pictures and volumes apart.",
            )
        elif spacing and max(np.maximum(spacing / usual, usual / spacing)) > LARGEST_SPACING_RATIO:
            case.add(
                "warning",
                case.case.files[0],
                f"voxels of {_join(spacing)} mm; the dataset's median is {_join(usual)} mm",
                "Correct the header if it is wrong, or remove the case.",
            )


def _canonical_spacing(geometry: Geometry) -> tuple[float, ...]:
    """Spacing in mm along right, anterior and superior, so that scans of any order compare."""
    no_voxels = np.broadcast_to(np.uint8(0), geometry.shape)
    return geometry.to_canonical(no_voxels)[1].spacing_mm


def _join(spacing_mm: Iterable[float]) -> str:
    return " x ".join(f"{size:.3g}" for size in spacing_mm)
