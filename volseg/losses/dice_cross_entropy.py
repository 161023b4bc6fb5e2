"""Soft Dice and cross-entropy, added."""

from __future__ import annotations

import torch
from monai.losses import DiceCELoss
from torch import nn

from volseg.errors import ConfigError


class DiceCrossEntropy(nn.Module):
    """Weighted sum of soft Dice loss over the foreground classes and cross-entropy over all.

    Dice is taken per sample and class, then averaged. Its denominator holds sums of probabilities
    (Drozdzal et al.), not of their squares (Milletari et al.); 1e-5 is added above and below, which
    gives a class that is absent and nowhere predicted a loss of 0.

    References:
        F. Milletari, N. Navab, S.-A. Ahmadi: V-Net, 2016, doi 10.1109/3DV.2016.79.
        M. Drozdzal et al.: The Importance of Skip Connections in Biomedical Image Segmentation,
        2016, doi 10.1007/978-3-319-46976-8_19.
    """

    def __init__(self, dice_weight: float = 1.0, cross_entropy_weight: float = 1.0) -> None:
        """Build the loss.

        Args:
            dice_weight: of ``1 - Dice``; at least 0.
            cross_entropy_weight: of the cross-entropy in nats per voxel; at least 0.

        Raises:
            ConfigError: a negative weight, or none above zero.
        """
        super().__init__()
        weights = (dice_weight, cross_entropy_weight)
        if min(weights) < 0 or sum(weights) == 0:
            raise ConfigError(
                f"dice_weight {dice_weight} and cross_entropy_weight {cross_entropy_weight}; "
                "expected at least 0, and one of them above."
            )
        self.loss = DiceCELoss(
            include_background=False,
            to_onehot_y=True,
            softmax=True,
            lambda_dice=dice_weight,
            lambda_ce=cross_entropy_weight,
        )

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compare logits with the reference.

        Args:
            logits: (B, K, *S), background first; K at least 2.
            target: (B, *S) or (B, 1, *S), integer class indices below K.

        Returns:
            A scalar.

        Raises:
            ConfigError: shapes that do not belong together, or a target that is not integer.
        """
        if target.dim() == logits.dim() - 1:
            target = target.unsqueeze(1)
        expected = (logits.shape[0], 1, *logits.shape[2:])
        if logits.shape[1] < 2 or target.shape != expected or target.is_floating_point():
            raise ConfigError(
                f"logits {tuple(logits.shape)} and {target.dtype} target {tuple(target.shape)}; "
                f"expected two classes or more and an integer target {expected}."
            )
        # Sums over a volume overflow in half precision.
        wide = logits.float() if logits.dtype.itemsize < 4 else logits
        loss: torch.Tensor = self.loss(wide, target)
        return loss
