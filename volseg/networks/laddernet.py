r"""LadderNet: two or more U-Nets in a row, joined at every level.

::

    f    image > [conv] > [B] ----------- + > [B] > [B] + > [B] ----------- + > [B] > head
                           v              ^      \_____/    v               ^
    2f                    [B] ------ + > [B] --------- + > [B] ------ + > [B]
                           v         ^                      v         ^
    4f                    [B] -------+                     [B] -------+
                          ladder 1                         ladder 2

Features are added, not concatenated; B is a residual block whose two convolutions share weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from volseg.errors import ConfigError
from volseg.networks.layers import (
    DROPOUT,
    NormSpec,
    Size,
    Style,
    Unit,
    check_flag,
    check_probability,
    is_count,
    make_activation,
    make_conv,
    make_deconv,
    make_norm,
)
from volseg.networks.levels import Levels, make_levels
from volseg.networks.network import SegmentationNetwork


class LadderNet(SegmentationNetwork):
    """Ladders of shared-weight residual blocks; each takes up the decoder of the one before.

    The authors' code returns log-probabilities, this network logits. It leaves the coarsest level
    of consecutive ladders unconnected although the paper connects every level:
    ``bottleneck_skip=True`` connects it. It has two ladders; here there can be more. Weights are
    drawn as torch does by default, as there: without normalisation, He initialisation would let
    the residual sums grow from block to block.

    References:
        J. Zhuang: LadderNet: Multi-path networks based on U-Net for medical image segmentation,
        2018, doi 10.48550/arXiv.1810.07810.

    >>> network = LadderNet(2, 1, 2, channels=(4, 8, 16)).eval()
    >>> network(torch.zeros(1, 1, 16, 16)).shape
    torch.Size([1, 2, 16, 16])
    """

    def __init__(  # noqa: PLR0913  # options by keyword
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (16, 32, 64, 128),
        strides: Sequence[Size] | None = None,
        kernel_sizes: Sequence[Size] | None = None,
        num_ladders: int = 2,
        bottleneck_skip: bool = False,
        norm: NormSpec = "none",
        activation: str = "relu",
        dropout: float = 0.25,
    ) -> None:
        """Build the network with torch's default initialisation.

        Args:
            spatial_dims: 2 or 3.
            in_channels: channels of the image.
            out_channels: classes, background counted.
            channels: feature maps per level, finest first; two levels or more.
            strides: per level, one or per axis; the first is 1. By default 1, then 2.
            kernel_sizes: per level, odd, one or per axis. By default 3.
            num_ladders: U-Nets in a row; two or more.
            bottleneck_skip: add the coarsest features of a ladder to those of the next.
            norm: behind each convolution of a block, not shared; none in the source.
            activation: see `volseg.networks.layers.Style`.
            dropout: probability that a channel is set to zero within a block in training.

        Raises:
            ConfigError: lengths that differ, fewer than two ladders, or an unknown name.
        """
        levels = make_levels(spatial_dims, channels, strides, kernel_sizes)
        channels = levels.channels
        dropout = check_probability("dropout", dropout)
        check_flag("bottleneck_skip", bottleneck_skip)
        if not is_count(num_ladders, at_least=2):
            raise ConfigError(f"num_ladders {num_ladders!r}; expected 2 or more, a whole number.")
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            total_stride=levels.total_strides[-1],
            norm=norm,
        )
        style = Style(spatial_dims, norm, activation, order="CA", dropout=dropout)
        self.stem = Unit(style, self.in_channels, channels[0], levels.kernel_sizes[0])
        self.ladders = nn.ModuleList(
            Ladder(style, levels, bottleneck_skip, is_first=index == 0)
            for index in range(num_ladders)
        )
        self.head = make_conv(spatial_dims, channels[0], self.out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Segment ``(B, in_channels, *S)``.

        Returns:
            Logits ``(B, out_channels, *S)``.

        Raises:
            ConfigError: a shape that the network cannot take.
        """
        self.check_input(x)
        x = self.stem(x)
        features: list[torch.Tensor] = []
        for ladder in self.ladders:
            features = ladder(x, features)
            x = features[0]
        logits: torch.Tensor = self.head(x)
        return logits


class Ladder(nn.Module):
    """One encoder and decoder; the encoder adds what the ladder before has decoded."""

    def __init__(
        self, style: Style, levels: Levels, bottleneck_skip: bool, *, is_first: bool
    ) -> None:
        """Build blocks and the convolutions between levels.

        Args:
            style: of the network.
            levels: widths, strides and kernels.
            bottleneck_skip: whether the coarsest level is connected too.
            is_first: the first ladder takes the stem's features, a later one has a block for what
                it takes over.
        """
        super().__init__()
        channels, kernels, strides = levels.channels, levels.kernel_sizes, levels.strides
        dims = style.spatial_dims
        self.entry = nn.Identity() if is_first else SharedBlock(style, channels[0], kernels[0])
        self.encoder = nn.ModuleList(
            SharedBlock(style, width, kernel)
            for width, kernel in zip(channels, kernels, strict=True)
        )
        self.downsamplings = nn.ModuleList(
            nn.Identity() if i == 0 else Unit(style, channels[i - 1], width, kernels[i], steps)
            for i, (width, steps) in enumerate(zip(channels, strides, strict=True))
        )
        upwards = range(len(channels) - 2, -1, -1)
        self.upsamplings = nn.ModuleList(
            make_deconv(dims, channels[i + 1], channels[i], strides[i + 1], max(3, *strides[i + 1]))
            for i in upwards
        )
        self.decoder = nn.ModuleList(SharedBlock(style, channels[i], kernels[i]) for i in upwards)
        self.connected = len(channels) - (0 if bottleneck_skip else 1)

    def forward(self, x: torch.Tensor, before: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run up and down once.

        Args:
            x: (B, C_0, *S).
            before: features of the ladder before, as returned by it; none for the first.

        Returns:
            The coarsest features and the decoder's, per level, finest first.
        """
        x = self.entry(x)
        skips: list[torch.Tensor] = []
        for index, (down, block) in enumerate(zip(self.downsamplings, self.encoder, strict=True)):
            x = down(x)
            if index < min(self.connected, len(before)):
                x = x + before[index]
            x = block(x)
            skips.append(x)
        decoded = [x]
        for index, (up, block) in enumerate(zip(self.upsamplings, self.decoder, strict=True)):
            x = block(up(x) + skips[-2 - index])
            decoded.append(x)
        return decoded[::-1]


class SharedBlock(nn.Module):
    """A residual block that applies one convolution twice."""

    def __init__(self, style: Style, channels: int, kernel_size: Size) -> None:
        """Build the convolution; a normalisation, if any, is not shared.

        Args:
            style: of the network.
            channels: of input and output.
            kernel_size: odd; one or per axis.
        """
        super().__init__()
        dims = style.spatial_dims
        self.conv = make_conv(dims, channels, channels, kernel_size)
        self.norm1 = make_norm(style.norm, dims, channels)
        self.norm2 = make_norm(style.norm, dims, channels)
        self.activation = make_activation(style.activation)
        self.dropout = DROPOUT[dims](style.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take and give ``(B, channels, *S)``."""
        y = self.dropout(self.activation(self.norm1(self.conv(x))))
        out: torch.Tensor = self.activation(self.norm2(self.conv(y)) + x)
        return out
