"""`train`: the whole way from a dataset folder to a run folder that predicts."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from volseg.config import DEFAULT_MINUTES, Config, LossConfig, with_length
from volseg.data.augmentation import Augmentation
from volseg.data.cache import CachedCase, build_cache
from volseg.data.cases import Classes, Dataset
from volseg.data.dropping import ChannelDropping
from volseg.data.layouts import find_dataset
from volseg.data.patches import Augment, Batches, PatchDataset, make_loader
from volseg.data.splits import Split, write_splits
from volseg.errors import ConfigError
from volseg.inference.model import build_planned_network, choose_device
from volseg.losses import BinaryCrossEntropyDice, DiceCrossEntropy, MultiLevelLoss, RegionLoss
from volseg.networks import ResNetUNet, SegmentationNetwork, inside_slices
from volseg.networks.memory import recompute_
from volseg.networks.pretrained import load_resnet
from volseg.networks.resnet_unet import BLOCKS
from volseg.planning import Fingerprint, Plan, find_contradiction, write_plan
from volseg.planning.architectures import choose_supervision, find_architecture
from volseg.planning.cost import compute_cost
from volseg.progress import show_progress
from volseg.run_folder import LAST, RunFolder, open_fold, open_run, open_splits, select_cases
from volseg.training.budget import Budget
from volseg.training.checkpoints import Checkpoints
from volseg.training.engine import (
    Learner,
    attach_checkpoints,
    attach_counting,
    create_trainer,
    make_learner,
    stop_on_interrupt,
)
from volseg.training.history import History
from volseg.training.machine import measure_machine
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
        resume: go on with a training that was stopped, with the configuration it began with.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: contradicting options, or a folder that holds another run.
        DataError: the dataset cannot be used.
        MachineError: no such device, or the disk is full.
    """
    resume = resume or (is_restart() and any(Path(output).glob(f"fold_*/{LAST}")))
    if resume:
        config = resumed_config(Path(output), config or Config(), minutes, epochs)
    config = with_length(config or Config(), minutes, epochs)
    with join(choose_device(device)) as own:
        prepare = partial(prepare_training, Path(dataset), Path(output), config, own, resume)
        setting = first_then_others(prepare)
        setting = replace(setting, step_seconds=agree_on(setting.step_seconds))
        check_batch(setting.plan.batch_size)
        for number in choose_folds(fold, len(setting.splits)):
            has_begun = (setting.run.fold(number) / LAST).exists()
            goes_on = resume and (has_begun or fold != "all")
            if not train_fold(setting, number, goes_on):
                break
    return setting.run.path


