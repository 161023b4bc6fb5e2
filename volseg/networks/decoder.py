"""From features of falling resolution back to full resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from volseg.networks.layers import ConvStack, make_upsampling


class ConcatLevel(nn.Module):
    """Upsample the coarser features, join the skip connection behind them, convolve."""

    def __init__(self, upsampling: nn.Module, convs: nn.Module) -> None:
        """Keep the two parts.

        Args:
            upsampling: brings the coarser features to the size and width of the skip connection.
            convs: takes twice that width.
        """
        super().__init__()
        self.upsampling = upsampling
        self.convs = convs

    def forward(self, coarse: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Join ``(B, C_coarse, *S_coarse)`` and ``(B, C, *S)`` to ``(B, C, *S)``."""
        x: torch.Tensor = self.convs(torch.cat([self.upsampling(coarse), skip], dim=1))
        return x


class ConcatDecoder(nn.Module):
    """One `ConcatLevel` for every encoder level but the coarsest."""

    def __init__(
        self,
        spatial_dims: int,
        *,
        channels: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernel_sizes: Sequence[Sequence[int]],
        num_convs: int,
        norm: str,
        activation: str,
    ) -> None:
        """Build one step per level; features keep the encoder's width at every level.

        Args:
            spatial_dims: 2 or 3.
            channels: of the encoder, per level.
            strides: of the encoder, per level and axis; each upsampling undoes one.
            kernel_sizes: of the encoder, per level and axis.
            num_convs: per level.
            norm: as in `ConvNormAct`.
            activation: as in `ConvNormAct`.
        """
        super().__init__()
        # In order of execution, coarsest first: TorchScript cannot walk a ModuleList backwards.
        self.steps = nn.ModuleList(
            ConcatLevel(
                make_upsampling(
                    spatial_dims, channels[level + 1], channels[level], strides[level + 1]
                ),
                ConvStack(
                    spatial_dims,
                    2 * channels[level],
                    channels[level],
                    num_convs=num_convs,
                    kernel_size=kernel_sizes[level],
                    norm=norm,
                    activation=activation,
                ),
            )
            for level in reversed(range(len(channels) - 1))
        )

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Take the encoder's features, finest first; give the decoder's, finest first."""
        x = features[-1]
        decoded: list[torch.Tensor] = []
        for index, step in enumerate(self.steps):
            x = step(x, features[-2 - index])
            decoded.append(x)
        return decoded[::-1]
