"""A model folder: plain data files and weights, nothing in it is executed.

A run folder holds ``plan.yaml``, ``dataset.json`` and ``fold_K/checkpoint_*.pt``; a bundle holds
``configs/volseg.json`` and ``models/model.pt``. Both say the same: a plan, classes, weights.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from volseg.config import Config, Record
from volseg.data.cases import Classes, Dataset, Split
from volseg.errors import ConfigError, DataError, MachineError
from volseg.networks import SegmentationNetwork, build_network, prefer_speed_
from volseg.networks.weights import digest_weights, load_weights
from volseg.planning.plan import Plan
from volseg.run_folder import DATASET_FILE, LAST, PLAN_FILE, SPLITS_FILE, RunFolder

logger = logging.getLogger(__name__)

BUNDLE_FILE = Path("configs", "volseg.json")
BUNDLE_WEIGHTS = Path("models", "model.pt")

Checkpoint = Literal["last", "best"]


class ModelFacts(Record):
    """What a model folder says besides its weights."""

    plan: Plan
    classes: Classes
    mirrored: tuple[int, ...] | None = None
    """Axes along which the patches of its training were mirrored; None if nobody says."""


@dataclass(frozen=True, eq=False)
class Model:
    """Networks in eval mode on `device`, one per fold, that were trained with one plan.

    `digest` tells their weights from any others. `is_prepared` says that `Predictor.load` keeps
    the networks for itself: in the precision that torch computes in, or without weights where
    another runtime does. For anything else they come from `load_model`.
    """

    networks: tuple[nn.Module, ...]
    facts: ModelFacts
    device: torch.device
    digest: str
    is_prepared: bool = False


def load_model(
    folders: Path | Sequence[Path],
    device: str = "auto",
    folds: tuple[int, ...] | None = None,
    checkpoint: Checkpoint = "last",
) -> Model:
    """Load a run folder or a bundle, or several, whose networks are averaged.

    Args:
        folders: one model folder or several, whose networks may differ, but neither how images are
            prepared, nor the patch, nor the classes.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        folds: which folds of each run; by default every fold that was trained.
        checkpoint: ``last``, or ``best`` by the validation during training.

    Raises:
        ConfigError: a folder is no model, or has not the fold, or two do not go together.
        DataError: damaged weights, or weights that do not fit the plan.
        MachineError: no such device.
    """
    chosen = choose_device(device)
    folders = [folders] if isinstance(folders, Path) else list(folders)
    every = [read_facts(folder) for folder in folders]
    for folder, facts in zip(folders[1:], every[1:], strict=True):
        _check_together(folders[0], every[0], folder, facts)
    paths = [find_weights(folder, folds, checkpoint) for folder in folders]
    networks = tuple(
        _load_network(facts, path, chosen)
        for facts, own in zip(every, paths, strict=True)
        for path in own
    )
    facts = every[0].model_copy(update={"mirrored": _join_mirrored(every)})
    return Model(networks, facts, chosen, digest_weights([p for own in paths for p in own]))


def _join_mirrored(every: Sequence[ModelFacts]) -> tuple[int, ...] | None:
    """Axes that all models have seen mirrored; None if one does not say."""
    known = [facts.mirrored for facts in every if facts.mirrored is not None]
    if len(known) < len(every):
        return None
    return tuple(axis for axis in known[0] if all(axis in axes for axes in known))


def _check_together(folder: Path, facts: ModelFacts, other: Path, others: ModelFacts) -> None:
    """Refuse models that do not see the same images or do not give the same classes.

    Raises:
        ConfigError: names the first value that differs.
    """
    pairs = {"classes": (facts.classes, others.classes)}
    for key in ("spatial_dims", "spacing_mm", "patch", "normalisation"):
        pairs[key] = (getattr(facts.plan, key), getattr(others.plan, key))
    for key, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise ConfigError(
                f"{other} has {key} {theirs}, and {folder} {ours}; expected the same, since both "
                "see the same windows. Predict with one of them."
            )


def read_facts(folder: Path) -> ModelFacts:
    """Plan and classes of a run folder or bundle.

    Raises:
        ConfigError: `folder` is neither, or its plan is not valid.
    """
    if (folder / BUNDLE_FILE).is_file():
        return ModelFacts.read_json(folder / BUNDLE_FILE)
    if (folder / PLAN_FILE).is_file() and (folder / DATASET_FILE).is_file():
        dataset = Dataset.read_json(folder / DATASET_FILE)
        plan = Plan.read_yaml(folder / PLAN_FILE)
        mirrored = _find_mirrored(folder, plan.spatial_dims)
        return ModelFacts(plan=plan, classes=dataset.classes, mirrored=mirrored)
    raise ConfigError(
        f"{folder} is no model; expected a run folder ({PLAN_FILE}, {DATASET_FILE}) or a bundle "
        f"({BUNDLE_FILE}). Train one with `volseg train`."
    )


def _find_mirrored(run: Path, spatial_dims: int) -> tuple[int, ...] | None:
    """Axes along which all trainings of a run mirrored their patches."""
    try:
        configs = [Config.read_yaml(path) for path in RunFolder(run).in_folds("config.yaml")]
        chances = [config.augmentation.flips(spatial_dims) for config in configs]
    except ConfigError:
        # Of an older version, perhaps; nothing else of it is needed.
        return None
    axes = range(spatial_dims)
    return tuple(axis for axis in axes if all(c[axis] for c in chances)) if chances else None


def find_weights(
    folder: Path, folds: tuple[int, ...] | None = None, checkpoint: Checkpoint = "last"
) -> list[Path]:
    """Weight files of a model folder.

    Raises:
        ConfigError: a fold was not trained, or none was.
    """
    if (folder / BUNDLE_FILE).is_file():
        if folds is not None:
            raise ConfigError(f"{folder} is a bundle, which has no folds. Leave the fold out.")
        return [folder / BUNDLE_WEIGHTS]
    name = f"checkpoint_{checkpoint}.pt"
    if folds is None:
        folds = trained_folds(folder, checkpoint)
    paths = [folder / f"fold_{fold}" / name for fold in folds]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        what = missing[0] if missing else folder / "fold_*" / name
        if what.with_name(LAST).is_file():
            raise ConfigError(
                f"{what} does not exist: no validation has chosen a best one. Predict with "
                "--checkpoint last."
            )
        raise ConfigError(
            f"{what} does not exist: that fold has not been trained. Run `volseg train` first."
        )
    return paths


def trained_folds(folder: Path, checkpoint: Checkpoint = "last") -> tuple[int, ...]:
    """Folds of a run that have a checkpoint, ascending."""
    found = RunFolder(folder).in_folds(f"checkpoint_{checkpoint}.pt")
    return tuple(sorted(int(path.parent.name.removeprefix("fold_")) for path in found))


def build_planned_network(plan: Plan, num_outputs: int) -> SegmentationNetwork:
    """The plan's network with fresh weights: (B, C, *S) to logits (B, num_outputs, *S)."""
    network = build_network(
        plan.network.name,
        spatial_dims=plan.spatial_dims,
        in_channels=len(plan.normalisation),
        out_channels=num_outputs,
        **plan.network.keywords(),
    )
    prefer_speed_(network)
    return network


