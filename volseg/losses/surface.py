"""Generalised surface loss: errors weighed by their distance to the boundary, between 0 and 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from volseg.losses.distances import measure_distances
from volseg.losses.foreground import ForegroundLoss
from volseg.losses.targets import Activation

_SMOOTH = 1e-5


class SurfaceLoss(ForegroundLoss):
    """``1 - |d (1 - t - p)|^2 / |d|^2`` per sample and channel, then averaged.

    ``d`` is the distance to the boundary of the reference ``t``, ``p`` the probability: 0 where the
    prediction is the reference, 1 where it is the opposite. The source weighs classes by weights of
    its choice; here each has its own denominator. A class without a boundary in a patch adds 0.

    References:
        A. Celaya, B. Riviere, D. Fuentes: A Generalized Surface Loss for Reducing the Hausdorff
        Distance in Medical Imaging Segmentation, 2023, doi 10.48550/arXiv.2302.03868.
    """

    def __init__(
        self, activation: Activation = "softmax", *, spacing: Sequence[float] | None = None
    ) -> None:
        """Build the loss.

        Args:
            activation: see `ForegroundLoss`.
            spacing: size of a voxel per axis, in any unit; 1 each by default.

        Raises:
            ConfigError: an unknown activation.
        """
        super().__init__(activation)
        self.spacing = spacing

    def compare(self, probabilities: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """See `ForegroundLoss`."""
        inside = shares > 0.5
        squares = measure_distances(inside, self.spacing) ** 2
        hits = (squares * (1 - inside.to(squares.dtype) - probabilities) ** 2).flatten(2).sum(2)
        loss = 1 - (hits + _SMOOTH) / (squares.flatten(2).sum(2) + _SMOOTH)
        return loss.mean()
