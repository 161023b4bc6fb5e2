"""`train`: the whole way from a dataset folder to a run folder that predicts."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from volseg.allocation import keep_freed_memory
from volseg.config import DEFAULT_MINUTES, Config, with_length
from volseg.cores import count_beside, count_cores
from volseg.data.augmentation import Augmentation
from volseg.data.cache import CachedCase, build_cache, remove_superseded
from volseg.data.mirroring import are_numbered
from volseg.data.patches import Batches, PatchDataset, make_loader
from volseg.errors import ConfigError
from volseg.inference.model import (
    build_planned_network,
    check_same_split,
    choose_device,
    count_steps,
)
from volseg.networks import ResNetUNet, choose_shape_device, inside_slices
from volseg.networks.memory import recompute_
from volseg.networks.weights import load_weights
from volseg.planning import Fingerprint
from volseg.progress import show_progress
from volseg.run_folder import (
    LAST,
    RunFolder,
    extend_fold,
    hold_fold,
    is_trained_besides,
    name_config_before,
    open_fold,
    select_cases,
)
from volseg.training.budget import Budget
from volseg.training.checkpoints import Checkpoints, check_settings, list_settings, read_job
from volseg.training.checks import check_patience, check_validation
from volseg.training.engine import (
    Learner,
    attach_checkpoints,
    attach_counting,
    create_trainer,
    make_learner,
    run_to_end,
    stop_on_interrupt,
)
from volseg.training.extension import check_finished, extend, warn_of_unequal
from volseg.training.history import History
from volseg.training.loggers import check_loggers, open_loggers
from volseg.training.loss import make_loss
from volseg.training.optimizers import choose_optimizer
from volseg.training.pace import Pace
from volseg.training.parallel import (
    agree_on,
    check_batch,
    count_processes,
    first_then_others,
    get_rank,
    is_first,
    join,
    name_job,
    share_gradients,
)
from volseg.training.precision import CompiledNetwork, choose_precision
from volseg.training.rounds import (
    Validator,
    attach_bar,
    attach_rounds,
    choose_validation,
    predict_steps,
)
from volseg.training.setting import Setting, choose_folds, prepare_training
from volseg.training.transfer import count_seen, freeze, transfer_weights

logger = logging.getLogger(__name__)

LOCK_PATIENCE_S = 150.0
"""File systems of a network take a lock from a machine that is gone after 90 seconds or so."""
LOOK_PATIENCE_S = 2.0
ROUNDS_BY_TIME = 25
"""Rows of history of a training whose length is given in minutes."""


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
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        ConfigError: contradicting options, a folder that holds another run, an extension of what
            has not come to its end, or a ``config.yaml`` that a resumed training cannot follow.
        DataError: the dataset cannot be used.
        MachineError: no such device, or the disk is full.
    """
    job = name_job(config, minutes, epochs, resume)
    extends = resume and (minutes is not None or epochs is not None)
    if resume:
        config = resumed_config(Path(output), config or Config(), fold)
    config = with_length(config or Config(), minutes, epochs)
    check_loggers(config.training.log)
    if not resume:
        check_patience(config.training.patience, config.training.epochs or ROUNDS_BY_TIME)
    keep_freed_memory()
    with join(choose_device(device)) as own:
        # All patches have one size, for which the fastest convolutions are worth a search.
        torch.backends.cudnn.benchmark = own.type == "cuda"
        if resume and is_first():
            for kept in find_configs(Path(output), fold):
                check_settings(kept.parent, extends)
        folder = Path(output)
        prepare = partial(prepare_training, Path(dataset), folder, config, own, resume, fold)
        setting = first_then_others(prepare)
        step_seconds = agree_on(setting.step_seconds)
        setting = replace(setting, step_seconds=step_seconds, job=job)
        check_batch(setting.plan.batch_size)
        train_folds(setting, fold, resume, extends)
    return setting.run.path


def train_folds(setting: Setting, fold: int | str, resume: bool, extends: bool) -> None:
    """Train one fold, or all in turn until one is interrupted.

    Raises:
        ConfigError: no such fold, an extension of one that has not come to its end, or a patience
            and no case to validate on.
    """
    folds = choose_folds(fold, len(setting.splits))
    for number in folds if is_first() else ():
        check_same_split(setting.run.fold(number) / LAST, setting.splits[number])
    restarted = {number for number in folds if is_restarted(setting, number)}
    for number in folds:
        # One that goes on has a configuration of its own.
        if not resume or not agree_on(float((setting.run.fold(number) / LAST).exists())):
            check_validation(setting.config.training.patience, setting.splits[number], number)
    if extends:
        check_finished(setting.run, [number for number in folds if number not in restarted])
    for number in folds:
        is_begun = agree_on((setting.run.fold(number) / LAST).exists())
        goes_on = number in restarted or (resume and bool(is_begun or fold != "all"))
        now_extends = extends and number not in restarted
        # On another machine torchrun may be back before the lock of the one that is gone is.
        # Nowhere is it refused because another fold's process has just looked whether it is free.
        patience_s = LOCK_PATIENCE_S if setting.job else LOOK_PATIENCE_S
        folder = setting.run.fold(number)
        with hold_fold(folder, patience_s) if is_first() else nullcontext():
            is_done = train_fold(replace(setting, extends=now_extends), number, goes_on)
        if not is_done:
            break
    if resume and len(folds) > 1 and is_first():
        warn_of_unequal(setting.run, folds)


