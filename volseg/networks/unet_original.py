"""The original U-Net, and the form of it that is common in Keras.

::

    64   image > [conv conv] ------------------- skip -------------------> [cat conv conv] > head
                      v pool                                                     ^ up
    128          [conv conv] ------------- skip -----------> [cat conv conv] ----+
                      v pool                                       ^ up
    ...          [conv conv] ----------------------------------------+
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from volseg.errors import ConfigError, check_choice
from volseg.networks.decoder import ConcatLevel
from volseg.networks.encoder import PooledEncoder
from volseg.networks.layers import (
    ConvStack,
    NormSpec,
    Size,
    Style,
    Unit,
    check_flag,
    check_probability,
    initialise_he_,
    is_count,
    make_conv,
    make_deconv,
    make_nearest,
)
from volseg.networks.levels import check_smallest, make_levels
from volseg.networks.network import SegmentationNetwork


class OriginalUNet(SegmentationNetwork):
    """Double convolutions, max pooling, and skip connections that are concatenated.

    `unet_original` upsamples by a transposed convolution and takes any input size: where pooling
    drops a last odd voxel, the upsampled features are padded (``align="pad"``). The paper has
    convolutions without padding, whose output is smaller than the input; that is
    ``padding="valid"``. `unet_keras` upsamples by repeated voxels and a convolution of kernel 2
    padded behind, puts the skip connection first, and drops half the values at the two deepest
    levels. Its source has a convolution to 2 channels with ReLU before the head, which can die
    and narrows more classes than 2; here that is ``penultimate=2``, off by default.

    References:
        O. Ronneberger, P. Fischer, T. Brox: U-Net: Convolutional Networks for Biomedical Image
        Segmentation, 2015, doi 10.1007/978-3-319-24574-4_28.

    >>> network = OriginalUNet(2, 1, 2, channels=(4, 8, 16)).eval()
    >>> network(torch.zeros(1, 1, 23, 30)).shape
    torch.Size([1, 2, 23, 30])
    """

    def __init__(  # noqa: PLR0913  # options by keyword
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (64, 128, 256, 512, 1024),
        strides: Sequence[Size] | None = None,
        kernel_sizes: Sequence[Size] | None = None,
        upsampling: str = "deconv",
        skip_first: bool = False,
        norm: NormSpec = "none",
        activation: str = "relu",
        dropout: float = 0.0,
        penultimate: int | None = None,
        align: str = "pad",
        padding: Literal["same", "valid"] = "same",
    ) -> None:
        """Build the network with He initialisation, as the paper proposes.

        Args:
            spatial_dims: 2 or 3.
            in_channels: channels of the image.
            out_channels: classes, background counted.
            channels: feature maps per level, finest first; two levels or more.
            strides: of the pooling before each level, one or per axis; the first is 1.
            kernel_sizes: per level, odd, one or per axis. By default 3.
            upsampling: ``"deconv"`` (kernel = stride), or ``"nearest"`` with a convolution.
            skip_first: order of concatenation.
            norm: behind each convolution; name, or name and options.
            activation: see `volseg.networks.layers.Style`.
            dropout: probability that a value is set to zero behind the two deepest levels of the
                encoder in training.
            penultimate: channels of a last convolution before the head, or None for none.
            align: sizes that the strides do not divide: ``"pad"``, ``"crop"`` (the output is then
                smaller than the input) or ``"none"`` to refuse them.
            padding: of the convolutions; ``"valid"`` needs ``align="crop"`` and gives an output
                that is smaller than the input.

        Raises:
            ConfigError: lengths that differ, an unknown name, or options that contradict.
        """
        check_choice("upsampling", upsampling, ("deconv", "nearest"))
        check_flag("skip_first", skip_first)
        dropout = check_probability("dropout", dropout)
        if penultimate is not None and not is_count(penultimate):
            raise ConfigError(f"penultimate {penultimate!r}; expected None, or 1 or more channels.")
        levels = make_levels(spatial_dims, channels, strides, kernel_sizes)
        channels = levels.channels
        if padding == "valid" and (align != "crop" or upsampling == "nearest"):
            raise ConfigError(
                f"padding 'valid' with align '{align}' and upsampling '{upsampling}'; expected "
                "align 'crop' and upsampling 'deconv'."
            )
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            total_stride=levels.total_strides[-1],
            norm=norm,
            divisor=None if align == "none" else (1,) * spatial_dims,
        )
        style = Style(spatial_dims, norm, activation, order="CNA", padding=padding)
        widths = [(width, width) for width in channels]
        self.encoder = PooledEncoder(style, self.in_channels, levels, widths, deep_dropout=dropout)
        self.decoder = nn.ModuleList(
            ConcatLevel(
                _make_upsampling(upsampling, style, channels[i + 1], channels[i], stride),
                ConvStack(style, 2 * channels[i], channels[i], kernel_size=levels.kernel_sizes[i]),
                skip_first=skip_first,
                align=align,
            )
            for i, stride in reversed([*enumerate(levels.strides[1:])])
        )
        width = channels[0] if penultimate is None else int(penultimate)
        kernel = levels.kernel_sizes[0]
        tail = [] if penultimate is None else [Unit(style, channels[0], width, kernel)]
        head = make_conv(spatial_dims, width, self.out_channels)
        self.head = nn.Sequential(*tail, head)
        if padding == "valid":
            self.smallest = levels.find_smallest(
                has_norm=self.coarsest_norm != "none",
                last_kernel=None if penultimate is None else kernel,
            )
        initialise_he_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Segment ``(B, in_channels, *S)``.

        Returns:
            Logits ``(B, out_channels, *S)``; smaller with ``align="crop"``.

        Raises:
            ConfigError: a shape that the network cannot take.
        """
        self.check_input(x)
        check_smallest(x, list(self.smallest))
        features = self.encoder(x)
        for level in self.decoder:
            features.append(level(features))
        logits: torch.Tensor = self.head(features[0])
        return logits


def _make_upsampling(
    kind: str, style: Style, in_channels: int, out_channels: int, stride: tuple[int, ...]
) -> nn.Module:
    if kind == "deconv":
        return make_deconv(style.spatial_dims, in_channels, out_channels, stride)
    # The kernel is the stride, as in the transposed convolution that this replaces.
    conv = Unit(style, in_channels, out_channels, kernel_size=stride)
    return nn.Sequential(make_nearest(stride, style.spatial_dims), conv)
