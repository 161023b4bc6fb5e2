"""What all folds of a training share: the dataset, its plan, its splits, the device."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from volseg.config import Config
from volseg.data.cases import Dataset
from volseg.data.layouts import find_dataset
from volseg.data.splits import Split
from volseg.errors import ConfigError
from volseg.inference.model import read_facts
from volseg.planning import Machine, Plan, find_contradiction, write_plan
from volseg.planning.architectures import choose_supervision
from volseg.planning.cost import compute_cost
from volseg.run_folder import RunFolder, keep_splits, open_run, open_splits
from volseg.training.checks import check_network, check_training
from volseg.training.history import read_step_seconds
from volseg.training.machine import measure_machine
from volseg.training.parallel import check_batch, count_processes, is_first
from volseg.training.precision import choose_precision
from volseg.training.transfer import adapt_plan

logger = logging.getLogger(__name__)


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
    job: str = ""
    """The same whenever torchrun starts it again."""


def prepare_training(
    path: Path,
    output: Path,
    config: Config,
    device: torch.device,
    resume: bool = False,
    fold: int | str = "all",
) -> Setting:
    """Find the cases, open the run, plan or take up the plan, split.

    Raises:
        ConfigError: contradicting options, a folder that holds another run, or no such fold.
        DataError: the dataset cannot be used.
    """
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
    choose_folds(fold, len(splits))
    measure = cache(partial(measure_machine, device, precision=precision))
    plan, step_seconds = _open_plan(run, dataset, config, measure, resume)
    splits = keep_splits(run, dataset, splits)
    return Setting(run, dataset, plan, splits, config, step_seconds, device)


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


def _open_plan(
    run: RunFolder,
    dataset: Dataset,
    config: Config,
    measure: Callable[[int], Machine],
    resume: bool,
) -> tuple[Plan, float]:
    """The run's plan, which is made if there is none, and the seconds per step that it predicts.

    Raises:
        ConfigError: there is one that the configuration contradicts, or a new one cannot train.
    """
    if not run.plan.exists():
        check = partial(check_training, config=config, classes=dataset.classes)
        adapt = partial(_adapt, config=config)
        planned = write_plan(run, dataset, _share_batch(config), measure, check, adapt)
        if planned is not None:
            return planned.plan, _predict_speed(planned.plan, planned.machine, dataset)
        logger.info("plan: %s was written meanwhile", run.plan)
        open_run(run.path, dataset)
    plan = _read_plan(run, dataset, config, resume)
    # The first process will say.
    step_seconds = math.nan
    if is_first():
        known = _find_speed(run) if resume else None
        step_seconds = known or _predict_speed(plan, measure(plan.network_dims), dataset)
    return plan, step_seconds


def _find_speed(run: RunFolder) -> float | None:
    """Seconds per step of any fold that has begun; None if none says."""
    found = (read_step_seconds(path) for path in run.in_folds("history.jsonl"))
    return next((seconds for seconds in found if seconds), None)


def _predict_speed(plan: Plan, machine: Machine, dataset: Dataset) -> float:
    """Seconds per step, by the planned work and the speed of the machine."""
    num_channels, num_outputs = len(dataset.channels), dataset.classes.num_outputs
    cost = compute_cost(plan.network, plan.patch, num_channels, num_outputs)
    return cost.step_seconds(machine, plan.batch_size // count_processes() or 1)


def _share_batch(config: Config) -> Config:
    """With one process's share of a fixed batch, whose memory and time is what is planned.

    Raises:
        ConfigError: the processes cannot share it evenly.
    """
    if config.plan.batch_size is None:
        return config
    check_batch(config.plan.batch_size)
    share = {"batch_size": config.plan.batch_size // count_processes()}
    return config.model_copy(update={"plan": config.plan.model_copy(update=share)})


def _adapt(plan: Plan, config: Config) -> Plan:
    """The plan with what another model brings along, and a batch for all processes.

    Raises:
        ConfigError: the other model's network is not the one that the configuration asks for, or
            the processes cannot share its batch evenly.
    """
    plan = plan.model_copy(update={"batch_size": plan.batch_size * count_processes()})
    if config.training.start_from is not None:
        plan = adapt_plan(plan, Path(config.training.start_from), config.plan)
        if contradiction := find_contradiction(plan, config):
            raise ConfigError(
                f"the configuration contradicts the {contradiction} of {config.training.start_from}"
                ", whose network comes with its weights. Leave it out, or begin without "
                "training.start_from."
            )
        check_batch(plan.batch_size)
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
    if not resume and config.training.start_from is not None:
        theirs = read_facts(Path(config.training.start_from)).plan.network
        if plan.network != theirs:
            raise ConfigError(
                f"{run.plan} is there, with another network than {config.training.start_from}; "
                "expected that one, whose weights the training begins with. Remove the plan, or "
                "choose another folder."
            )
    try:
        check_network(plan, dataset.classes)
    except ConfigError as error:
        raise ConfigError(f"{run.plan}: {error}") from error
    if not resume:
        check_training(plan, config, dataset.classes)
    logger.info("plan: using %s", run.plan)
    return plan
