"""Boundary loss: probabilities weighed by the distance to the reference's boundary."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from volseg.losses.distances import measure_distances
from volseg.losses.foreground import ForegroundLoss
from volseg.losses.targets import Activation


class BoundaryLoss(ForegroundLoss):
    """Mean over voxels of probability times signed distance to the reference's boundary.

    Voxels of the reference count from 0 at its boundary downwards, as in the authors' code; others
    from the distance to it upwards. Least, and negative, where the prediction is the reference. A
    class that is nowhere or everywhere in a patch has no boundary and adds nothing. Meant as a
    second term beside one on regions.

    `monai.losses.BoundaryLoss` is the same for cubic voxels.

    References:
        H. Kervadec et al.: Boundary loss for highly unbalanced segmentation, 2021,
        doi 10.1016/j.media.2020.101851 (first 2019, doi 10.48550/arXiv.1812.07032).
    """

    def __init__(
        self, activation: Activation = "softmax", *, spacing: Sequence[float] | None = None
    ) -> None:
        """Build the loss.

        Args:
            activation: see `ForegroundLoss`.
            spacing: size of a voxel per axis, in units of the finest one; 1 each by default.

        Raises:
            ConfigError: an unknown activation.
        """
        super().__init__(activation)
        self.spacing = spacing

    def compare(self, probabilities: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """See `ForegroundLoss`."""
        distances = measure_distances(shares > 0.5, self.spacing)
        return (probabilities * torch.where(distances < 0, distances + 1, distances)).mean()
