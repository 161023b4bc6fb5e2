"""Targets in the forms that losses compute on, and the weights of their terms.

A target is integer class indices ``(B, *S)`` or ``(B, 1, *S)``, or floating shares ``(B, K, *S)``
in [0, 1].
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Literal

import torch

from volseg.errors import ConfigError

Activation = Literal["softmax", "sigmoid"]


def prepare(
    logits: torch.Tensor, target: torch.Tensor, min_channels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check that logits and target belong together, and widen the logits.

    Args:
        logits: (B, K, *S).
        target: (B, *S) or (B, 1, *S), integer; or (B, K, *S), floating.
        min_channels: the least K that the loss makes sense for.

    Returns:
        Logits in single precision or more. The target as (B, 1, *S), integer, or as (B, K, *S) in
        the type of these logits.

    Raises:
        ConfigError: shapes that do not belong together.
    """
    is_soft = target.is_floating_point()
    target = with_channel_axis(target, logits.dim())
    batch, channels, *size = logits.shape
    if channels < min_channels or target.shape != (batch, channels if is_soft else 1, *size):
        raise ConfigError(
            f"logits {tuple(logits.shape)} and {target.dtype} target {tuple(target.shape)}; "
            f"expected {min_channels} or more channels, and an integer target "
            f"{(batch, 1, *size)} or a floating one {(batch, channels, *size)}."
        )
    # Sums over a volume overflow in half precision.
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    return wide, target.to(wide.dtype) if is_soft else target


def with_channel_axis(target: torch.Tensor, num_axes: int) -> torch.Tensor:
    """Bring an integer target (B, *S) to (B, 1, *S), of `num_axes` axes; leave any other."""
    if target.is_floating_point() or target.dim() != num_axes - 1:
        return target
    return target.unsqueeze(1)


def to_channels(
    target: torch.Tensor, num_channels: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Turn class indices into one channel per class: 1 where the class is, 0 elsewhere.

    One channel alone stands for class 1, as the logit of a binary segmentation does. Unlike
    `monai.networks.one_hot` it takes indices of classes that have no channel: they are 0 in all.

    Args:
        target: (B, 1, *S), integer.
        num_channels: K.
        dtype: of the result.

    Returns:
        (B, K, *S).

    >>> to_channels(torch.tensor([[[0, 1, 2]]]), 2).tolist()
    [[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]
    """
    first = 1 if num_channels == 1 else 0
    classes = torch.arange(first, first + num_channels, device=target.device)
    return (target == classes.reshape(-1, *[1] * (target.dim() - 2))).to(dtype)


def compare_foreground(
    logits: torch.Tensor, target: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and shares of what is looked for.

    Args:
        logits: (B, K, *S).
        target: (B, *S) or (B, 1, *S), integer; or (B, K, *S), floating.
        activation: under ``"softmax"`` channel 0 is the background and left out.

    Returns:
        Two of (B, K or K - 1, *S).

    Raises:
        ConfigError: shapes that do not belong together.

    >>> compare_foreground(torch.zeros(1, 2, 2), torch.tensor([[0, 1]]), "softmax")
    (tensor([[[0.5000, 0.5000]]]), tensor([[[0., 1.]]]))
    """
    is_sigmoid = activation == "sigmoid"
    logits, target = prepare(logits, target, 1 if is_sigmoid else 2)
    shares = target
    if not target.is_floating_point():
        shares = to_channels(target, logits.shape[1], logits.dtype)
    if is_sigmoid:
        return logits.sigmoid(), shares
    return logits.softmax(1)[:, 1:], shares[:, 1:]


def look_up(target: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """What each index of a target stands for.

    Args:
        target: (B, 1, *S), integer.
        rows: (I, K), one row per index.

    Returns:
        (B, K, *S).

    >>> look_up(torch.tensor([[[1, 0]]]), torch.tensor([[5, 6], [7, 8]])).tolist()
    [[[7, 5], [8, 6]]]
    """
    return rows.to(target.device)[target[:, 0].long()].movedim(-1, 1)


def make_candidates(num_classes: int, candidates: Sequence[Sequence[int]]) -> torch.Tensor:
    """(I, K) bool: which classes a voxel of each label index may be.

    Args:
        num_classes: K; the indices below stand for one class each.
        candidates: per index from K on, the classes.

    Raises:
        ConfigError: a set of fewer than two classes, or of one that there is not.

    >>> make_candidates(2, [[0, 1]]).int().tolist()
    [[1, 0], [0, 1], [1, 1]]
    """
    rows = torch.eye(num_classes + len(candidates), num_classes, dtype=torch.bool)
    for row, classes in zip(rows[num_classes:], candidates, strict=True):
        known = set(classes) & set(range(num_classes))
        if len(known) < 2 or len(known) < len(classes):
            raise ConfigError(
                f"candidates {list(classes)}; expected two or more different classes below "
                f"{num_classes}."
            )
        row[list(classes)] = True
    return rows


def is_number(value: object) -> bool:
    """Whether a value is a real number (numpy's too, but no bool)."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_above_zero(what: str, value: object) -> None:
    """Refuse anything but a finite number above 0.

    Raises:
        ConfigError: it is none.
    """
    if not is_number(value) or not 0 < float(value) < math.inf:  # type: ignore[arg-type]
        raise ConfigError(f"{what} {value!r}; expected above 0, a number.")


def check_weights(what: str, weights: Sequence[float]) -> None:
    """Refuse weights that are negative, not finite, or all zero.

    Args:
        what: names and values, for the error.
        weights: to check.

    Raises:
        ConfigError: one of these.
    """
    are_numbers = all(is_number(weight) for weight in weights)
    if not are_numbers or not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise ConfigError(f"{what}; expected at least 0, and one of them above, as numbers.")
