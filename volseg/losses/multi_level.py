"""One loss for all levels of a network with deep supervision."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Literal

import torch
from torch import nn

from volseg.errors import ConfigError


class MultiLevelLoss(nn.Module):
    """Weighted sum of one loss over logits of several resolutions.

    The target is brought to each level by taking the voxel in the middle of each block, so it
    stays integer; a block of even size has two, of which the later one counts.

    References:
        C.-Y. Lee et al.: Deeply-Supervised Nets, 2015, doi 10.48550/arXiv.1409.5185.
        F. Isensee et al.: nnU-Net, 2021, doi 10.1038/s41592-020-01008-z (halved weights).
    """

    def __init__(
        self, loss: nn.Module, weights: Literal["halving"] | Sequence[float] = "halving"
    ) -> None:
        """Wrap a loss.

        Args:
            loss: of logits (B, K, *S) and a target (B, *S) or (B, 1, *S).
            weights: one per level, finest first, used as they are; ``"halving"`` halves them from
                level to level, with sum 1.
        """
        super().__init__()
        self.loss = loss
        self.weights = weights if isinstance(weights, str) else tuple(weights)

    def forward(
        self, logits: torch.Tensor | Sequence[torch.Tensor], target: torch.Tensor
    ) -> torch.Tensor:
        """Compare the logits of all levels with the reference.

        Args:
            logits: per level (B, K, *S_level), finest first; or one tensor, with weight 1.
            target: (B, *S) or (B, 1, *S), integer class indices at full resolution.

        Returns:
            A scalar.

        Raises:
            ConfigError: no level, another number of weights than of levels, or a level whose size
                does not divide the target's.
        """
        if isinstance(logits, torch.Tensor):
            loss: torch.Tensor = self.loss(logits, target)
            return loss
        weights = self._weights(len(logits))
        losses = [self.loss(level, subsample(target, level.shape[2:])) for level in logits]
        return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()

    def _weights(self, num_levels: int) -> Sequence[float]:
        if self.weights == "halving" and num_levels:
            total = 2 - 2.0 ** (1 - num_levels)
            return [0.5**level / total for level in range(num_levels)]
        if isinstance(self.weights, str) or len(self.weights) != num_levels:
            raise ConfigError(
                f"logits of {num_levels} levels and weights {self.weights}; expected one weight "
                "per level."
            )
        return self.weights


def subsample(target: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Take the middle voxel of each block: nearest neighbour, as a view of `target`.

    Args:
        target: (..., *S).
        size: spatial, a divisor of S per axis.

    Raises:
        ConfigError: it does not divide.

    >>> subsample(torch.arange(6), (3,)).tolist()
    [1, 3, 5]
    """
    fine = target.shape[target.dim() - len(size) :]
    if any(n % m for n, m in zip(fine, size, strict=True)):
        raise ConfigError(f"logits of size {tuple(size)}; expected a divisor of {tuple(fine)}.")
    steps = [n // m for n, m in zip(fine, size, strict=True)]
    index: tuple[EllipsisType | slice, ...] = (..., *(slice(s // 2, None, s) for s in steps))
    return target[index]
