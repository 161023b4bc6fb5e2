"""What ``volseg predict`` does: which cases, with which folds of the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from volseg.cores import count_cores
from volseg.data.cases import Case, Dataset
from volseg.data.splits import Split, forget_folds, read_splits, remember_folds
from volseg.errors import ConfigError
from volseg.inference.backends import BackendName
from volseg.inference.batch import BatchResult, Outputs, Work, predict_cases
from volseg.inference.inputs import find_inputs, select_shard
from volseg.inference.model import Checkpoint, check_same_split, read_facts, trained_folds
from volseg.inference.options import Options
from volseg.inference.precision import PrecisionName
from volseg.progress import show_progress
from volseg.run_folder import DATASET_FILE, LAST, RunFolder, select_cases

_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}
"""Of 1000, or of 1024 in KiB, MiB and so on."""


@dataclass(frozen=True)
class Request:
    """What was typed behind ``volseg predict``; see `volseg.cli.options` for each word."""

    model: Path
    output: Path
    other_models: Sequence[Path] | None = None
    inputs: Sequence[Path] | None = None
    more: Sequence[Path] | None = None
    validation: bool = False
    fold: int | None = None
    checkpoint: Checkpoint = "last"
    suffix: str | None = None
    probabilities: bool = False
    uncertainty: bool = False
    largest: Sequence[str] | None = None
    min_volume: Sequence[str] | None = None
    mirror: bool = False
    step: float = 0.5
    overwrite: bool = False
    roi: Path | None = None
    roi_margin: float = 20.0
    network: str | None = None
    device: str = "auto"
    backend: BackendName = "auto"
    precision: PrecisionName = "auto"
    memory: str | None = None
    threads: int | None = None
    shard: str | None = None
    ray: str | None = None

    def run(self) -> BatchResult:
        """Predict; see `predict_inputs` and `predict_validation`."""
        set_threads(self.threads)
        return predict_validation(self) if self.validation else predict_inputs(self)

    @property
    def images(self) -> list[Path]:
        """Files and folders, with or without ``-i``."""
        return [*(self.inputs or ()), *(self.more or ())]

    @property
    def folds(self) -> tuple[int, ...] | None:
        """The one that was asked for; None for all that were trained."""
        return None if self.fold is None else (self.fold,)

    def make_options(self) -> Options:
        """How the model predicts.

        Raises:
            ConfigError: a word has no meaning.
        """
        return Options(
            mirror=self.mirror,
            step=self.step,
            largest=tuple(self.largest or ()),
            least_ml=parse_least(self.min_volume or ()),
            backend=self.backend,
            precision=self.precision,
            memory_gb=parse_memory(self.memory),
        )

    def make_work(self) -> Work:
        """The same for whichever process does it."""
        return Work(
            models=tuple(path.resolve() for path in (self.model, *(self.other_models or ()))),
            outputs=Outputs(
                self.output.resolve(),
                suffix=self.suffix,
                probabilities=self.probabilities,
                uncertainty=self.uncertainty,
                overwrite=self.overwrite,
            ),
            load={
                "device": self.device,
                "folds": self.folds,
                "checkpoint": self.checkpoint,
                "options": self.make_options(),
            },
            roi=self.roi and self.roi.resolve(),
            roi_margin_mm=self.roi_margin,
            network=self.network,
        )


def format_result(result: BatchResult, output: Path) -> str:
    """One line for the terminal."""
    kept = f", {len(result.kept)} kept from before" if result.kept else ""
    return f"{len(result.written)} written to {output}{kept}, {len(result.failed)} failed."


def parse_memory(text: str | None) -> float | None:
    """GB of a size as people write it: ``8GB``, ``500 MB``, ``8GiB``.

    Raises:
        ConfigError: no such size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([\d.]+)\s*(?:([KMGT])(i?)B?)?", text.strip(), re.IGNORECASE)
    try:
        amount = float(match[1]) if match else 0.0
    except ValueError:
        amount = 0.0
    if not match or amount <= 0:
        raise ConfigError(f"--memory {text}; expected a size, as in 8GB or 500MB.")
    factor = 1024.0 if match[3] else 1000.0
    return amount * factor ** _POWERS[(match[2] or "G").upper()] / 1e9


