"""Many cases to one folder of label maps: a bad case is reported, the others go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from volseg.data.cases import Case
from volseg.errors import ConfigError, DataError
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
    suffix: str = ".nii.gz",
    probabilities: bool = False,
    overwrite: bool = False,
    on_case: Callable[[int, int], None] | None = None,
) -> BatchResult:
    """Write ``<case_id><suffix>`` into `output` for every case, each whole or not at all.

    Args:
        predictor: a loaded model.
        cases: their labels are not read.
        output: folder; made if missing.
        suffix: of the label maps, which chooses the format.
        probabilities: also write ``<case_id>_probabilities<suffix>``.
        overwrite: replace files that exist; an input image is never replaced.
        on_case: called with (cases done, cases in all).

    Raises:
        ConfigError: an output exists already and `overwrite` is off, or is an input.
    """
    targets = {case.case_id: output / f"{case.case_id}{suffix}" for case in cases}
    maps = {
        case.case_id: output / f"{case.case_id}_probabilities{suffix}"
        for case in cases
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
