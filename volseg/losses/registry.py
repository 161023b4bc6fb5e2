"""Losses by the names that people type."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from volseg.errors import ConfigError, check_choice
from volseg.extensions import check_name, find
from volseg.losses.binary_cross_entropy_dice import BinaryCrossEntropyDice
from volseg.losses.dice_cross_entropy import DiceCrossEntropy
from volseg.losses.own import OwnLoss

Activation = Literal["softmax", "sigmoid"]

_LOSSES: dict[str, dict[Activation, Callable[..., nn.Module]]] = {
    "dice_ce": {"softmax": DiceCrossEntropy, "sigmoid": BinaryCrossEntropyDice},
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
    make = _LOSSES[name][activation]
    for option in options:
        check_choice(f"option of loss '{name}'", option, inspect.signature(make).parameters)
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
    return OwnLoss(loss)
