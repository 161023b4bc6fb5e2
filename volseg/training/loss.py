"""The loss of a training, from its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from volseg.config import LossConfig
from volseg.data.cases import Classes
from volseg.errors import ConfigError
from volseg.losses import (
    MultiLevelLoss,
    RegionLoss,
    ScheduledTerm,
    build_boundary_term,
    build_loss,
)
from volseg.losses.targets import Activation
from volseg.planning.architectures import find_architecture

DICE_CE = "dice_ce"
"""The loss that has weights of its own in the configuration, and leaves unknown voxels out."""
_WEIGHTS = ("dice_weight", "cross_entropy_weight")


def make_loss(
    config: LossConfig,
    network: str,
    outputs: int,
    classes: Classes,
    spacing_mm: Sequence[float],
) -> MultiLevelLoss:
    """For the outputs of a network, weighted as its source does unless the user says.

    Args:
        config: of the loss.
        network: its name.
        outputs: in training.
        classes: of the training.
        spacing_mm: of the patches.

    Raises:
        ConfigError: unknown name or option, one without effect, or a loss that cannot leave out
            voxels of unknown class where there are some.
    """
    weights = config.supervision_weights
    if weights is None:
        weights = find_architecture(network).supervision_weights.get(outputs, "halving")
    return MultiLevelLoss(
        _for_classes(_make_main(config, classes), classes),
        weights,
        target=config.supervision_target,
        resolution=config.supervision_resolution,
        decay=config.supervision_decay,
        boundary=_make_boundary(config, classes, spacing_mm),
    )


def _make_main(config: LossConfig, classes: Classes) -> nn.Module:
    if config.name == DICE_CE:
        return _make_dice_ce(config, classes)
    default = LossConfig()
    changed = [key for key in _WEIGHTS if getattr(config, key) != getattr(default, key)]
    if changed:
        raise ConfigError(
            f"loss.{changed[0]} with loss.name '{config.name}'; expected '{DICE_CE}', whose it is. "
            "Leave it out; loss.options are those of the loss."
        )
    if classes.candidates:
        raise ConfigError(
            f"loss.name '{config.name}' with voxels of unknown class; expected '{DICE_CE}', which "
            "leaves them out. Leave loss.name out."
        )
    return build_loss(config.name, _activation(classes), **config.options)


def _make_dice_ce(config: LossConfig, classes: Classes) -> nn.Module:
    own: dict[str, Any]
    if classes.regions:
        own = {"bce_weight": config.cross_entropy_weight, "ignore": bool(classes.candidates)}
    else:
        own = {
            "cross_entropy_weight": config.cross_entropy_weight,
            "candidates": classes.candidates,
        }
    own["dice_weight"] = config.dice_weight
    if taken := sorted(set(own) & set(config.options)):
        raise ConfigError(
            f"loss.options.{taken[0]} with loss.name '{DICE_CE}'; expected loss.dice_weight and "
            "loss.cross_entropy_weight, and what the dataset says. Leave it out."
        )
    return build_loss(DICE_CE, _activation(classes), **own, **config.options)


def _make_boundary(
    config: LossConfig, classes: Classes, spacing_mm: Sequence[float]
) -> ScheduledTerm | None:
    default = LossConfig()
    if config.boundary is None:
        keys = ("boundary_options", "boundary_weight", "boundary_schedule")
        for key in keys:
            if getattr(config, key) != getattr(default, key):
                raise ConfigError(f"loss.{key} without loss.boundary. Set that, or leave it out.")
        return None
    if classes.candidates:
        raise ConfigError(
            f"loss.boundary '{config.boundary}' with voxels of unknown class, next to which no "
            "boundary is known; expected none. Leave it out."
        )
    term = build_boundary_term(
        config.boundary, _activation(classes), spacing_mm, **config.boundary_options
    )
    loss = _for_classes(term, classes)
    return ScheduledTerm(loss, config.boundary_weight, config.boundary_schedule)


def _activation(classes: Classes) -> Activation:
    return "sigmoid" if classes.regions else "softmax"


def _for_classes(loss: nn.Module, classes: Classes) -> nn.Module:
    """On regions the loss compares shares of each region."""
    if not classes.regions:
        return loss
    return RegionLoss(loss, classes.region_indices, classes.num_classes, classes.candidates)