def is_restarted(setting: Setting, fold: int) -> bool:
    """Whether this very command trained the fold before torchrun started it again.

    The fold then goes on from its checkpoint, whatever the options say, which are in it by now.
    """
    path = setting.run.fold(fold) / LAST
    is_ours = is_first() and bool(setting.job) and path.exists() and read_job(path) == setting.job
    return bool(agree_on(float(is_ours)))


def find_configs(output: Path, fold: int | str) -> list[Path]:
    """What the folds to train, one or all, have kept as their configuration."""
    found = RunFolder(output).in_folds("config.yaml")
    return [path for path in found if fold == "all" or path.parent.name == f"fold_{fold}"]


def resumed_config(output: Path, config: Config, fold: int | str = "all") -> Config:
    """The configuration that the run in `output` began with, for its folds not yet begun too.

    Args:
        output: the run folder.
        config: what the user gives.
        fold: to train; what it has kept itself comes first.

    Raises:
        ConfigError: other options were given, which a resumed training could not follow.
    """
    if config != Config():
        raise ConfigError(
            "a resumed training keeps the configuration it began with; expected no other option "
            "than a length, which extends a finished one. Leave them out, or edit config.yaml in "
            "the folder of the fold."
        )
    begun = find_configs(output, fold) or find_configs(output, "all")
    if not begun:
        return config
    # An extension is a fold's own; the others are as long as that one was at first.
    first = begun[0].with_name(name_config_before(1))
    return Config.read_yaml(first if first.exists() else begun[0])


def has_ended(run: Path, fold: int | str) -> bool:
    """Whether a fold, or all, have come to their end.

    Args:
        run: the run folder.
        fold: as for `train`.
    """
    number = len(json.loads(RunFolder(run).splits.read_text(encoding="utf-8")))
    checkpoints = [RunFolder(run).fold(k) / LAST for k in choose_folds(fold, number)]
    if not all(path.exists() for path in checkpoints):
        return False
    steps = (count_steps(load_weights(path, mapped=True)) for path in checkpoints)
    return all(done >= wanted for done, wanted in steps)


def train_fold(setting: Setting, fold: int, resume: bool) -> bool:
    """Train one fold from its split to its last checkpoint; False if it was interrupted.

    Raises:
        ConfigError: a patience, and no case to validate on.
    """
    folder = setting.run.fold(fold)
    config = first_then_others(partial(_open_config, setting, fold, resume))
    check_validation(config.training.patience, setting.splits[fold], fold)
    train_cases, validation_cases = first_then_others(partial(_open_cases, setting, fold))
    learner = _make_learner(setting, config, fold, resume)
    checkpoints = _open_checkpoints(setting, config, fold, learner, resume)
    learner.counters.job = setting.job
    if setting.extends:
        config = _extend_fold(setting, config, fold, learner)
    checkpoints.settings = list_settings(config)
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
    attach_checkpoints(trainer, learner, checkpoints)
    loader = _make_loader(setting, config, train_cases, learner.counters.step)
    learner.finish = loader.finish
    _announce(pace, setting)
    with (
        show_progress(f"Training fold {fold}") as update,
        stop_on_interrupt(learner),
        open_loggers(trainer, config, history),
    ):
        attach_bar(trainer, learner, history, update)
        run_to_end(trainer, loader)
        is_stopped = learner.agree_to_stop()
    step, minutes = learner.counters.step, learner.counters.elapsed_s / 60
    logger.info("fold %d: %d steps in %.1f minutes (%s) -> %s", fold, step, minutes, pace, folder)
    # Stopped in its last step, it is complete, and the folds behind it are not wanted.
    return learner.is_complete and not is_stopped


def _open_checkpoints(
    setting: Setting, config: Config, fold: int, learner: Learner, resume: bool
) -> Checkpoints:
    """Where the training is kept, and goes on from if it is resumed."""
    counters, parts = learner.counters, _resumable_parts(learner)
    folder = setting.run.fold(fold)
    split = setting.splits[fold]
    checkpoints = Checkpoints(folder, setting.plan, split, learner.average, parts, counters)
    if resume:
        checkpoints.restore()
        logger.info("resuming fold %d at step %d", fold, counters.step)
    counters.parts = max(counters.parts, config.training.parts)
    if config.training.recompute or counters.is_recomputing:
        recompute_(learner.network)
        counters.is_recomputing = True
    return checkpoints


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
    check_patience(config.training.patience, config.training.epochs or ROUNDS_BY_TIME)
    if is_first():
        extend_fold(setting.run, fold, config, learner.counters.extensions + 1)
    extend(learner, config.training)
    return config


