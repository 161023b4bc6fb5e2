"""A target at a coarser resolution: what is left of each block of voxels."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType

import torch
from torch.nn import functional

from volseg.errors import ConfigError
from volseg.losses.targets import to_channels


def subsample(target: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Take the middle voxel of each block: nearest neighbour, as a view of `target`.

    A block of even size has two, of which the later one counts.

    Args:
        target: (..., *S).
        size: spatial, a divisor of S per axis.

    Raises:
        ConfigError: it does not divide.

    >>> subsample(torch.arange(6), (3,)).tolist()
    [1, 3, 5]
    """
    steps = _block(target, size)
    index: tuple[EllipsisType | slice, ...] = (..., *(slice(s // 2, None, s) for s in steps))
    return target[index]


def average(target: torch.Tensor, size: Sequence[int], num_channels: int) -> torch.Tensor:
    """Take the share of each class in each block.

    Args:
        target: (B, 1, *S), integer; or (B, K, *S), shares already.
        size: spatial, a divisor of S per axis.
        num_channels: K, as in `volseg.losses.targets.to_channels`.

    Returns:
        (B, K, *size), floating.

    Raises:
        ConfigError: it does not divide.

    >>> average(torch.tensor([[[0, 0, 0, 1, 1, 1]]]), (3,), 2).tolist()
    [[[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]]]
    """
    _block(target, size)
    shares = target if target.is_floating_point() else to_channels(target, num_channels)
    return functional.interpolate(shares, size=tuple(size), mode="area")


def pick_foreground(target: torch.Tensor, size: Sequence[int], num_channels: int) -> torch.Tensor:
    """Take the most frequent foreground class of each block that has any, so that none is lost.

    Args:
        target: (B, 1, *S), integer.
        size: spatial, a divisor of S per axis.
        num_channels: K, as in `volseg.losses.targets.to_channels`.

    Returns:
        (B, 1, *size), integer: of equally frequent classes the first, background where there is no
        foreground.

    Raises:
        ConfigError: it does not divide.

    >>> pick_foreground(torch.tensor([[[0, 0, 0, 0, 0, 2, 1, 0, 2, 2, 1, 0]]]), (3,), 3).tolist()
    [[[0, 1, 2]]]
    """
    shares = average(target, size, num_channels)
    foreground = shares[:, 1:] if num_channels > 1 else shares
    most, label = foreground.max(1, keepdim=True)
    return torch.where(most > 0, label + 1, 0).to(target.dtype)


def _block(target: torch.Tensor, size: Sequence[int]) -> list[int]:
    fine = target.shape[target.dim() - len(size) :]
    if any(n % m for n, m in zip(fine, size, strict=True)):
        raise ConfigError(f"logits of size {tuple(size)}; expected a divisor of {tuple(fine)}.")
    return [n // m for n, m in zip(fine, size, strict=True)]
