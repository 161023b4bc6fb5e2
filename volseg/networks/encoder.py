"""From an image to features of falling resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from volseg.networks.layers import ConvStack


class PlainEncoder(nn.Module):
    """A stack of convolutions per level; the first of each level carries its stride."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        channels: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernel_sizes: Sequence[Sequence[int]],
        num_convs: int,
        norm: str,
        activation: str,
    ) -> None:
        """Build the levels, finest first.

        Args:
            spatial_dims: 2 or 3.
            in_channels: of the image.
            channels: per level.
            strides: per level and axis.
            kernel_sizes: per level and axis, odd.
            num_convs: per level.
            norm: as in `ConvNormAct`.
            activation: as in `ConvNormAct`.
        """
        super().__init__()
        widths = (in_channels, *channels)
        self.levels = nn.ModuleList(
            ConvStack(
                spatial_dims,
                widths[level],
                widths[level + 1],
                num_convs=num_convs,
                kernel_size=kernel_sizes[level],
                stride=strides[level],
                norm=norm,
                activation=activation,
            )
            for level in range(len(channels))
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Take ``(B, in_channels, *S)``; give the features of every level, finest first."""
        features: list[torch.Tensor] = []
        for level in self.levels:
            x = level(x)
            features.append(x)
        return features
