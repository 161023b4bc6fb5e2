"""Plan a run: ``fingerprint.json`` and ``plan.yaml`` in its folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from volseg.config import Config
from volseg.data.cases import Dataset
from volseg.data.layouts import find_dataset
from volseg.errors import ConfigError
from volseg.planning.architectures import choose_supervision
from volseg.planning.fingerprint import compute_fingerprint
from volseg.planning.machine import Machine
from volseg.planning.plan import Plan
from volseg.planning.planner import ANISOTROPY, PlannedTraining, make_plan, slice_thickness
from volseg.progress import show_progress
from volseg.run_folder import DATASET_FILE, RunFolder, open_run

logger = logging.getLogger(__name__)


def plan_run(
    dataset: Path,
    output: Path,
    config: Config,
    measure: Callable[[int], Machine],
) -> PlannedTraining:
    """Plan a training on the dataset folder, without importing torch.

    Args:
        dataset: a folder or datalist.
        output: the run folder.
        config: fixed values and the length of the training.
        measure: gives the training device for a number of spatial axes.

    Raises:
        ConfigError: `output` holds something else, or a plan already, or the plan is another
            model's.
        DataError: the dataset cannot be used.
    """
    if config.training.start_from is not None:
        raise ConfigError(
            f"training.start_from {config.training.start_from} brings its own plan; nothing was "
            "written. Give it to `volseg train`, or leave it out."
        )
    choose_supervision(config.network.name, config.network.deep_supervision)
    found = find_dataset(dataset, config.data.optional_channels).with_labels(config.data)
    run = open_run(output, found)
    planned = None
    if not run.plan.exists():
        planned = write_plan(run, found, config, measure)
    if planned is None:
        raise ConfigError(f"{run.plan} exists; nothing was changed. Remove it to plan again.")
    return planned


def write_plan(
    run: RunFolder,
    dataset: Dataset,
    config: Config,
    measure: Callable[[int], Machine],
    check: Callable[[Plan], None] | None = None,
    adapt: Callable[[Plan], Plan] | None = None,
) -> PlannedTraining | None:
    """Read every case, measure the machine, plan, and write both files.

    Where another process or the user has put a plan there meanwhile, nothing is written.

    Args:
        run: its folder.
        dataset: what it trains on.
        config: fixed values and the length of the training.
        measure: gives the training device for a number of spatial axes.
        check: refuses a plan before it is written.
        adapt: changes a plan before it is checked.

    Returns:
        What was written, or None.

    Raises:
        DataError: a case cannot be read.
    """
    with show_progress("Reading cases") as update:
        fingerprint = compute_fingerprint(dataset, update)
    machine = measure(2 if config.plan.slices else fingerprint.spatial_dims)
    planned = make_plan(fingerprint, machine, config, dataset.classes.num_outputs)
    if adapt is not None:
        adapted = adapt(planned.plan)
        same = ("spacing_mm", "patch", "network")
        if any(getattr(adapted, key) != getattr(planned.plan, key) for key in same):
            reasons = ("Spacing, patch and network are those of the model that it starts from.",)
            planned = replace(planned, reasons=reasons)
        planned = replace(planned, plan=adapted)
    if check is not None:
        check(planned.plan)
    plan = planned.plan
    # Before the plan, behind which nobody would write it any more.
    fingerprint.write_json(run.fingerprint)
    try:
        plan.write_yaml(run.plan, planned.reasons, replaces=False)
    except FileExistsError:
        return None
    # Who planned says what was planned on, whatever the other one has written there.
    dataset.write_json(run.path / DATASET_FILE)
    fingerprint.write_json(run.fingerprint)
    logger.info(
        "plan: spacing %s mm, patch %s, batch %d, channels %s -> %s",
        " x ".join(f"{value:g}" for value in plan.spacing_mm),
        " x ".join(map(str, plan.patch)),
        plan.batch_size,
        " ".join(map(str, plan.network.channels)),
        run.plan,
    )
    if config.plan.slices is None and (thickness := slice_thickness(fingerprint)) >= ANISOTROPY:
        logger.info(
            "slices are %.1f times as thick as their pixels are wide; a 2D network that sees them "
            "one by one may do better: --set plan.slices=true",
            thickness,
        )
    return planned


def find_contradiction(plan: Plan, config: Config) -> str | None:
    """Name of the first value of `plan` that `config` sets to something else, or None.

    A configuration that says the same as the plan, or leaves it open, is no contradiction.
    """
    network = plan.network
    values = {
        "slices": network.slice_axis is not None,
        "spacing_mm": plan.spacing_mm,
        "patch": plan.patch,
        "batch_size": plan.batch_size,
        "width": network.channels[0],
        "pocket": len(set(network.channels)) == 1,
        "num_levels": len(network.channels),
        "normalisation": "/".join(sorted({n.scheme for n in plan.normalisation})),
    }
    for key, wanted in config.plan.model_dump(exclude_none=True).items():
        # "At most so many" levels, of which a small patch has fewer.
        if values[key] > wanted if key == "num_levels" else values[key] != wanted:
            return key
    chosen = config.network
    if "name" in chosen.model_fields_set and chosen.name != network.name:
        return "network.name"
    # A plan has no word on the supervision of a network with a single output.
    if chosen.deep_supervision not in (None, bool(network.deep_supervision)):
        return "network.deep_supervision"
    planned = network.model_dump(mode="json")["options"]
    for key, option in chosen.model_dump(mode="json")["options"].items():
        if key not in planned or planned[key] != option:
            return f"network.options.{key}"
    return None
