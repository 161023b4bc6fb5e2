"""Losses by the names that people type."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from volseg.errors import ConfigError, check_choice
from volseg.extensions import check_name, find
from volseg.losses.binary_cross_entropy_dice import BinaryCrossEntropyDice
from volseg.losses.boundary import BoundaryLoss
from volseg.losses.centreline_dice import CentrelineDice
from volseg.losses.dice_cross_entropy import DiceCrossEntropy
from volseg.losses.dice_focal import DiceFocal
from volseg.losses.hausdorff import HausdorffLoss
from volseg.losses.own import OwnLoss
from volseg.losses.surface import SurfaceLoss
from volseg.losses.targets import Activation
from volseg.losses.tversky import Tversky

Make = Callable[..., nn.Module]


def _for_both(make: Make) -> dict[Activation, Make]:
    return {"softmax": partial(make, "softmax"), "sigmoid": partial(make, "sigmoid")}


_LOSSES: dict[str, dict[Activation, Make]] = {
    "dice_ce": {"softmax": DiceCrossEntropy, "sigmoid": BinaryCrossEntropyDice},
    "dice_focal": _for_both(DiceFocal),
    "tversky": _for_both(Tversky),
    "focal_tversky": _for_both(partial(Tversky, gamma=4 / 3)),
}
_BOUNDARY_TERMS: dict[str, Make] = {
    "cldice": CentrelineDice,
    "boundary": BoundaryLoss,
    "surface": SurfaceLoss,
    "hausdorff": HausdorffLoss,
}


def list_losses() -> list[str]:
    """Names of volseg's own losses; `build_loss` knows the user's too."""
    return list(_LOSSES)


def build_loss(name: str, activation: Activation, **options: Any) -> nn.Module:
    """Build a loss of one output by name.

    Args:
        name: one of `list_losses`, or of the user's own (`volseg.extensions`).
        activation: ``"softmax"`` for classes that exclude each other, ``"sigmoid"`` for channels
            that do not. A loss of the user's own has to know it itself.
        options: keywords of the loss.

    Raises:
        ConfigError: unknown name or option, or a value that the loss refuses.

    >>> type(build_loss("dice_ce", "softmax", dice_weight=2.0)).__name__
    'DiceCrossEntropy'
    """
    check_name("losses", "loss.name", name, _LOSSES)
    if name not in _LOSSES:
        return _build_own(name, options)
    return _build(f"loss '{name}'", _LOSSES[name][activation], options)


def list_boundary_terms() -> list[str]:
    """Names that `build_boundary_term` knows."""
    return list(_BOUNDARY_TERMS)


def build_boundary_term(
    name: str, activation: Activation, spacing: Sequence[float], **options: Any
) -> nn.Module:
    """Build a loss that looks at boundaries or centrelines, a second term beside another.

    Args:
        name: one of `list_boundary_terms`.
        activation: ``"softmax"`` for classes that exclude each other, ``"sigmoid"`` for channels
            that do not.
        spacing: size of a voxel per axis; distances are measured in units of the finest one.
        options: further keywords of the term.

    Raises:
        ConfigError: unknown name or option, or a value that the term refuses.
    """
    check_choice("loss.boundary", name, _BOUNDARY_TERMS)
    make = partial(_BOUNDARY_TERMS[name], activation)
    if "spacing" in inspect.signature(make).parameters:
        relative = tuple(value / min(spacing) for value in spacing)
        options = {"spacing": relative, **options}
    return _build(f"boundary term '{name}'", make, options)


def _build(what: str, make: Make, options: dict[str, Any]) -> nn.Module:
    for option in options:
        check_choice(f"option of {what}", option, inspect.signature(make).parameters)
    return make(**options)


def _build_own(name: str, options: dict[str, Any]) -> OwnLoss:
    try:
        loss = find("losses", name)(**options)
    except ConfigError:
        raise
    except Exception as error:  # Code of others fails in its own ways.
        called = f"with the keywords {', '.join(options)}" if options else "with nothing"
        raise ConfigError(
            f"loss '{name}' cannot be built ({type(error).__name__}: {error}). It is called "
            f"{called}; --debug shows where it fails."
        ) from error
    if not isinstance(loss, nn.Module):
        raise ConfigError(f"loss '{name}' is a {type(loss).__name__}; expected a torch.nn.Module.")
    learnt = [key for key, value in loss.named_parameters() if value.requires_grad]
    if learnt:
        raise ConfigError(
            f"loss '{name}' has the parameter {learnt[0]}, which no optimiser would train; "
            "expected a loss without any. Make it a buffer."
        )
    return OwnLoss(loss)
