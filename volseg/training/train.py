"""`train`: the whole way from a dataset folder to a run folder that predicts."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from volseg.allocation import keep_freed_memory
from volseg.config import DEFAULT_MINUTES, Config, with_length
from volseg.data.augmentation import Augmentation
from volseg.data.cache import CachedCase, build_cache
from volseg.data.cases import Dataset
from volseg.data.layouts import find_dataset
from volseg.data.patches import Batches, PatchDataset, make_loader
from volseg.data.splits import Split, write_splits
from volseg.errors import ConfigError
from volseg.inference.model import build_planned_network, choose_device
from volseg.networks import ResNetUNet, inside_slices
from volseg.networks.memory import recompute_
from volseg.planning import Fingerprint, Machine, Plan, find_contradiction, write_plan
from volseg.planning.architectures import choose_supervision
from volseg.planning.cost import compute_cost
from volseg.progress import show_progress
from volseg.run_folder import (
    LAST,
    RunFolder,
    extend_fold,
    open_fold,
    open_run,
    open_splits,
    select_cases,
)
from volseg.training.budget import Budget
from volseg.training.checkpoints import Checkpoints
from volseg.training.checks import check_network, check_training
from volseg.training.engine import (
    Learner,
    attach_checkpoints,
    attach_counting,
    create_trainer,
    make_learner,
    stop_on_interrupt,
)
from volseg.training.extension import check_finished, extend
from volseg.training.history import History, read_step_seconds
from volseg.training.loggers import check_loggers, open_loggers
from volseg.training.loss import make_loss
from volseg.training.machine import measure_machine
from volseg.training.pace import Pace
from volseg.training.parallel import (
    agree_on,
    check_batch,
    count_processes,
    first_then_others,
    get_rank,
    is_first,
    is_restart,
    join,
    share_gradients,
)
from volseg.training.precision import choose_precision, compile_network
from volseg.training.rounds import Validator, attach_bar, attach_rounds, choose_validation
from volseg.training.transfer import adapt_plan, freeze, transfer_weights

logger = logging.getLogger(__name__)

ROUNDS_BY_TIME = 25
"""Rows of history of a training whose length is given in minutes."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What all folds of a run share."""

    run: RunFolder
    dataset: Dataset
    plan: Plan
    splits: Sequence[Split]
    config: Config
    step_seconds: float
    device: torch.device
    extends: bool = False
    """Whether finished folds are given the length that `config` says."""


def train(
    dataset: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    config: Config | None = None,
    minutes: float | None = None,
    epochs: int | None = None,
    fold: int | str = 0,
    resume: bool = False,
    device: str = "auto",
) -> Path:
    """Train on a dataset folder; returns the run folder, ready for `volseg.Predictor.load`.

    Args:
        dataset: a folder or datalist in any layout that `volseg check` accepts.
        output: the run folder, new or holding a run on the same dataset. A ``plan.yaml`` in it
            is used as it stands.
        config: everything else; see `volseg.config.Config`.
        minutes: length by wall-clock time, validations included.
        epochs: length by number of epochs instead.
        fold: which part of the cases validates, or ``"all"`` for every fold in turn.
        resume: go on with a training that was stopped, with the configuration it began with; with
            `minutes` or `epochs`, extend one that has come to its end by so much.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: contradicting options, a folder that holds another run, or an extension of what
            has not come to its end.
        DataError: the dataset cannot be used.
        MachineError: no such device, or the disk is full.
    """
    if is_restart() and any(Path(output).glob(f"fold_*/{LAST}")):
        # torchrun repeats the command, whose options are in the folder by now.
        resume, config, minutes, epochs = True, None, None, None
    extends = resume and (minutes is not None or epochs is not None)
    if resume:
        config = resumed_config(Path(output), config or Config())
    config = with_length(config or Config(), minutes, epochs)
    check_loggers(config.training.log)
    keep_freed_memory()
    with join(choose_device(device)) as own:
        prepare = partial(prepare_training, Path(dataset), Path(output), config, own, resume)
        setting = first_then_others(prepare)
        step_seconds = agree_on(setting.step_seconds)
        setting = replace(setting, step_seconds=step_seconds, extends=extends)
        check_batch(setting.plan.batch_size)
        folds = choose_folds(fold, len(setting.splits))
        if extends:
            check_finished(setting.run, folds)
        for number in folds:
            has_begun = (setting.run.fold(number) / LAST).exists()
            goes_on = resume and (has_begun or fold != "all")
            if not train_fold(setting, number, goes_on):
                break
    return setting.run.path


