"""What ``volseg predict`` does: which cases, with which folds of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from volseg.data.cases import Case, Dataset
from volseg.data.splits import Split, forget_folds, read_splits, remember_folds
from volseg.errors import ConfigError
from volseg.inference import Predictor
from volseg.inference.batch import BatchResult, predict_cases
from volseg.inference.inputs import find_inputs
from volseg.inference.model import Checkpoint, trained_folds
from volseg.progress import show_progress
from volseg.run_folder import DATASET_FILE, RunFolder, select_cases


@dataclass(frozen=True)
class PredictOptions:
    """Options of ``volseg predict`` as they were typed."""

    output: Path
    folds: tuple[int, ...] | None = None
    checkpoint: Checkpoint = "last"
    suffix: str | None = None
    probabilities: bool = False
    overwrite: bool = False
    mirror: bool = False
    device: str = "auto"


def predict_inputs(model: Path, images: Sequence[Path], options: PredictOptions) -> BatchResult:
    """Predict files and folders.

    Raises:
        ConfigError: nothing to predict, or outputs exist.
    """
    if not images:
        raise ConfigError("no images; expected -i FILE or -i FOLDER, or --validation for a run.")
    predictor = _load(model, options)
    plan = predictor.model.facts.plan
    cases = find_inputs(images, len(plan.channel_names), plan.optional_channels)
    result = _predict(predictor, cases, options)
    forget_folds(options.output, result.written)
    return result


def predict_validation(model: Path, images: Sequence[Path], options: PredictOptions) -> BatchResult:
    """Predict the validation cases of a run, each with the fold that did not train on it.

    Which fold that was is written beside the predictions, for `volseg.evaluation`.

    Raises:
        ConfigError: `model` is no run folder, images were given too, or a case validates several
            folds.
    """
    if images:
        raise ConfigError("--validation predicts the run's own cases; leave the images out.")
    run = RunFolder(model)
    if not run.splits.exists():
        raise ConfigError(f"{run.splits} does not exist; --validation needs a run folder.")
    dataset = Dataset.read_json(model / DATASET_FILE)
    splits = read_splits(run.splits, dataset.cases)
    result = BatchResult({}, {})
    folds = options.folds or trained_folds(model, options.checkpoint)
    if not folds or max(folds) >= len(splits):
        raise ConfigError(
            f"{model} has trained folds {folds} and {len(splits)} splits; expected a trained fold "
            "and its split. Train first, or restore splits.json."
        )
    _check_once(splits, folds)
    for fold in folds:
        fold_options = replace(options, folds=(fold,))
        cases = select_cases(dataset, splits[fold].validation)
        part = _predict(_load(model, fold_options), cases, fold_options)
        remember_folds(options.output, part.written, fold)
        result.written.update(part.written)
        result.failed.update(part.failed)
    return result


def _check_once(splits: Sequence[Split], folds: Sequence[int]) -> None:
    """Refuse folds that would write the same file."""
    fold_of: dict[str, int] = {}
    for fold in folds:
        for case_id in splits[fold].validation:
            if (other := fold_of.setdefault(case_id, fold)) != fold:
                raise ConfigError(
                    f"case '{case_id}' validates folds {other} and {fold}; expected one of them. "
                    "Predict each with --fold into a folder of its own."
                )


def _load(model: Path, options: PredictOptions) -> Predictor:
    return Predictor.load(
        model,
        device=options.device,
        folds=options.folds,
        checkpoint=options.checkpoint,
        mirror=options.mirror,
    )


def _predict(predictor: Predictor, cases: Sequence[Case], options: PredictOptions) -> BatchResult:
    with show_progress("Predicting") as update:
        return predict_cases(
            predictor,
            cases,
            options.output,
            suffix=options.suffix,
            probabilities=options.probabilities,
            overwrite=options.overwrite,
            on_case=update,
        )
