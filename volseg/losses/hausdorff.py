"""An estimate of the Hausdorff distance that has a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from volseg.losses.distances import measure_distances
from volseg.losses.foreground import ForegroundLoss
from volseg.losses.targets import Activation, check_above_zero


class HausdorffLoss(ForegroundLoss):
    """Mean over voxels of squared error, times distances to both boundaries to the power `alpha`.

    The boundaries are those of the reference and of the prediction, which is what has a
    probability above 0.5. One that is nowhere or everywhere in a patch has none, at distance 0.

    `monai.losses.HausdorffDTLoss` is the same for cubic voxels.

    References:
        D. Karimi, S. E. Salcudean: Reducing the Hausdorff Distance in Medical Image Segmentation
        With Convolutional Neural Networks, 2020, doi 10.1109/TMI.2019.2930068.
    """

    def __init__(
        self,
        activation: Activation = "softmax",
        *,
        alpha: float = 2.0,
        spacing: Sequence[float] | None = None,
    ) -> None:
        """Build the loss.

        Args:
            activation: see `ForegroundLoss`.
            alpha: how much large distances count; above 0.
            spacing: size of a voxel per axis, in units of the finest one; 1 each by default.

        Raises:
            ConfigError: an unknown activation, or `alpha` is not above 0.
        """
        super().__init__(activation)
        check_above_zero("alpha", alpha)
        self.alpha, self.spacing = alpha, spacing

    def compare(self, probabilities: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """See `ForegroundLoss`."""
        both = torch.stack([shares > 0.5, probabilities > 0.5])
        distances = measure_distances(both.flatten(0, 1), self.spacing).abs() ** self.alpha
        far = distances.reshape(both.shape).sum(0)
        return ((probabilities - shares) ** 2 * far).mean()
