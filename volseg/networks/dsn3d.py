"""The 3D deeply supervised network: no skip connections, supervision taps in the encoder.

::

    32       image > [conv]                                           main
                        v pool                                         ^ deconv
    64 64            [conv conv] > auxiliary 1 (deconv, head)          ^ deconv
                        v pool                                         ^ deconv
    128 128          [conv conv] > auxiliary 2 (2 deconvs, head)       |
                        v pool                                         |
    256 256          [conv conv] --------------------------------------+
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from volseg.networks.encoder import PooledEncoder
from volseg.networks.layers import (
    NormSpec,
    Size,
    Style,
    check_flag,
    initialise_he_,
)
from volseg.networks.levels import make_levels
from volseg.networks.network import SegmentationNetwork
from volseg.networks.supervision import DeconvBranch


class DeeplySupervisedNet(SegmentationNetwork):
    """An encoder whose coarsest level is brought up by transposed convolutions alone.

    Supervision of the levels between the finest and the coarsest is full size: their features go
    through transposed convolutions of their own. Train it with
    ``MultiLevelLoss(weights="dsn")``. The encoder-tap form on top of a U-Net is
    `UNet3d` with ``supervision="encoder"``.

    References:
        Q. Dou et al.: 3D Deeply Supervised Network for Automated Segmentation of Volumetric
        Medical Images, 2017, doi 10.1016/j.media.2017.05.001; layers as in the network that the
        authors released for the segmentation of hearts.

    >>> network = DeeplySupervisedNet(3, 1, 2, channels=(4, 8, 16)).train()
    >>> [tuple(logits.shape) for logits in network(torch.zeros(1, 1, 8, 8, 8))]
    [(1, 2, 8, 8, 8), (1, 2, 8, 8, 8)]
    """

    supervised_parts = ("branches",)

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (32, 64, 128, 256),
        strides: Sequence[Size] | None = None,
        kernel_sizes: Sequence[Size] | None = None,
        norm: NormSpec = "batch",
        activation: str = "relu",
        dropout: float = 0.0,
        deep_supervision: bool = True,
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
            dropout: probability that a channel is set to zero behind a convolution in training.
            deep_supervision: in training mode, return a list of logits instead of one tensor.

        Raises:
            ConfigError: lengths that differ, a first stride other than 1, or an unknown name.
        """
        check_flag("deep_supervision", deep_supervision)
        levels = make_levels(spatial_dims, channels, strides, kernel_sizes)
        channels = levels.channels
        supervised = range(1, len(channels) - 1) if deep_supervision else range(0)
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            total_stride=levels.total_strides[-1],
            norm=norm,
            supervision_strides=((1,) * spatial_dims,) * (1 + len(supervised)),
        )
        style = Style(spatial_dims, norm, activation, dropout=dropout)
        widths = [(channels[0],), *((width, width) for width in channels[1:])]
        self.encoder = PooledEncoder(style, self.in_channels, levels, widths)
        self.decoder = DeconvBranch(
            spatial_dims, channels[-1], self.out_channels, levels.strides[1:], bias=True
        )
        self.branches = nn.ModuleList(
            DeconvBranch(
                spatial_dims, channels[i], self.out_channels, levels.strides[1 : i + 1], bias=False
            )
            for i in supervised
        )
        initialise_he_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Segment ``(B, in_channels, *S)``.

        Returns:
            Logits ``(B, out_channels, *S)``. In training mode with deep supervision a list of
            them, the main output first, then the auxiliary ones, finest level first.

        Raises:
            ConfigError: a shape that the network cannot take.
        """
        self.check_input(x)
        features = self.encoder(x)
        outputs: list[torch.Tensor] = [self.decoder(features[-1])]
        if not (self.training and self.deep_supervision):
            return outputs[0]
        for index, branch in enumerate(self.branches):
            outputs.append(branch(features[index + 1]))
        return outputs