def check_same_split(path: Path, split: Split) -> None:
    """Refuse a split that was edited after training: what has been learnt from would validate.

    Args:
        path: of the fold's last checkpoint; one that is missing, damaged or of an older version
            does not say.
        split: of ``splits.json``.

    Raises:
        ConfigError: the fold was trained on other cases.
    """
    known = None
    with contextlib.suppress(DataError):
        known = load_weights(path, mapped=True).get("split")
    if known is not None and known != split.model_dump(mode="json"):
        raise ConfigError(
            f"{path} was trained on another split than that of {SPLITS_FILE}; expected the same, "
            "since what has been learnt from must not validate. Put the file back, or train in a "
            "new folder."
        )


def check_same_plan(state: Mapping[str, Any], plan: Plan, path: Path) -> None:
    """Refuse a plan that was edited after training: images would be prepared in another way.

    Raises:
        ConfigError: names the first value that differs.
    """
    # Parsed, so that what older plans do not say is what they mean.
    trained = Plan.parse(state["plan"], f"{path}: plan").model_dump(mode="json")
    now = plan.model_dump(mode="json")
    for key in now:
        if trained[key] != now[key]:
            raise ConfigError(
                f"{path} was trained with {key} {trained[key]}, but {PLAN_FILE} says "
                f"{now[key]}. Restore {PLAN_FILE}, or train again in a new folder."
            )


def choose_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, else the CPU; a Mac's GPU is ``mps``.

    Raises:
        ConfigError: not a device name.
        MachineError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ConfigError(f"--device {name}; expected auto, cpu, cuda, cuda:N or mps.")
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise MachineError("device mps is not there; expected a Mac with a GPU. Use --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MachineError(
            f"device {name} is not there; this machine has {torch.cuda.device_count()} CUDA "
            "devices. Use --device cpu."
        )
    return device


def count_steps(state: Mapping[str, Any]) -> tuple[int, int]:
    """Steps that a ``checkpoint_last.pt`` has behind it, and those of the whole training."""
    return state["counters"]["step"], state["training"]["budget"]["end"]


def _warn_of_unfinished(state: Mapping[str, Any], path: Path) -> None:
    """Say that a training was stopped, or still goes on: its weights count as much as others'."""
    if "counters" not in state:
        return
    done, wanted = count_steps(state)
    if done < wanted:
        logger.warning("%s has been trained for %d of %d steps so far", path, done, wanted)


def _load_network(facts: ModelFacts, path: Path, device: torch.device) -> nn.Module:
    network = build_planned_network(facts.plan, facts.classes.num_outputs)
    # A checkpoint also holds what a resumed training needs, twice as much as a prediction does.
    state = load_weights(path, mapped=True)
    # A bundle's weights stand alone, as MONAI wants them; its plan is no file to edit.
    if "plan" in state:
        check_same_plan(state, facts.plan, path)
    _warn_of_unfinished(state, path)
    try:
        network.load_state_dict(state.get("network", state))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: the weights do not fit the plan's network; expected those that were trained "
            "with it. Copy the model folder again from its source."
        ) from error
    return network.to(device).eval()