def resumed_config(output: Path, config: Config) -> Config:
    """The configuration that the run in `output` began with, for its folds not yet begun too.

    Raises:
        ConfigError: other options were given, which a resumed training could not follow.
    """
    if config != Config():
        raise ConfigError(
            "a resumed training keeps the configuration it began with; expected no other option "
            "than a length, which extends a finished one. Leave them out, or edit config.yaml in "
            "the folder of the fold."
        )
    begun = sorted(output.glob("fold_*/config.yaml"))
    return Config.read_yaml(begun[0]) if begun else config


def choose_folds(fold: int | str, num_folds: int) -> list[int]:
    """The folds to train: one number, or ``all``.

    Raises:
        ConfigError: no such fold.
    """
    if fold == "all":
        return list(range(num_folds))
    if not str(fold).isdigit() or int(fold) >= num_folds:
        raise ConfigError(f"fold {fold}; expected 0 to {num_folds - 1}, or all.")
    return [int(fold)]


def prepare_training(
    path: Path, output: Path, config: Config, device: torch.device, resume: bool = False
) -> Setting:
    """Find the cases, open the run, plan or take up the plan, split."""
    choose_supervision(config.network.name, config.network.deep_supervision)
    dataset = find_dataset(path, config.data.optional_channels).with_labels(config.data)
    for kept, other in dataset.classes.find_merged():
        logger.warning(
            "classes %s and %s are in the same regions: predictions will say %s for both",
            kept,
            other,
            kept,
        )
    precision = choose_precision(config.training.precision, device)
    run = open_run(output, dataset)
    splits = open_splits(run, dataset, config)
    measure = partial(measure_machine, device, precision=precision)
    if run.plan.exists():
        plan = _read_plan(run, dataset, config, resume)
        step_seconds = _find_speed(run) if resume else None
        if step_seconds is None:
            step_seconds = _predict_speed(plan, measure(plan.network_dims), dataset)
    else:
        check = partial(check_training, config=config, classes=dataset.classes)
        adapt = partial(_adapt, config=config)
        planned = write_plan(run, dataset, config, measure, check, adapt)
        plan = planned.plan
        step_seconds = _predict_speed(plan, planned.machine, dataset)
    if not run.splits.exists():
        write_splits(run.splits, splits)
    return Setting(run, dataset, plan, splits, config, step_seconds, device)


def _find_speed(run: RunFolder) -> float | None:
    """Seconds per step of any fold that has begun; None if none says."""
    found = (read_step_seconds(path) for path in run.path.glob("fold_*/history.jsonl"))
    return next((seconds for seconds in found if seconds), None)


