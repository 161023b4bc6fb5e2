"""Binary cross-entropy and soft Dice, added."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from volseg.errors import ConfigError
from volseg.losses.soft_dice import SoftDice
from volseg.losses.targets import check_weights, prepare, to_channels


class BinaryCrossEntropyDice(nn.Module):
    """Weighted sum of binary cross-entropy and soft Dice loss, for channels that may overlap.

    Both terms see the sigmoid of the logits; every channel counts, the first included. The form
    that UNet++ was trained with is ``BinaryCrossEntropyDice(batch=True, smooth=1.0)``, where
    ``1 - Dice`` stands for ``-Dice``: no other gradient, and never below 0.

    References:
        Z. Zhou et al.: UNet++: A Nested U-Net Architecture for Medical Image Segmentation, 2018,
        doi 10.1007/978-3-030-00889-5_1.
    """

    def __init__(
        self,
        bce_weight: float = 0.5,
        dice_weight: float = 1.0,
        *,
        squared_denominator: bool = False,
        batch: bool = False,
        smooth: float = 1e-5,
        ignore: bool = False,
        batch_dice: bool = False,
    ) -> None:
        """Build the loss.

        Args:
            bce_weight: of the cross-entropy in nats per voxel and channel; at least 0.
            dice_weight: of ``1 - Dice``; at least 0.
            squared_denominator: sum squares in the denominator of Dice.
            batch: one Dice over all samples and channels together, not the mean of one for each.
            smooth: added to numerator and denominator of Dice, in voxels; above 0.
            ignore: leave out what has a negative share in a floating target.
            batch_dice: one Dice per channel over all samples of a batch, not one for each.

        Raises:
            ConfigError: a negative weight, none above zero, `smooth` not above 0, or `batch` with
                `batch_dice`.
        """
        super().__init__()
        check_weights(
            f"bce_weight {bce_weight} and dice_weight {dice_weight}", (bce_weight, dice_weight)
        )
        if batch and batch_dice:
            raise ConfigError("batch and batch_dice are both set; expected one of them. Drop one.")
        self.bce_weight = bce_weight
        self.dice_weight = dice_weight
        self.batch = batch
        self.ignore = ignore
        self.dice = SoftDice(
            "sigmoid", squared_denominator, smooth=smooth, ignore=ignore, batch=batch_dice
        )

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compare logits with the reference.

        Args:
            logits: (B, K, *S).
            target: (B, *S) or (B, 1, *S), integer class indices, with K = 1 of 0 and 1; or
                (B, K, *S), shares in [0, 1].

        Returns:
            A scalar.

        Raises:
            ConfigError: shapes that do not belong together.
        """
        logits, target = prepare(logits, target, self.dice.min_channels)
        if not target.is_floating_point():
            target = to_channels(target, logits.shape[1], logits.dtype)
        cross_entropy = self._cross_entropy(logits, target)
        if self.batch:
            logits, target = logits.reshape(1, 1, -1), target.reshape(1, 1, -1)
        dice: torch.Tensor = self.dice(logits, target)
        return self.bce_weight * cross_entropy + self.dice_weight * dice

    def _cross_entropy(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if not self.ignore:
            return functional.binary_cross_entropy_with_logits(logits, target)
        is_known = (target >= 0).to(logits.dtype)
        total = functional.binary_cross_entropy_with_logits(
            logits, target * is_known, weight=is_known, reduction="sum"
        )
        return total / is_known.sum().clamp(min=1)