def parse_least(words: Sequence[str]) -> dict[str, float]:
    """Volumes by class, of words such as ``tumour=0.5``.

    Raises:
        ConfigError: a word of another form.
    """
    found = {}
    for word in words:
        name, equals, volume = word.rpartition("=")
        try:
            found[name] = float(volume)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise ConfigError(f"--min-volume {word}; expected CLASS=ML, as in tumour=0.5.")
    return found


def set_threads(threads: int | None) -> None:
    """Compute with so many CPU threads; by default no more than the cores that there are for it.

    Raises:
        ConfigError: less than one.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads {threads}; expected 1 or more.")
    import torch

    # torch counts the cores of the machine, also in a container that may use a few.
    torch.set_num_threads(threads or min(torch.get_num_threads(), count_cores()))


def predict_inputs(request: Request) -> BatchResult:
    """Predict files and folders.

    Raises:
        ConfigError: nothing to predict, or outputs exist that were made otherwise.
    """
    if not request.images:
        raise ConfigError("no images; expected -i FILE or -i FOLDER, or --validation for a run.")
    plan = read_facts(request.model).plan
    cases = find_inputs(request.images, plan.channel_names, plan.optional_channels)
    result = _predict(request, cases)
    forget_folds(request.output, result.written)
    return result


def predict_validation(request: Request) -> BatchResult:
    """Predict the validation cases of a run, each with the fold that did not train on it.

    Which fold that was is written beside the predictions, for `volseg.evaluation`.

    Raises:
        ConfigError: the model is no run folder, images were given too, or a case validates several
            folds.
    """
    model = request.model
    if request.images:
        raise ConfigError("--validation predicts the run's own cases; leave the images out.")
    if request.shard is not None or request.other_models:
        raise ConfigError(
            "--validation with --shard or --with; expected one job and one run, whose folds it "
            "writes down. Leave them out; --fold with an output folder for each makes several jobs."
        )
    run = RunFolder(model)
    if not run.splits.exists():
        raise ConfigError(f"{run.splits} does not exist; --validation needs a run folder.")
    dataset = Dataset.read_json(model / DATASET_FILE)
    splits = read_splits(run.splits, dataset.cases)
    result = BatchResult()
    folds = request.folds or trained_folds(model, request.checkpoint)
    if not folds or max(folds) >= len(splits):
        raise ConfigError(
            f"{model} has trained folds {folds} and {len(splits)} splits; expected a trained fold "
            "and its split. Train first, or restore splits.json."
        )
    _check_once(splits, folds)
    for fold in folds:
        if not splits[fold].validation:
            raise ConfigError(
                f"{run.splits}: no case validates fold {fold}; expected some to predict. Give "
                "images instead of --validation."
            )
        check_same_split(run.fold(fold) / LAST, splits[fold])
    for fold in folds:
        cases = select_cases(dataset, splits[fold].validation)
        part = _predict(replace(request, fold=fold), cases)
        remember_folds(request.output, {**part.written, **part.kept}, fold)
        result.add(part)
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


def _predict(request: Request, cases: Sequence[Case]) -> BatchResult:
    cases = select_shard(cases, request.shard)
    work = request.make_work()
    with show_progress("Predicting") as update:
        if request.ray is None:
            predictor = work.make_predictor()
            return predict_cases(predictor, cases, work.outputs, update)
        from volseg.inference.cluster import Cluster, predict_on_cluster

        cluster = Cluster(request.ray, request.threads or Cluster.cpus)
        return predict_on_cluster(cluster, work, [_anywhere(case) for case in cases], update)


def _anywhere(case: Case) -> Case:
    """A case whose paths mean the same in another process."""
    images = tuple(path and path.resolve() for path in case.images)
    return case.model_copy(update={"images": images, "label": None})
