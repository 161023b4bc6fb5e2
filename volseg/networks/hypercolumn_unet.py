r"""A residual U-Net that sees all decoder levels at once before it decides.

::

    16    image > [conv R R] --------------- skip ---------------> [cat, conv R R] --\
                      v pool                                             ^ deconv     |
    32            [conv R R] -------- skip --------> [cat, conv R R] ----+ > x2 ------+ cat > head
                      v pool                               ^ deconv                   |
    64            [conv R R] -- skip --> [cat, conv R R] --+ > x4 --------------------/
                      v pool                   ^ deconv
    128           [conv R R] ------------------+
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from volseg.networks.decoder import ConcatLevel
from volseg.networks.layers import (
    NormSpec,
    Size,
    Style,
    Unit,
    check_probability,
    initialise_he_,
    make_conv,
    make_deconv,
    make_pooling,
)
from volseg.networks.levels import Levels, make_levels
from volseg.networks.network import SegmentationNetwork


class HypercolumnUNet(SegmentationNetwork):
    """U-Net of pre-activated residual units with hypercolumn fusion before the head.

    All decoder levels are upsampled to full resolution and concatenated; one loss on the fused
    output reaches them all, and they belong to inference too. Transposed convolutions are padded
    on both sides; TensorFlow's of the source are shifted by a voxel. Upsampling is (bi-, tri-)
    linear between voxel centres, the source's is TensorFlow 1's, which is shifted as well. Of the
    source's further outputs (classification of the image, coverage, depth) it defines none, and
    they are left out.

    References:
        B. Hariharan et al.: Hypercolumns for Object Segmentation and Fine-grained Localization,
        2015, doi 10.1109/CVPR.2015.7298642. The layers are those of a public Keras network for
        seismic images (TGS salt identification, 2018).

    >>> network = HypercolumnUNet(2, 1, 2, channels=(4, 8, 16)).eval()
    >>> network(torch.zeros(1, 1, 16, 24)).shape
    torch.Size([1, 2, 16, 24])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (16, 32, 64, 128, 256),
        strides: Sequence[Size] | None = None,
        kernel_sizes: Sequence[Size] | None = None,
        norm: NormSpec = ("batch", {"eps": 1e-3, "momentum": 0.01}),
        activation: str = "relu",
        dropout: float = 0.5,
    ) -> None:
        """Build the network with He initialisation.

        Args:
            spatial_dims: 2 or 3.
            in_channels: channels of the image.
            out_channels: classes, background counted.
            channels: feature maps per level, finest first; two levels or more.
            strides: of the pooling before each level, one or per axis; the first is 1.
            kernel_sizes: per level, odd, one or per axis. By default 3.
            norm: name, or name and options.
            activation: see `volseg.networks.layers.Style`.
            dropout: probability that a value is set to zero in training: behind each pooling
                (half of it behind the first), concatenation, and on the hypercolumn.

        Raises:
            ConfigError: lengths that differ, a first stride other than 1, or an unknown name.
        """
        levels = make_levels(spatial_dims, channels, strides, kernel_sizes)
        channels = levels.channels
        dropout = check_probability("dropout", dropout)
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            total_stride=levels.total_strides[-1],
            norm=norm,
        )
        style = Style(spatial_dims, norm, activation, order="NAC")
        kernels = levels.kernel_sizes
        self.encoder = nn.ModuleList()
        for i, width in enumerate(channels):
            before = channels[i - 1] if i else self.in_channels
            level = nn.Sequential(ResidualStage(style, before, width, kernels[i]))
            if i:
                level.insert(0, make_pooling(levels.strides[i], spatial_dims))
                level.insert(1, nn.Dropout(dropout / 2 if i == 1 else dropout))
            self.encoder.append(level)
        self.decoder = _make_decoder(style, levels, dropout)
        mode = "bilinear" if spatial_dims == 2 else "trilinear"
        self.upsamplings = nn.ModuleList(
            nn.Upsample(scale_factor=tuple(map(float, total)), mode=mode, align_corners=False)
            for total in levels.total_strides[1:-1]
        )
        fusion = dataclasses.replace(style, order="CA")
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            Unit(fusion, sum(channels[:-1]), channels[0], kernels[0]),
            make_conv(spatial_dims, channels[0], self.out_channels),
        )
        initialise_he_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Segment ``(B, in_channels, *S)``.

        Returns:
            Logits ``(B, out_channels, *S)``.

        Raises:
            ConfigError: a shape that the network cannot take.
        """
        self.check_input(x)
        features: list[torch.Tensor] = []
        for level in self.encoder:
            x = level(x)
            features.append(x)
        decoded: list[torch.Tensor] = []
        for level in self.decoder:
            x = level(features)
            features.append(x)
            decoded.append(x)
        columns = [x]
        for index, up in enumerate(self.upsamplings):
            columns.append(up(decoded[-2 - index]))
        logits: torch.Tensor = self.head(torch.cat(columns, 1))
        return logits


class ResidualStage(nn.Module):
    """A convolution and two pre-activated residual units; norm and activation at the end."""

    def __init__(
        self, style: Style, in_channels: int, out_channels: int, kernel_size: Size
    ) -> None:
        """Build the stage.

        Args:
            style: of the network.
            in_channels: of the input.
            out_channels: of all convolutions.
            kernel_size: odd; one or per axis.
        """
        super().__init__()
        self.conv = make_conv(style.spatial_dims, in_channels, out_channels, kernel_size)
        self.units = nn.ModuleList(
            nn.Sequential(
                Unit(style, out_channels, out_channels, kernel_size),
                Unit(style, out_channels, out_channels, kernel_size),
            )
            for _ in range(2)
        )
        closing = dataclasses.replace(style, order="NA")
        self.closing = Unit(closing, out_channels, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take ``(B, in_channels, *S)``, give ``(B, out_channels, *S)``."""
        x = self.conv(x)
        for unit in self.units:
            x = x + unit(x)
        y: torch.Tensor = self.closing(x)
        return y


def _make_decoder(style: Style, levels: Levels, dropout: float) -> nn.ModuleList:
    """Coarsest level first."""
    channels, dims = levels.channels, style.spatial_dims
    decoder = nn.ModuleList()
    for i in reversed(range(len(channels) - 1)):
        stride = levels.strides[i + 1]
        deconv = make_deconv(dims, channels[i + 1], channels[i], stride, max(3, *stride))
        stage = ResidualStage(style, 2 * channels[i], channels[i], levels.kernel_sizes[i])
        decoder.append(ConcatLevel(deconv, nn.Sequential(nn.Dropout(dropout), stage)))
    return decoder
