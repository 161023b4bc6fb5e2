"""Soft Dice alone."""

from __future__ import annotations

from typing import Literal

import torch
from monai.losses import DiceLoss
from torch import nn

from volseg.errors import ConfigError
from volseg.losses.targets import is_number, prepare, to_channels


class SoftDice(nn.Module):
    """One minus soft Dice, taken per channel and sample, or batch, then averaged.

    The denominator holds sums of probabilities (Drozdzal et al.) or of their squares (Milletari et
    al.). `smooth` is added above and below, which gives a class that is absent and nowhere
    predicted a loss of 0.

    On a soft target twice the product of probability and share would pull every probability to 0
    or 1. With sums of probabilities, ``p + g - |p - g|`` stands in its place: the same for shares
    of 0 and 1, and least where probability and share agree (Wang et al.).

    References:
        F. Milletari, N. Navab, S.-A. Ahmadi: V-Net, 2016, doi 10.1109/3DV.2016.79.
        M. Drozdzal et al.: The Importance of Skip Connections in Biomedical Image Segmentation,
        2016, doi 10.1007/978-3-319-46976-8_19.
        Z. Wang et al.: Dice Semimetric Losses, 2023, doi 10.1007/978-3-031-43898-1_46.
    """

    def __init__(
        self,
        activation: Literal["softmax", "sigmoid"] = "softmax",
        squared_denominator: bool = False,
        include_background: bool | None = None,
        smooth: float = 1e-5,
        ignore: bool = False,
        batch: bool = False,
    ) -> None:
        """Build the loss.

        Args:
            activation: ``"softmax"`` for classes that exclude each other, ``"sigmoid"`` for
                channels that do not.
            squared_denominator: sum the squares of probabilities and reference below.
            include_background: count channel 0 as well; by default under ``"sigmoid"`` only.
            smooth: added to numerator and denominator, in voxels; above 0.
            ignore: leave out what has a negative share in a floating target.
            batch: one Dice per channel over all samples, as if they were one.

        Raises:
            ConfigError: an unknown activation, or `smooth` not above 0.
        """
        super().__init__()
        if activation not in ("softmax", "sigmoid"):
            raise ConfigError(f"activation '{activation}'; expected softmax or sigmoid.")
        if not is_number(smooth) or not smooth > 0:
            raise ConfigError(f"smooth {smooth!r}; expected above 0, a number.")
        self.activation = activation
        is_sigmoid = activation == "sigmoid"
        if include_background is None:
            include_background = is_sigmoid
        self.min_channels = 1 if is_sigmoid and include_background else 2
        options = {
            activation: True,
            "squared_pred": squared_denominator,
            "include_background": include_background,
            "smooth_nr": smooth,
            "smooth_dr": smooth,
            "batch": batch,
        }
        self.hard = DiceLoss(**options)
        self.soft = DiceLoss(**options, soft_label=True)
        self.ignore = ignore
        # What is left out must be zero behind the activation.
        self.masked = DiceLoss(**{**options, activation: False}, soft_label=True)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compare logits with the reference.

        Args:
            logits: (B, K, *S); K at least 2, or 1 under a sigmoid that includes channel 0.
            target: (B, *S) or (B, 1, *S), integer class indices, with K = 1 of 0 and 1; or
                (B, K, *S), shares in [0, 1].

        Returns:
            A scalar.

        Raises:
            ConfigError: shapes that do not belong together.
        """
        logits, target = prepare(logits, target, self.min_channels)
        loss: torch.Tensor
        if target.is_floating_point():
            loss = self._compare_shares(logits, target)
        else:
            loss = self.hard(logits, to_channels(target, logits.shape[1]))
        return loss

    def _compare_shares(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor
        if not self.ignore:
            loss = self.soft(logits, target)
            return loss
        probabilities = logits.sigmoid() if self.activation == "sigmoid" else logits.softmax(1)
        is_known = target >= 0
        loss = self.masked(probabilities * is_known, target * is_known)
        return loss
