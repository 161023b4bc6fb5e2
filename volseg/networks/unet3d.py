"""The original 3D U-Net, with or without deep supervision.

::

    32 64    image > [conv conv] --------------- skip ---------------> [cat conv conv] > head
                          v pool                                             ^ deconv
    64 128           [conv conv] -------- skip --------> [cat conv conv] ----+ > branch
                          v pool                               ^ deconv
    128 256          [conv conv] -- skip --> [cat conv conv] --+ > branch
                          v pool                   ^ deconv
    256 512          [conv conv] ------------------+
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
    check_flag,
    initialise_he_,
    make_conv,
    make_deconv,
)
from volseg.networks.levels import Levels, check_smallest, make_levels
from volseg.networks.network import SegmentationNetwork
from volseg.networks.supervision import BRANCHES, make_branch


class UNet3d(SegmentationNetwork):
    """A U-Net that doubles its width before each pooling and keeps it when it upsamples.

    `unet3d_original` is Cicek's network with padded convolutions, so that the output has the
    input's size; the paper's are not padded (``padding="valid"``). `unet3d_deep_supervision` adds
    classifiers to all levels between the coarsest and the finest, upsampled to full resolution
    and only there in training: of the decoder (Zeng et al.), or of the encoder, where stacked
    transposed convolutions bring the features up (Dou et al.). Neither is bound to 3D here.

    References:
        O. Cicek et al.: 3D U-Net: Learning Dense Volumetric Segmentation from Sparse Annotation,
        2016, doi 10.1007/978-3-319-46723-8_49.
        G. Zeng et al.: 3D U-net with Multi-level Deep Supervision, 2017, doi
        10.1007/978-3-319-67389-9_32.
        Q. Dou et al.: 3D Deeply Supervised Network for Automated Segmentation of Volumetric
        Medical Images, 2017, doi 10.1016/j.media.2017.05.001.

    >>> network = UNet3d(3, 1, 2, channels=(4, 8, 16)).eval()
    >>> network(torch.zeros(1, 1, 8, 8, 12)).shape
    torch.Size([1, 2, 8, 8, 12])
    """

    supervised_parts = ("branches",)

    def __init__(  # noqa: PLR0913  # options by keyword
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (64, 128, 256, 512),
        strides: Sequence[Size] | None = None,
        kernel_sizes: Sequence[Size] | None = None,
        norm: NormSpec = ("batch", {"affine": False}),
        activation: str = "relu",
        dropout: float = 0.0,
        padding: Literal["same", "valid"] = "same",
        deep_supervision: bool = False,
        supervision: str = "decoder",
        branch: str | None = None,
    ) -> None:
        """Build the network with He initialisation.

        Args:
            spatial_dims: 2 or 3.
            in_channels: channels of the image.
            out_channels: classes, background counted.
            channels: feature maps behind the second convolution of each level, finest first; the
                first convolution of the encoder has half of them.
            strides: of the pooling before each level, one or per axis; the first is 1.
            kernel_sizes: per level, odd, one or per axis. By default 3.
            norm: name, or name and options. The source's has no scale and shift.
            activation: see `volseg.networks.layers.Style`.
            dropout: probability that a channel is set to zero behind a convolution in training.
            padding: of the convolutions; ``"valid"`` gives an output smaller than the input.
            deep_supervision: in training mode, return a list of logits instead of one tensor.
            supervision: levels of the ``"decoder"`` or of the ``"encoder"`` have the branches.
            branch: how the classifiers reach full resolution: by ``"linear"`` (default of the
                decoder) or ``"nearest"`` interpolation, ``"deconv"`` (of the encoder), or
                ``"none"`` to stay at their level's.

        Raises:
            ConfigError: lengths that differ, an odd width, an unknown name, or supervision
                together with ``padding="valid"``.
        """
        check_choice("supervision", supervision, ("decoder", "encoder"))
        if branch is None:
            branch = "linear" if supervision == "decoder" else "deconv"
        check_choice("branch", branch, BRANCHES)
        check_flag("deep_supervision", deep_supervision)
        levels = make_levels(spatial_dims, channels, strides, kernel_sizes)
        channels = levels.channels
        if any(count % 2 for count in channels):
            raise ConfigError(f"channels {channels}; expected even numbers, since they are halved.")
        if deep_supervision and padding == "valid":
            raise ConfigError("deep_supervision with padding 'valid'; expected padding 'same'.")
        supervised = range(1, len(channels) - 1) if deep_supervision else range(0)
        ones = (1,) * spatial_dims
        native = [levels.total_strides[i] if branch == "none" else ones for i in supervised]
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            total_stride=levels.total_strides[-1],
            norm=norm,
            supervision_strides=(ones, *native),
            divisor=ones if padding == "valid" else None,
        )
        self.supervises_encoder = supervision == "encoder"
        if padding == "valid":
            self.smallest = levels.find_smallest(has_norm=self.coarsest_norm != "none")
        style = Style(spatial_dims, norm, activation, dropout=dropout, padding=padding)
        widths = [(width // 2, width) for width in channels]
        self.encoder = PooledEncoder(style, self.in_channels, levels, widths)
        self.decoder = _make_decoder(style, levels)
        self.head = make_conv(spatial_dims, channels[0], self.out_channels)
        self.branches = nn.ModuleList(
            make_branch(
                branch, spatial_dims, channels[i], self.out_channels, levels.strides[1 : i + 1]
            )
            for i in supervised
        )
        initialise_he_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Segment ``(B, in_channels, *S)``.

        Returns:
            Logits ``(B, out_channels, *S)``. In training mode with deep supervision a list of
            them, the head's first, then the branches', finest level first.

        Raises:
            ConfigError: a shape that the network cannot take.
        """
        self.check_input(x)
        check_smallest(x, list(self.smallest))
        features = self.encoder(x)
        supervises = self.training and self.deep_supervision
        # Finest first; a prediction keeps neither.
        encoded = list(features) if supervises else []
        decoded = features[-1:] if supervises else []
        for level in self.decoder:
            features.append(level(features))
            if supervises:
                decoded.insert(0, features[-1])
        outputs: list[torch.Tensor] = [self.head(features[0])]
        if not supervises:
            return outputs[0]
        taps = encoded if self.supervises_encoder else decoded
        for index, branch in enumerate(self.branches):
            outputs.append(branch(taps[index + 1]))
        return outputs


def _make_decoder(style: Style, levels: Levels) -> nn.ModuleList:
    """Coarsest level first; upsampling keeps the width and has no bias."""
    decoder = nn.ModuleList()
    coarse = levels.channels[-1]
    for i in reversed(range(len(levels.channels) - 1)):
        width = levels.channels[i]
        deconv = make_deconv(style.spatial_dims, coarse, coarse, levels.strides[i + 1], bias=False)
        convs = ConvStack(style, coarse + width, width, kernel_size=levels.kernel_sizes[i])
        align = "crop" if style.padding == "valid" else "none"
        decoder.append(ConcatLevel(deconv, convs, align=align))
        coarse = width
    return decoder