def resumed_config(
    output: Path, config: Config, minutes: float | None, epochs: int | None
) -> Config:
    """The configuration that the run in `output` began with, for its folds not yet begun too.

    Raises:
        ConfigError: other options were given, which a resumed training could not follow.
    """
    if minutes is not None or epochs is not None or config != Config():
        raise ConfigError(
            "a resumed training keeps the configuration it began with; expected no other option. "
            "Leave them out, or edit config.yaml in the folder of the fold."
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
    run = open_run(output, dataset)
    splits = open_splits(run, dataset, config)
    if run.plan.exists():
        plan = _read_plan(run, dataset, config, resume)
        machine = measure_machine(device, plan.network_dims)
    else:
        check = partial(check_training, config=config, classes=dataset.classes)
        measure, adapt = partial(measure_machine, device), partial(_adapt, config=config)
        planned = write_plan(run, dataset, config, measure, check, adapt)
        plan, machine = planned.plan, planned.machine
    if not run.splits.exists():
        write_splits(run.splits, splits)
    num_outputs = dataset.classes.num_outputs
    cost = compute_cost(plan.network, plan.patch, len(dataset.channels), num_outputs)
    step_seconds = cost.step_seconds(machine, plan.batch_size // count_processes() or 1)
    return Setting(run, dataset, plan, splits, config, step_seconds, device)


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


def check_training(plan: Plan, config: Config, classes: Classes) -> None:
    """Refuse what a new training cannot follow, before anything is prepared for it.

    Raises:
        ConfigError: the network refuses its options or the patch, or cannot be supervised or begin
            as the configuration says.
        DataError: the pretrained weights do not fit.
    """
    network = check_network(plan, classes)
    check_supervision(network, plan.network.name, config.loss, classes)
    freeze(network, config.optimizer.freeze)
    if config.training.start_from is not None:
        transfer_weights(network, plan, classes, Path(config.training.start_from))
    if config.network.pretrained is not None:
        check_pretrained(network, config.network.pretrained, plan.network.name)


def check_network(plan: Plan, classes: Classes) -> SegmentationNetwork:
    """The planned network without values, in eval mode, if it takes the planned patch.

    Raises:
        ConfigError: the network refuses an option or the patch, or gives another size than the
            patch's.
    """
    with torch.device("meta"):
        network = build_planned_network(plan, classes.num_outputs).eval()
        size = network(torch.zeros(1, network.in_channels, *plan.patch)).shape[2:]
    if tuple(size) != plan.patch:
        raise ConfigError(
            f"network '{plan.network.name}' turns a patch of {plan.patch} into {tuple(size)}; "
            "expected the same size. Leave out its options for unpadded or cropped features."
        )
    return network


def check_supervision(
    network: SegmentationNetwork, name: str, config: LossConfig, classes: Classes
) -> None:
    """Refuse settings of the supervision that the network has no use for.

    Raises:
        ConfigError: it has a single output, outputs at full resolution only, or another number of
            them than weights.
    """
    strides = network.supervision_strides
    changed = {
        key
        for key, value in config.model_dump().items()
        if key.startswith("supervision_") and value != getattr(LossConfig(), key)
    }
    if len(strides) == 1 and changed:
        raise ConfigError(
            f"loss.{min(changed)} with network '{name}', which has a single output in training. "
            "Leave it out."
        )
    idle = changed & {"supervision_target", "supervision_resolution"}
    if idle and all(set(stride) == {1} for stride in strides):
        raise ConfigError(
            f"loss.{min(idle)} with network '{name}', whose outputs in training all have full "
            "resolution. Leave it out."
        )
    if classes.candidates and config.supervision_target != "nearest-exact":
        raise ConfigError(
            f"loss.supervision_target '{config.supervision_target}' with voxels of unknown class; "
            "expected 'nearest-exact'. Leave it out."
        )
    loss = _make_loss(config, name, len(strides), classes)
    if len(strides) > 1:
        try:
            loss.check_outputs(len(strides))
        except ConfigError as error:
            raise ConfigError(f"loss.supervision_weights: {error}") from error


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
    if learner.is_complete:
        logger.info("fold %d is complete; nothing to do", fold)
        return True
    history = first_then_others(partial(History, folder / "history.jsonl", learner.counters.step))
    validator = _make_validator(setting, config, learner, validation_cases)
    trainer = create_trainer(learner)
    num_rounds = config.training.epochs or ROUNDS_BY_TIME
    patience = config.training.patience
    attach_rounds(trainer, learner, checkpoints, history, validator, num_rounds, patience)
    attach_counting(trainer, learner, num_rounds)
    attach_checkpoints(trainer, checkpoints)
    loader = _make_loader(setting, config, train_cases, learner.counters.step)
    with show_progress(f"Training fold {fold}") as update, stop_on_interrupt(learner):
        attach_bar(trainer, learner, history, update)
        # The budget ends the training; ignite only needs a length that is never reached.
        trainer.run(loader, max_epochs=1, epoch_length=2**62)
    step, minutes = learner.counters.step, learner.counters.elapsed_s / 60
    logger.info("fold %d: %d steps in %.1f minutes -> %s", fold, step, minutes, folder)
    return learner.is_complete


def _open_config(setting: Setting, fold: int, resume: bool) -> Config:
    if is_first():
        return open_fold(setting.run, fold, setting.config, resume)
    return Config.read_yaml(setting.run.fold(fold) / "config.yaml")


def _make_validator(
    setting: Setting, config: Config, learner: Learner, cases: Sequence[CachedCase]
) -> Validator:
    """With the cases that were chosen when the training began, so that "best" keeps its meaning."""
    plan, counters = setting.plan, learner.counters
    if not counters.validation:
        rounds = config.training.epochs or ROUNDS_BY_TIME
        chosen, every = choose_validation(
            cases, plan, setting.step_seconds, config.training, rounds
        )
        counters.validation, counters.validate_every = [case.case_id for case in chosen], every
    kept = [case for case in cases if case.case_id in counters.validation]
    return Validator(kept, plan, setting.dataset.classes, setting.device)


def _make_loader(
    setting: Setting, config: Config, cases: Sequence[CachedCase], first_step: int
) -> Batches:
    plan = setting.plan
    augment: Augment
    augment = Augmentation(config.augmentation, plan.spacing_mm, setting.dataset.classes)
    if plan.optional_channels:
        drop = config.augmentation.drop_channel
        augment = ChannelDropping(augment, plan.optional_channels, drop)
    patches = PatchDataset(
        cases,
        plan.patch,
        batch_size=plan.batch_size,
        foreground=config.training.foreground,
        augment=augment,
        seed=config.training.seed,
    )
    workers = _num_workers(config, setting.device)
    is_gpu = setting.device.type == "cuda"
    share = (get_rank(), count_processes())
    return make_loader(patches, first_step, workers, pin_memory=is_gpu, share=share)


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
    outputs = len(network.supervision_strides)
    loss = _make_loss(config.loss, setting.plan.network.name, outputs, setting.dataset.classes)
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


def _make_loss(config: LossConfig, name: str, outputs: int, classes: Classes) -> MultiLevelLoss:
    """For the outputs of network `name`, weighted as its source does unless the user says."""
    weights = config.supervision_weights
    if weights is None:
        weights = find_architecture(name).supervision_weights.get(outputs, "halving")
    loss: nn.Module
    if classes.regions:
        terms = BinaryCrossEntropyDice(
            config.cross_entropy_weight, config.dice_weight, ignore=bool(classes.candidates)
        )
        loss = RegionLoss(terms, classes.region_indices, classes.num_classes, classes.candidates)
    else:
        loss = DiceCrossEntropy(
            config.dice_weight, config.cross_entropy_weight, candidates=classes.candidates
        )
    return MultiLevelLoss(
        loss,
        weights,
        target=config.supervision_target,
        resolution=config.supervision_resolution,
        decay=config.supervision_decay,
    )


def check_pretrained(network: SegmentationNetwork, path: str, name: str) -> None:
    """Refuse pretrained weights where they cannot be taken over.

    Raises:
        ConfigError: another network, or no such file.
        DataError: the file cannot be read or does not fit.
    """
    network = inside_slices(network)
    if not isinstance(network, ResNetUNet):
        raise ConfigError(
            f"network.pretrained with network '{name}'; expected 'resnet_unet', which alone takes "
            "pretrained weights. Leave it out."
        )
    if not Path(path).is_file():
        raise ConfigError(f"network.pretrained {path} does not exist; expected a state dict.")
    load_resnet(network, Path(path), BLOCKS[network.depth])


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
