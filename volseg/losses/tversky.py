"""Tversky loss, also focal: false positives and false negatives weighed apart."""

from __future__ import annotations

import torch
from monai.losses import TverskyLoss

from volseg.errors import ConfigError
from volseg.losses.foreground import ForegroundLoss
from volseg.losses.targets import Activation, check_weights, is_number


class Tversky(ForegroundLoss):
    """One minus the Tversky index, taken per sample and channel, raised to ``1 / gamma``, averaged.

    The index is ``tp / (tp + alpha * fp + beta * fn)``, Dice for `alpha` and `beta` of 0.5; more
    `beta` finds more of a small structure. A `gamma` above 1 lets classes that are found badly pull
    more.

    References:
        S. S. M. Salehi, D. Erdogmus, A. Gholipour: Tversky Loss Function for Image Segmentation
        Using 3D Fully Convolutional Deep Networks, 2017, doi 10.1007/978-3-319-67389-9_44.
        N. Abraham, N. M. Khan: A Novel Focal Tversky Loss Function with Improved Attention U-Net
        for Lesion Segmentation, 2019, doi 10.1109/ISBI.2019.8759329 (`gamma`).
    """

    def __init__(
        self,
        activation: Activation = "softmax",
        *,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 1.0,
        smooth: float = 1e-5,
    ) -> None:
        """Build the loss.

        Args:
            activation: see `ForegroundLoss`.
            alpha: of false positives; at least 0.
            beta: of false negatives; at least 0.
            gamma: at least 1; 4/3 in the source of the focal form.
            smooth: added to numerator and denominator, in voxels; above 0.

        Raises:
            ConfigError: an unknown activation, or a number out of its range.
        """
        super().__init__(activation)
        check_weights(f"alpha {alpha} and beta {beta}", (alpha, beta))
        if not is_number(gamma) or not gamma >= 1:
            raise ConfigError(f"gamma {gamma!r}; expected at least 1, a number.")
        if not is_number(smooth) or not smooth > 0:
            raise ConfigError(f"smooth {smooth!r}; expected above 0, a number.")
        self.gamma = gamma
        self.index = TverskyLoss(
            alpha=alpha,
            beta=beta,
            smooth_nr=smooth,
            smooth_dr=smooth,
            reduction="none",
            soft_label=True,
        )

    def compare(self, probabilities: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """See `ForegroundLoss`."""
        loss: torch.Tensor = self.index(probabilities, shares)
        if self.gamma != 1:
            # A root has no finite slope at 0.
            loss = loss.clamp(min=1e-6) ** (1 / self.gamma)
        return loss.mean()
