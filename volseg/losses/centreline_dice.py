"""Dice of centrelines, for vessels and other thin structures."""

from __future__ import annotations

import torch
from monai.losses import SoftclDiceLoss

from volseg.errors import ConfigError
from volseg.losses.foreground import ForegroundLoss
from volseg.losses.targets import Activation


class CentrelineDice(ForegroundLoss):
    """One minus soft clDice, taken per sample and channel, then averaged.

    Of the predicted centrelines as much as possible shall lie in the reference, and of its
    centrelines as much as possible in the prediction: a gap in a vessel costs more than a voxel of
    its wall. Centrelines are what repeated erosion leaves.

    References:
        S. Shit et al.: clDice - a Novel Topology-Preserving Loss Function for Tubular Structure
        Segmentation, 2021, doi 10.1109/CVPR46437.2021.01629.
    """

    def __init__(self, activation: Activation = "softmax", *, iterations: int = 5) -> None:
        """Build the loss.

        Args:
            activation: see `ForegroundLoss`.
            iterations: of the erosion; at least the largest radius in voxels.

        Raises:
            ConfigError: an unknown activation, or `iterations` is no whole number above 0.
        """
        super().__init__(activation)
        if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
            raise ConfigError(f"iterations {iterations!r}; expected a whole number from 1.")
        self.centreline_dice = SoftclDiceLoss(iter_=iterations)

    def compare(self, probabilities: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """See `ForegroundLoss`."""
        # MONAI adds up the channels of a sample; one each keeps thick and thin classes apart.
        one_each = (tensor.flatten(0, 1).unsqueeze(1) for tensor in (probabilities, shares))
        loss: torch.Tensor = self.centreline_dice(*one_each)
        return loss
