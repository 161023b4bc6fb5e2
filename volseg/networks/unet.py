"""The U-Net as nnU-Net plans it, plain or with a residual encoder: the default of volseg.

::

    image > [conv conv] ------------- skip ------------> [cat conv conv] > head
                 v stride                                      ^ deconv
            [conv conv] --------- skip -------> [cat conv conv] > head (supervised)
                 v stride                             ^ deconv
            [conv conv] ------------------------------+
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from volseg.errors import ConfigError, check_choice
from volseg.networks.decoder import ConcatLevel
from volseg.networks.encoder import PlainEncoder, ResidualBlock, ResidualEncoder
from volseg.networks.layers import (
    LEAKY_SLOPE,
    ConvStack,
    NormSpec,
    Size,
    Style,
    as_counts,
    check_flag,
    initialise_he_,
    is_count,
    make_conv,
    make_deconv,
)
from volseg.networks.levels import make_levels
from volseg.networks.network import SegmentationNetwork

RESIDUAL_BLOCKS = (1, 3, 4, 6)
"""Per level of nnU-Net's residual encoders; deeper levels have as many as the last."""


class UNet(SegmentationNetwork):
    """Encoder and decoder with skip connections, for 2D and 3D.

    Every level halves the size of the one above along the axes where its stride is 2, so that
    anisotropic voxels can become isotropic first. With deep supervision every decoder level but
    the coarsest has a head. nnU-Net gives that one a head too, with weight zero in the loss; the
    convolutions, their order and their initialisation are otherwise the same. A residual block
    begins as its shortcut where its norm has a scale.

    References:
        O. Ronneberger, P. Fischer, T. Brox: U-Net: Convolutional Networks for Biomedical Image
        Segmentation, 2015, doi 10.1007/978-3-319-24574-4_28.
        F. Isensee et al.: nnU-Net: a self-configuring method for deep learning-based biomedical
        image segmentation, 2021, doi 10.1038/s41592-020-01008-z.
        F. Isensee et al.: nnU-Net Revisited: A Call for Rigorous Validation in 3D Medical Image
        Segmentation, 2024, doi 10.1007/978-3-031-72114-4_47 (the residual encoder).

    >>> network = UNet(2, in_channels=1, out_channels=3, channels=(8, 16, 32)).eval()
    >>> network(torch.zeros(1, 1, 24, 32)).shape
    torch.Size([1, 3, 24, 32])
    """

    supervised_parts = ("heads",)

    def __init__(  # noqa: PLR0913  # options by keyword
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (32, 64, 128, 256, 320),
        strides: Sequence[Size] | None = None,
        kernel_sizes: Sequence[Size] | None = None,
        encoder: str = "plain",
        num_convs: int | Sequence[int] | None = None,
        num_decoder_convs: int | Sequence[int] | None = None,
        norm: NormSpec = "instance",
        activation: str = "leaky_relu",
        dropout: float = 0.0,
        deep_supervision: bool = False,
    ) -> None:
        """Build the network with He initialisation.

        Args:
            spatial_dims: 2 or 3.
            in_channels: channels of the image.
            out_channels: classes, background counted.
            channels: feature maps per level, finest first; two levels or more.
            strides: per level, one or per axis; the first is 1. By default 1, then 2.
            kernel_sizes: per level, odd, one or per axis. By default 3.
            encoder: ``"plain"`` convolutions or ``"residual"`` blocks.
            num_convs: convolutions or residual blocks of the encoder, one number or one per level.
                By default 2 convolutions, or 1, 3, 4, 6, 6 ... blocks.
            num_decoder_convs: the same for the decoder's levels, finest first. By default 2, or 1
                beside a residual encoder.
            norm: name, or name and options; see `volseg.networks.layers.NormSpec`.
            activation: see `volseg.networks.layers.Style`.
            dropout: probability that a channel is set to zero behind a convolution in training.
            deep_supervision: in training mode, return a list of logits instead of one tensor.

        Raises:
            ConfigError: lengths that differ, a first stride other than 1, or an unknown name.
        """
        check_choice("encoder", encoder, ("plain", "residual"))
        check_flag("deep_supervision", deep_supervision)
        levels = make_levels(spatial_dims, channels, strides, kernel_sizes)
        channels = levels.channels
        depth = len(channels)
        is_residual = encoder == "residual"
        blocks = [*RESIDUAL_BLOCKS, *[RESIDUAL_BLOCKS[-1]] * depth][:depth]
        encoder_convs = _per_level("num_convs", num_convs, blocks if is_residual else [2] * depth)
        decoder_convs = _per_level(
            "num_decoder_convs", num_decoder_convs, [1 if is_residual else 2] * (depth - 1)
        )
        num_heads = max(1, depth - 2) if deep_supervision else 1
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            total_stride=levels.total_strides[-1],
            norm=norm,
            supervision_strides=levels.total_strides[:num_heads],
        )
        style = Style(spatial_dims, norm, activation, dropout=dropout)
        make_encoder = ResidualEncoder if is_residual else PlainEncoder
        self.encoder = make_encoder(style, self.in_channels, levels, encoder_convs)
        # The decoder in order of execution, coarsest level first.
        upwards = range(depth - 2, -1, -1)
        self.decoder = nn.ModuleList(
            ConcatLevel(
                make_deconv(spatial_dims, channels[i + 1], channels[i], levels.strides[i + 1]),
                ConvStack(
                    style,
                    2 * channels[i],
                    channels[i],
                    num_convs=decoder_convs[i],
                    kernel_size=levels.kernel_sizes[i],
                ),
            )
            for i in upwards
        )
        self.heads = nn.ModuleList(
            make_conv(spatial_dims, channels[i], self.out_channels)
            if i < num_heads
            else nn.Identity()
            for i in upwards
        )
        initialise_he_(self, LEAKY_SLOPE)
        for block in self.modules():
            if isinstance(block, ResidualBlock):
                block.start_as_identity_()

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Segment ``(B, in_channels, *S)``.

        Returns:
            Logits ``(B, out_channels, *S)``. In training mode with deep supervision a list of
            them, finest first, each at its level's resolution.

        Raises:
            ConfigError: a shape that the network cannot take.
        """
        self.check_input(x)
        features = self.encoder(x)
        first = len(features) - 1 - len(self.supervision_strides)
        supervises = self.training and self.deep_supervision
        outputs: list[torch.Tensor] = []
        for index, (level, head) in enumerate(zip(self.decoder, self.heads, strict=True)):
            features.append(level(features))
            if len(features) == 1 or (supervises and index >= first):
                outputs.append(head(features[-1]))
        if supervises:
            return outputs[::-1]
        return outputs[-1]


def _per_level(
    name: str, counts: int | Sequence[int] | None, default: Sequence[int]
) -> Sequence[int]:
    if counts is None:
        return default
    values = (int(counts),) * len(default) if is_count(counts) else as_counts(counts)
    if len(values) != len(default):
        raise ConfigError(
            f"{name} {counts!r}; expected at least 1, one whole number or {len(default)} of them."
        )
    return values
