"""Soft Dice and cross-entropy, added."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from volseg.errors import ConfigError
from volseg.losses.soft_dice import SoftDice
from volseg.losses.targets import check_weights, prepare


class DiceCrossEntropy(nn.Module):
    """Weighted sum of soft Dice loss over the foreground classes and cross-entropy over all.

    For classes that exclude each other: both terms see the softmax of the logits. The first is
    `volseg.losses.SoftDice`, with its references.
    """

    def __init__(
        self,
        dice_weight: float = 1.0,
        cross_entropy_weight: float = 1.0,
        *,
        squared_denominator: bool = False,
        include_background: bool = False,
        ignore: bool = False,
    ) -> None:
        """Build the loss.

        Args:
            dice_weight: of ``1 - Dice``; at least 0.
            cross_entropy_weight: of the cross-entropy in nats per voxel; at least 0.
            squared_denominator: sum squares in the denominator of Dice.
            include_background: count the background in Dice; the cross-entropy always does.
            ignore: leave voxels out whose integer target is K, one more than the last class.

        Raises:
            ConfigError: a negative weight, or none above zero.
        """
        super().__init__()
        check_weights(
            f"dice_weight {dice_weight} and cross_entropy_weight {cross_entropy_weight}",
            (dice_weight, cross_entropy_weight),
        )
        self.dice_weight = dice_weight
        self.cross_entropy_weight = cross_entropy_weight
        self.dice = SoftDice("softmax", squared_denominator, include_background, ignore=ignore)
        self.ignore = ignore
        self.activation = self.dice.activation

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compare logits with the reference.

        Args:
            logits: (B, K, *S), background first; K at least 2.
            target: (B, *S) or (B, 1, *S), integer class indices below K; or (B, K, *S), shares of
                the classes in [0, 1], with sum 1.

        Returns:
            A scalar.

        Raises:
            ConfigError: shapes that do not belong together.
        """
        logits, target = prepare(logits, target, self.dice.min_channels)
        labels = target if target.is_floating_point() else target[:, 0].long()
        cross_entropy = self._cross_entropy(logits, labels)
        dice: torch.Tensor = self.dice(logits, target)
        return self.dice_weight * dice + self.cross_entropy_weight * cross_entropy

    def _cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if not self.ignore:
            return functional.cross_entropy(logits, labels)
        if labels.is_floating_point():
            raise ConfigError("ignore with a floating target; expected integer class indices.")
        # A mean over no voxel would be nan.
        left_out = logits.shape[1]
        total = functional.cross_entropy(logits, labels, ignore_index=left_out, reduction="sum")
        return total / (labels != left_out).sum().clamp(min=1)
