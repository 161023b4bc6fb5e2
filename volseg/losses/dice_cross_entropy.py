"""Soft Dice and cross-entropy, added."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from volseg.errors import ConfigError
from volseg.losses.soft_dice import SoftDice
from volseg.losses.targets import check_weights, look_up, make_candidates, prepare


class DiceCrossEntropy(nn.Module):
    """Weighted sum of soft Dice loss over the foreground classes and cross-entropy over all.

    For classes that exclude each other: both terms see the softmax of the logits. The first is
    `volseg.losses.SoftDice`, with its references.

    References:
        G. Shi, L. Xiao, Y. Chen, S. K. Zhou: Marginal loss and exclusion loss for partially
        supervised multi-organ segmentation, 2021, doi 10.1016/j.media.2021.101979 (`candidates`;
        here Dice leaves uncertain voxels out instead of summing their classes).
    """

    def __init__(
        self,
        dice_weight: float = 1.0,
        cross_entropy_weight: float = 1.0,
        *,
        squared_denominator: bool = False,
        include_background: bool = False,
        batch_dice: bool = False,
        candidates: Sequence[Sequence[int]] = (),
    ) -> None:
        """Build the loss.

        Args:
            dice_weight: of ``1 - Dice``; at least 0.
            cross_entropy_weight: of the cross-entropy in nats per voxel; at least 0.
            squared_denominator: sum squares in the denominator of Dice.
            include_background: count the background in Dice; the cross-entropy always does.
            batch_dice: one Dice per class over all samples of a batch, not one for each: where most
                samples lack most classes, as slices do, what is wrongly found counts more.
            candidates: what the integer targets K, K + 1, ... stand for: the classes that such a
                voxel may be, all of them where nothing is known. The cross-entropy is that of the
                sum of their probabilities, and they have no part in the Dice of these classes
                (marginal and exclusion, Shi et al.).

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
        self.dice = SoftDice(
            "softmax",
            squared_denominator,
            include_background,
            ignore=bool(candidates),
            batch=batch_dice,
        )
        self.candidates = tuple(tuple(classes) for classes in candidates)
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
        if self.candidates:
            return self._compare_candidates(logits, target)
        labels = target if target.is_floating_point() else target[:, 0].long()
        cross_entropy = functional.cross_entropy(logits, labels)
        return self._add(self.dice(logits, target), cross_entropy)

    def _add(self, dice: torch.Tensor, cross_entropy: torch.Tensor) -> torch.Tensor:
        return self.dice_weight * dice + self.cross_entropy_weight * cross_entropy

    def _compare_candidates(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if target.is_floating_point():
            raise ConfigError("candidates with a floating target; expected integer class indices.")
        rows = make_candidates(logits.shape[1], self.candidates).to(logits.device)
        may_be = look_up(target, rows)
        log_p = logits.log_softmax(1)
        cross_entropy = -log_p.masked_fill(~may_be, -torch.inf).logsumexp(1)
        # Where all classes are possible nothing is said. A mean over no voxel would be nan.
        says_something = (~may_be).any(1)
        mean = (cross_entropy * says_something).sum() / says_something.sum().clamp(min=1)
        is_sure = rows.sum(1, keepdim=True) == 1
        shares = look_up(target, torch.where(rows & ~is_sure, -1.0, rows.to(logits.dtype)))
        return self._add(self.dice(logits, shares), mean)
