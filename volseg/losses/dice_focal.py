"""Soft Dice and focal cross-entropy, added."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from volseg.errors import ConfigError
from volseg.losses.soft_dice import SoftDice
from volseg.losses.targets import Activation, check_weights, is_number, prepare, to_channels


class DiceFocal(nn.Module):
    """Weighted sum of soft Dice loss and a cross-entropy that voxels count in by their error.

    A voxel whose class has the probability ``p`` counts ``(1 - p) ** gamma`` times: what is easy
    fades. With `gamma` 0 it is the cross-entropy, summed over classes under softmax, averaged over
    channels under sigmoid, and averaged over voxels. A share between 0 and 1 weighs both outcomes.

    References:
        T.-Y. Lin et al.: Focal Loss for Dense Object Detection, 2017, doi 10.1109/ICCV.2017.324.
        W. Zhu et al.: AnatomyNet, 2019, doi 10.1002/mp.13300 (with Dice).
    """

    def __init__(
        self,
        activation: Activation = "softmax",
        dice_weight: float = 1.0,
        focal_weight: float = 1.0,
        *,
        gamma: float = 2.0,
    ) -> None:
        """Build the loss.

        Args:
            activation: ``"softmax"`` for classes that exclude each other, ``"sigmoid"`` for
                channels that do not.
            dice_weight: of ``1 - Dice``; at least 0.
            focal_weight: of the focal cross-entropy in nats per voxel; at least 0.
            gamma: 0, or at least 1.

        Raises:
            ConfigError: an unknown activation, a negative weight, none above zero, or another
                `gamma`.
        """
        super().__init__()
        check_weights(
            f"dice_weight {dice_weight} and focal_weight {focal_weight}",
            (dice_weight, focal_weight),
        )
        # Between 0 and 1 the gradient is infinite where a prediction is certain.
        if not is_number(gamma) or not (gamma == 0 or gamma >= 1):
            raise ConfigError(f"gamma {gamma!r}; expected 0, or at least 1, a number.")
        self.dice_weight, self.focal_weight, self.gamma = dice_weight, focal_weight, gamma
        self.dice = SoftDice(activation)
        self.activation = activation

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compare logits with the reference.

        Args:
            logits: (B, K, *S).
            target: (B, *S) or (B, 1, *S), integer class indices; or (B, K, *S), shares in [0, 1].

        Returns:
            A scalar.

        Raises:
            ConfigError: shapes that do not belong together.
        """
        logits, target = prepare(logits, target, self.dice.min_channels)
        dice: torch.Tensor = self.dice(logits, target)
        shares = target
        if not target.is_floating_point():
            shares = to_channels(target, logits.shape[1], logits.dtype)
        compare = self._compare_channels if self.activation == "sigmoid" else self._compare_classes
        focal = compare(logits, shares)
        return self.dice_weight * dice + self.focal_weight * focal

    def _compare_classes(self, logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        log_p = logits.log_softmax(1)
        # Rounding may put a probability above 1.
        miss = (1 - log_p.exp()).clamp(min=0)
        return -(miss**self.gamma * log_p * shares).sum(1).mean()

    def _compare_channels(self, logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        log_p, log_q = functional.logsigmoid(logits), functional.logsigmoid(-logits)
        inside = -(self.gamma * log_q).exp() * log_p
        outside = -(self.gamma * log_p).exp() * log_q
        return (shares * inside + (1 - shares) * outside).mean()