def _open_config(setting: Setting, fold: int, resume: bool) -> Config:
    if is_first():
        return open_fold(setting.run, fold, _settle(setting), resume)
    return Config.read_yaml(setting.run.fold(fold) / "config.yaml")


def _settle(setting: Setting) -> Config:
    """The configuration with what was left to the network, as the fold's file keeps it."""
    config, plan = setting.config, setting.plan
    with choose_shape_device(plan.network.name):
        network = build_planned_network(plan, setting.dataset.classes.num_outputs)
    optimizer = choose_optimizer(config.optimizer, network)
    if config.optimizer.name == "auto":
        rate = optimizer.learning_rate
        logger.info("optimiser: %s with a learning rate of %g", optimizer.name, rate)
    return config.model_copy(update={"optimizer": optimizer})


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
    patience = config.training.patience
    if not counters.validation:
        chosen, counters.validate_every = choose(cases)
        counters.validation = [case.case_id for case in chosen]
        counters.patience = patience
        _say_validation(chosen, cases, counters.validate_every)
    kept = [case for case in cases if case.case_id in counters.validation]
    if setting.extends or patience != counters.patience:
        check_patience(patience, rounds)
        _, counters.validate_every = choose(kept, keep_all=True)
        counters.patience = patience
        _say_validation(kept, cases, counters.validate_every)
    share = counters.validate_every / rounds
    learner.budget.expect_validations(share, predict_steps(kept, plan))
    precision = choose_precision(config.training.precision, setting.device)
    return Validator(kept, plan, setting.dataset.classes, setting.device, precision)


def _say_validation(chosen: Sequence[CachedCase], cases: Sequence[CachedCase], every: int) -> None:
    if cases:
        logger.info("validation: %d of %d cases, every %d rounds", len(chosen), len(cases), every)


def _make_loader(
    setting: Setting, config: Config, cases: Sequence[CachedCase], first_step: int
) -> Batches:
    plan = setting.plan
    classes, optional = setting.dataset.classes, plan.optional_channels
    slice_axis = plan.network.slice_axis
    masked = [number for number, n in enumerate(plan.normalisation) if n.nonzero_only]
    augment = Augmentation(
        config.augmentation, plan.spacing_mm, classes, optional, slice_axis, masked
    )
    if any(augment.flip):
        logger.info("mirroring: %s", augment.mirroring.describe(classes.names))
        if augment.flip[0] and 0 in augment.mirroring.axes and are_numbered(classes.names[1:]):
            logger.warning(
                "the classes have numbers and no names, so that none is known as left or right: if "
                "two are, leave the first axis out (augmentation.flip=[0, ...]), or name them"
            )
    patches = PatchDataset(
        cases,
        plan.patch,
        batch_size=plan.batch_size,
        foreground=config.training.foreground,
        augment=augment,
        classes=classes.shown,
        seed=config.training.seed,
    )
    workers = _num_workers(config, setting.device)
    share = (get_rank(), count_processes())
    return make_loader(patches, first_step, workers, setting.device, share)


def _open_cases(setting: Setting, fold: int) -> tuple[list[CachedCase], list[CachedCase]]:
    dataset, plan, cache = setting.dataset, setting.plan, setting.run.cache
    split = setting.splits[fold]
    wanted = select_cases(dataset, (*split.train, *split.validation))
    fingerprint = setting.run.fingerprint
    measured = Fingerprint.read_json(fingerprint).cases if fingerprint.exists() else ()
    with show_progress("Preparing cases") as update:
        prepared = build_cache(dataset, wanted, plan, cache, update, measured)
    if not is_trained_besides(setting.run, fold):
        remove_superseded(cache, prepared)
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
        _start_from(Path(training.start_from), network, setting, fold)
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
    precision = choose_precision(training.precision, setting.device)
    learner = make_learner(
        network, loss, setting.device, budget, config.optimizer, training.seed, precision
    )
    learner.counters.parts = training.parts
    learner.forward = share_gradients(network, setting.device)
    is_gpu = setting.device.type == "cuda"
    if is_gpu if training.compile is None else training.compile:
        learner.forward = CompiledNetwork(learner.forward)
    return learner


def _start_from(source: Path, network: nn.Module, setting: Setting, fold: int) -> None:
    """Take over the weights of another model, and say whether it knows what is to validate."""
    report = transfer_weights(network, setting.plan, setting.dataset.classes, source, fold)
    logger.info("%s", report)
    validation = select_cases(setting.dataset, setting.splits[fold].validation)
    seen = count_seen(source, fold, validation)
    if seen is None:
        logger.warning(
            "%s does not say which cases it was trained on: where they validate now, their Dice "
            "will be too good",
            source,
        )
    elif seen:
        logger.warning(
            "%s was trained on %d of the %d cases that are to validate: their Dice will be too "
            "good. For an honest one use its splits.json, or cases that it has not seen.",
            report.source,
            seen,
            len(validation),
        )


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
    if device.type == "cpu":
        return 0
    return max(1, min(8, count_cores() // count_beside() - 1))
