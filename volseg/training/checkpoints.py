"""Checkpoints of a training: ``checkpoint_last.pt`` and ``checkpoint_best.pt``.

Both hold the averaged weights as ``network``, to predict with; the last one also holds all that a
resumed training needs. Only tensors and plain values are stored, so loading never unpickles code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from volseg.config import Config
from volseg.data.splits import Split
from volseg.errors import ConfigError
from volseg.inference.model import check_same_plan
from volseg.networks.weights import load_weights, save_weights
from volseg.planning import Plan
from volseg.run_folder import BEST, LAST, name_config_before

_LENGTH = ("training.minutes", "training.epochs", "training.steps_per_epoch")
_SECTIONS = ("data.", "plan.", "network.")
_SETTINGS = (
    *_LENGTH,
    "training.seed",
    "training.num_folds",
    "training.start_from",
    "optimizer.name",
    "optimizer.momentum",
    "optimizer.weight_decay",
    "optimizer.freeze",
)


@dataclass
class Counters:
    """What a training has done so far."""

    step: int = 0
    elapsed_s: float = 0.0
    best_dice: float = -1.0
    validation: list[str] = field(default_factory=list)
    """Ids of the cases that validate, chosen once."""
    validate_every: int = 1
    """In rounds."""
    patience: int | None = None
    """For which that was chosen."""
    parts: int = 1
    """In which a batch is computed."""
    is_recomputing: bool = False
    """Whether feature maps are computed twice instead of kept."""
    round_steps: int = 0
    round_loss: float = 0.0
    """Steps since the last round, and the sum of their losses."""
    best_since_begin: float = -1.0
    validations_since_best: int = 0
    """Of this training or extension, for the patience."""
    is_settling: bool = False
    """Whether the training comes to its end early, since no validation got better."""
    extensions: int = 0
    """How often a finished training was given more time or epochs."""
    job: str = ""
    """Of torchrun; empty without it."""


class Checkpoints:
    """Writes and restores the checkpoints of one fold.

    Args:
        folder: of the fold.
        plan: kept beside the weights, which are worth nothing without it.
        split: which cases train and which validate, for `check_same_split`.
        average: whose ``module`` holds the averaged weights.
        parts: everything else that a resumed training needs, by name.
        counters: step, time and best Dice.

    Attributes:
        settings: of `list_settings`, which `check_settings` compares when the training is resumed.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        split: Split,
        average: torch.optim.swa_utils.AveragedModel,
        parts: Mapping[str, Any],
        counters: Counters,
    ) -> None:
        self.folder, self.plan, self.split, self.average = folder, plan, split, average
        self.parts, self.counters = parts, counters
        self.settings: dict[str, Any] = {}

    def save_last(self) -> None:
        """Write everything, replacing the previous one whole."""
        training = {name: part.state_dict() for name, part in self.parts.items()}
        state = {
            **self._model(),
            "training": training,
            "num_averaged": int(self.average.n_averaged),
            "counters": vars(self.counters).copy(),
            "settings": self.settings,
            "split": self.split.model_dump(mode="json"),
        }
        save_weights(self.folder / LAST, state)

    def save_best(self) -> None:
        """Write the averaged weights alone."""
        save_weights(self.folder / BEST, self._model())

    def _model(self) -> dict[str, Any]:
        """What predicts."""
        return {
            "network": self.averaged_network.state_dict(),
            "plan": self.plan.model_dump(mode="json"),
        }

    def restore(self) -> None:
        """Go on from ``checkpoint_last.pt``.

        Raises:
            DataError: it is damaged.
            ConfigError: it was trained with another plan.
        """
        path = self.folder / LAST
        # On the CPU, where optimisers count their steps; all else is copied to where it belongs.
        state = load_weights(path)
        check_same_plan(state, self.plan, path)
        self.averaged_network.load_state_dict(state["network"])
        self.average.n_averaged.fill_(state["num_averaged"])
        for name, part in self.parts.items():
            # Loss scaling has no state on a CPU, where a training may have begun.
            if state["training"][name]:
                part.load_state_dict(state["training"][name])
        vars(self.counters).update(state["counters"])

    @property
    def averaged_network(self) -> nn.Module:
        """The network with averaged weights: what validates and predicts."""
        network: nn.Module = self.average.module
        return network


def read_job(path: Path) -> str:
    """`Counters.job` of a checkpoint, which names the job of torchrun that wrote it.

    Raises:
        DataError: it is damaged.
    """
    return str(load_weights(path, mapped=True)["counters"].get("job", ""))


def list_settings(config: Config) -> dict[str, Any]:
    """What a training has for good once it has begun, as plain values by key.

    It is in the weights, the optimiser, the budget, the plan or the splits by then. All other
    settings are read anew whenever the training is resumed.
    """
    settings = {
        f"{section}.{name}": value
        for section, values in config.model_dump(mode="json").items()
        for name, value in values.items()
    }
    return {
        key: value
        for key, value in settings.items()
        if key.startswith(_SECTIONS) or key in _SETTINGS
    }


def check_settings(folder: Path, extends: bool) -> None:
    """Refuse a ``config.yaml`` that was edited where its training cannot follow it any more.

    Args:
        folder: of a fold; one without a checkpoint may still change.
        extends: whether it is given a new length, which may be another one.

    Raises:
        ConfigError: it was; names the settings.
        DataError: the checkpoint is damaged.
    """
    if not (folder / LAST).exists():
        return
    path = folder / "config.yaml"
    now = list_settings(Config.read_yaml(path))
    # Checkpoints of older versions keep none.
    state = load_weights(folder / LAST, mapped=True)
    begun = state.get("settings", {})
    # An extension that was killed before its first checkpoint has left its length there.
    extends |= (folder / name_config_before(state["counters"].get("extensions", 0) + 1)).exists()
    edited = [key for key, value in begun.items() if now.get(key, value) != value]
    edited = [key for key in edited if not (extends and key in _LENGTH)]
    if edited:
        said = ", ".join(f"{key} {now[key]!r} instead of {begun[key]!r}" for key in edited)
        longer = " Once finished, it is made longer by --resume with --minutes or --epochs."
        raise ConfigError(
            f"{path} has {said}; expected what the training began with and cannot change. Put it "
            f"back, or train in a new folder.{longer if set(edited) & {*_LENGTH} else ''}"
        )