def _predict_speed(plan: Plan, machine: Machine, dataset: Dataset) -> float:
    """Seconds per step, by the planned work and the speed of the machine."""
    num_channels, num_outputs = len(dataset.channels), dataset.classes.num_outputs
    cost = compute_cost(plan.network, plan.patch, num_channels, num_outputs)
    return cost.step_seconds(machine, plan.batch_size // count_processes() or 1)


def _adapt(plan: Plan, config: Config) -> Plan:
    """The plan with what another model brings along, and a batch for all processes."""
    if config.training.start_from is not None:
        plan = adapt_plan(plan, Path(config.training.start_from))
    if config.plan.batch_size is None:
        plan = plan.model_copy(update={"batch_size": plan.batch_size * count_processes()})
    return plan


def _read_plan(run: RunFolder, dataset: Dataset, config: Config, resume: bool) -> Plan:
    plan = Plan.read_yaml(run.plan)
    if plan.channel_names != dataset.channels:
        raise ConfigError(
            f"{run.plan}: channels {plan.channel_names}; expected {dataset.channels}, those of "
            f"{dataset.root}."
        )
    optional = {plan.channel_names[number] for number in plan.optional_channels}
    if optional != set(dataset.optional_channels):
        raise ConfigError(
            f"{run.plan}: optional channels {sorted(optional)}; expected "
            f"{sorted(dataset.optional_channels)}, those of the dataset. Correct the plan."
        )
    # A resumed training has the plan in its checkpoint.
    if not resume and (contradiction := find_contradiction(plan, config)):
        raise ConfigError(
            f"{run.plan} is there and the configuration contradicts its {contradiction}. Edit "
            "that file, or choose another folder to plan again."
        )
    try:
        check_network(plan, dataset.classes)
    except ConfigError as error:
        raise ConfigError(f"{run.plan}: {error}") from error
    if not resume:
        check_training(plan, config, dataset.classes)
    logger.info("plan: using %s", run.plan)
    return plan


def train_fold(setting: Setting, fold: int, resume: bool) -> bool:
    """Train one fold from its split to its last checkpoint; False if it was interrupted."""
    folder = setting.run.fold(fold)
    config = first_then_others(partial(_open_config, setting, fold, resume))
    train_cases, validation_cases = first_then_others(
        partial(_open_cases, setting, setting.splits[fold])
    )
    learner = _make_learner(setting, config, fold, resume)
    parts = _resumable_parts(learner)
    checkpoints = Checkpoints(folder, setting.plan, learner.average, parts, learner.counters)
    if resume:
        checkpoints.restore(setting.device)
        logger.info("resuming fold %d at step %d", fold, learner.counters.step)
    if setting.extends:
        config = _extend_fold(setting, config, fold, learner)
    if learner.is_complete:
        logger.info("fold %d is complete; nothing to do", fold)
        return True
    history = first_then_others(partial(History, folder / "history.jsonl", learner.counters.step))
    validator = _make_validator(setting, config, learner, validation_cases)
    if setting.extends and is_first():
        # A kill before the first round must not lose that it has begun.
        checkpoints.save_last()
    trainer, pace = create_trainer(learner), Pace(learner)
    pace.attach(trainer)
    num_rounds = config.training.epochs or ROUNDS_BY_TIME
    patience = config.training.patience
    attach_rounds(trainer, learner, checkpoints, history, validator, pace, num_rounds, patience)
    attach_counting(trainer, learner, num_rounds)
    attach_checkpoints(trainer, checkpoints)
    loader = _make_loader(setting, config, train_cases, learner.counters.step)
    _announce(pace, setting)
    with (
        show_progress(f"Training fold {fold}") as update,
        stop_on_interrupt(learner),
        open_loggers(trainer, config, history),
    ):
        attach_bar(trainer, learner, history, update)
        # The budget ends the training; ignite only needs a length that is never reached.
        trainer.run(loader, max_epochs=1, epoch_length=2**62)
    step, minutes = learner.counters.step, learner.counters.elapsed_s / 60
    logger.info("fold %d: %d steps in %.1f minutes (%s) -> %s", fold, step, minutes, pace, folder)
    return learner.is_complete


def _announce(pace: Pace, setting: Setting) -> None:
    """What the plan predicts, or what the steps before took in a training that goes on."""
    counters = pace.learner.counters
    if counters.step:
        pace.announce(counters.elapsed_s / counters.step, "as before")
    else:
        pace.announce(setting.step_seconds, "predicted")


def _extend_fold(setting: Setting, config: Config, fold: int, learner: Learner) -> Config:
    """Begin the extension of a finished fold; returns the fold's configuration from now on."""
    length = setting.config.training
    config = with_length(config, length.minutes, length.epochs)
    if is_first():
        extend_fold(setting.run, fold, config, learner.counters.extensions + 1)
    extend(learner, config.training)
    return config


def _open_config(setting: Setting, fold: int, resume: bool) -> Config:
    if is_first():
        return open_fold(setting.run, fold, setting.config, resume)
    return Config.read_yaml(setting.run.fold(fold) / "config.yaml")


def _make_validator(
    setting: Setting, config: Config, learner: Learner, cases: Sequence[CachedCase]
) -> Validator:
    """With the cases that were chosen when the training began, so that "best" keeps its meaning."""
    plan, counters = setting.plan, learner.counters
    rounds = config.training.epochs or ROUNDS_BY_TIME
    choose = partial(
        choose_validation,
        plan=plan,
        step_seconds=setting.step_seconds,
        training=config.training,
        num_rounds=rounds,
    )
    if not counters.validation:
        chosen, counters.validate_every = choose(cases)
        counters.validation = [case.case_id for case in chosen]
    kept = [case for case in cases if case.case_id in counters.validation]
    if setting.extends:
        _, counters.validate_every = choose(kept, keep_all=True)
    return Validator(kept, plan, setting.dataset.classes, setting.device)


def _make_loader(
    setting: Setting, config: Config, cases: Sequence[CachedCase], first_step: int
) -> Batches:
    plan = setting.plan
    classes, optional = setting.dataset.classes, plan.optional_channels
    patches = PatchDataset(
        cases,
        plan.patch,
        batch_size=plan.batch_size,
        foreground=config.training.foreground,
        augment=Augmentation(config.augmentation, plan.spacing_mm, classes, optional),
        seed=config.training.seed,
    )
    workers = _num_workers(config, setting.device)
    share = (get_rank(), count_processes())
    return make_loader(patches, first_step, workers, setting.device, share)


def _open_cases(setting: Setting, split: Split) -> tuple[list[CachedCase], list[CachedCase]]:
    dataset, plan, cache = setting.dataset, setting.plan, setting.run.cache
    wanted = select_cases(dataset, (*split.train, *split.validation))
    fingerprint = setting.run.fingerprint
    measured = Fingerprint.read_json(fingerprint).cases if fingerprint.exists() else ()
    with show_progress("Preparing cases") as update:
        prepared = build_cache(dataset, wanted, plan, cache, update, measured)
    cached = {case.case_id: case for case in prepared}
    logger.info(
        "cases: %d to train, %d to validate -> %s",
        len(split.train),
        len(split.validation),
        cache,
    )
    return [cached[i] for i in split.train], [cached[i] for i in split.validation]


def _make_learner(setting: Setting, config: Config, fold: int, resume: bool) -> Learner:
    """Network with weights that depend on seed and fold only, its loss and its budget."""
    training = config.training
    torch.manual_seed(training.seed * 100 + fold)
    network = build_planned_network(setting.plan, setting.dataset.classes.num_outputs)
    inner = inside_slices(network)
    if config.network.pretrained and not resume and isinstance(inner, ResNetUNet):
        inner.load_pretrained(config.network.pretrained)
    if training.start_from and not resume:
        source = Path(training.start_from)
        report = transfer_weights(network, setting.plan, setting.dataset.classes, source)
        logger.info("%s", report)
    freeze(network, config.optimizer.freeze)
    if training.epochs:
        budget = Budget(training.epochs * training.steps_per_epoch)
    else:
        minutes = training.minutes or DEFAULT_MINUTES
        budget = Budget(int(minutes * 60 / setting.step_seconds), minutes)
    loss = make_loss(
        config.loss,
        setting.plan.network.name,
        len(network.supervision_strides),
        setting.dataset.classes,
        setting.plan.spacing_mm,
    )
    if training.recompute:
        recompute_(network)
    precision = choose_precision(training.precision, setting.device)
    learner = make_learner(
        network, loss, setting.device, budget, config.optimizer, training.seed, precision
    )
    learner.counters.parts = training.parts
    learner.forward = share_gradients(network, setting.device)
    is_gpu = setting.device.type == "cuda"
    if is_gpu if training.compile is None else training.compile:
        learner.forward = compile_network(learner.forward)
    return learner


def _resumable_parts(learner: Learner) -> dict[str, object]:
    return {
        "network": learner.network,
        "optimizer": learner.optimizer,
        "scaler": learner.scaler,
        "budget": learner.budget,
    }


def _num_workers(config: Config, device: torch.device) -> int:
    """Loader processes pay off beside a GPU; beside a CPU they take the network's cores."""
    if config.training.workers is not None:
        return config.training.workers
    return 0 if device.type == "cpu" else max(1, min(8, (os.cpu_count() or 2) - 1))
