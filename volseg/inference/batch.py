"""Many cases to one folder of label maps: a bad case is reported, the others go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from volseg.data.cases import Case
from volseg.errors import ConfigError, DataError
from volseg.images import is_picture
from volseg.inference.predictor import Predictor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchResult:
    """Files written, and the message of every case that failed, by case id."""

    written: dict[str, Path]
    failed: dict[str, str]


def predict_cases(
    predictor: Predictor,
    cases: Sequence[Case],
    output: Path,
    *,
    suffix: str | None = None,
    probabilities: bool = False,
    overwrite: bool = False,
    on_case: Callable[[int, int], None] | None = None,
) -> BatchResult:
    """Write a label map of every case into `output`, each whole or not at all.

    It is named ``<case_id>.png`` for a picture and ``<case_id>.nii.gz`` for anything else.

    Args:
        predictor: a loaded model.
        cases: their labels are not read.
        output: folder; made if missing.
        suffix: of all label maps instead, which chooses the format.
        probabilities: also write ``<case_id>_probabilities``, of a picture as ``.nrrd``.
        overwrite: replace files that exist; an input image is never replaced.
        on_case: called with (cases done, cases in all).

    Raises:
        ConfigError: an output exists already and `overwrite` is off, or is an input.
    """
    largest = predictor.model.facts.classes.dtype
    suffixes = {case.case_id: suffix or _choose_suffix(case, largest) for case in cases}
    targets = {name: output / f"{name}{ending}" for name, ending in suffixes.items()}
    maps = {
        name: output / f"{name}_probabilities{'.nrrd' if is_picture(ending) else ending}"
        for name, ending in suffixes.items()
        if probabilities
    }
    _refuse_overwriting(cases, [*targets.values(), *maps.values()], overwrite)
    result = BatchResult({}, {})
    for done, case in enumerate(cases, start=1):
        target = targets[case.case_id]
        try:
            segmentation = predictor(case.images, probabilities=probabilities)
        except DataError as error:
            logger.error("%s: %s", case.case_id, error)
            result.failed[case.case_id] = str(error)
        else:
            if probabilities:
                segmentation.save_probabilities(maps[case.case_id])
            segmentation.save(target)
            result.written[case.case_id] = target
        if on_case:
            on_case(done, len(cases))
    return result


def _choose_suffix(case: Case, dtype: np.dtype[Any]) -> str:
    """The format of a case's images, if it holds label values of a type."""
    if not all(is_picture(path.name) for path in case.files):
        return ".nii.gz"
    return ".png" if np.can_cast(dtype, np.uint16) else ".tif"


def _refuse_overwriting(cases: Sequence[Case], targets: Sequence[Path], overwrite: bool) -> None:
    inputs = {image.resolve() for case in cases for image in case.files}
    for target in targets:
        if target.resolve() in inputs:
            raise ConfigError(
                f"{target} is an input image; expected an output folder of its own. Change -o."
            )
        if target.exists() and not overwrite:
            raise ConfigError(
                f"{target} exists; nothing was written. Choose another folder, or --overwrite."
            )
