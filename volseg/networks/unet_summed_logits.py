"""The 3D U-Net whose levels add their logits up to one output.

::

    16    image > [unit] [unit unit] ------- skip -------> [cat unit unit] > head ---- + > logits
                              v strided unit                     ^ nearest, unit       ^ x2
    32                   [unit unit] -- skip --> [cat unit unit] + > head ------------ +
                              v                        ^                               ^ x2
    64                   [unit unit] --> ...           + > head -----------------------+
    ...
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from volseg.networks.decoder import ConcatLevel
from volseg.networks.layers import (
    ConvStack,
    NormSpec,
    Size,
    Style,
    Unit,
    check_count,
    check_flag,
    initialise_he_,
    make_conv,
    make_nearest,
)
from volseg.networks.levels import Levels, make_levels
from volseg.networks.network import SegmentationNetwork


class SummedLogitsUNet(SegmentationNetwork):
    """A U-Net with strided convolutions and heads whose logits are upsampled and added.

    The auxiliary heads belong to the output: the network gives one tensor in training too, and
    one loss reaches all levels through it. The source has at most two auxiliary heads and fails
    with two levels; here `num_auxiliary` asks for as many as the depth has room for. Strided
    convolutions are padded on both sides, TensorFlow's of the source behind only.

    References:
        F. Isensee et al.: Brain Tumor Segmentation and Radiomics Survival Prediction, 2018, doi
        10.1007/978-3-319-75238-9_25, and B. Kayalibay et al.: CNN-based Segmentation of Medical
        Imaging Data, 2017, doi 10.48550/arXiv.1701.03056, for the summed logits; a public
        TensorFlow network for BraTS 2018 for the layers.

    >>> network = SummedLogitsUNet(3, 4, 3, channels=(4, 8, 16, 32)).train()
    >>> network(torch.zeros(1, 4, 16, 16, 16)).shape
    torch.Size([1, 3, 16, 16, 16])
    """

    def __init__(  # noqa: PLR0913  # options by keyword
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (16, 32, 64, 128, 256),
        strides: Sequence[Size] | None = None,
        kernel_sizes: Sequence[Size] | None = None,
        num_auxiliary: int = 2,
        residual: bool = True,
        norm: NormSpec = "instance",
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        """Build the network with He initialisation.

        Args:
            spatial_dims: 2 or 3.
            in_channels: channels of the image.
            out_channels: classes, background counted.
            channels: feature maps per level, finest first; two levels or more.
            strides: per level, one or per axis; the first is 1. By default 1, then 2.
            kernel_sizes: per level, odd, one or per axis. By default 3.
            num_auxiliary: heads besides the finest level's, at most; levels between the coarsest
                and the finest can have one. 0 for a plain U-Net.
            residual: add the input of an encoder level's two convolutions to their output.
            norm: name, or name and options.
            activation: see `volseg.networks.layers.Style`.
            dropout: probability that a channel is set to zero behind a convolution in training.

        Raises:
            ConfigError: lengths that differ, a negative number, or an unknown name.
        """
        levels = make_levels(spatial_dims, channels, strides, kernel_sizes)
        channels = levels.channels
        num_auxiliary = check_count("num_auxiliary", num_auxiliary, at_least=0)
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            total_stride=levels.total_strides[-1],
            norm=norm,
        )
        style = Style(spatial_dims, norm, activation, dropout=dropout)
        self.residual = check_flag("residual", residual)
        depth = len(channels)
        before = (self.in_channels, *channels)
        self.transitions = nn.ModuleList(
            Unit(style, before[i], channels[i], levels.kernel_sizes[i], levels.strides[i])
            for i in range(depth)
        )
        self.encoder = nn.ModuleList(
            ConvStack(style, channels[i], channels[i], kernel_size=levels.kernel_sizes[i])
            for i in range(depth)
        )
        self.decoder = _make_decoder(style, levels)
        num_heads = 1 + min(num_auxiliary, depth - 2)
        self.heads = nn.ModuleList(
            make_conv(spatial_dims, channels[i], self.out_channels)
            if i < num_heads
            else nn.Identity()
            for i in reversed(range(depth - 1))
        )
        self.upsamplings = nn.ModuleList(
            make_nearest(stride, spatial_dims) for stride in levels.strides[:0:-1]
        )
        self.num_heads = num_heads
        initialise_he_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Segment ``(B, in_channels, *S)``.

        Returns:
            Logits ``(B, out_channels, *S)``: the sum over all heads.

        Raises:
            ConfigError: a shape that the network cannot take.
        """
        self.check_input(x)
        features: list[torch.Tensor] = []
        for transition, level in zip(self.transitions, self.encoder, strict=True):
            x = transition(x)
            x = x + level(x) if self.residual else level(x)
            features.append(x)
        first = len(features) - 1 - self.num_heads
        logits: list[torch.Tensor] = []
        for index, (level, head, up) in enumerate(
            zip(self.decoder, self.heads, self.upsamplings, strict=True)
        ):
            features.append(level(features))
            if index == first:
                logits.append(head(features[-1]))
            elif index > first:
                logits.append(head(features[-1]) + up(logits[-1]))
        return logits[-1]


def _make_decoder(style: Style, levels: Levels) -> nn.ModuleList:
    """Coarsest level first: upsampling with a unit, a unit on both together, a unit of kernel 1."""
    return nn.ModuleList(
        ConcatLevel(
            nn.Sequential(
                make_nearest(levels.strides[i + 1], style.spatial_dims),
                Unit(style, levels.channels[i + 1], width, levels.kernel_sizes[i]),
            ),
            nn.Sequential(
                Unit(style, 2 * width, width, levels.kernel_sizes[i]),
                Unit(style, width, width, 1),
            ),
        )
        for i, width in reversed([*enumerate(levels.channels[:-1])])
    )
