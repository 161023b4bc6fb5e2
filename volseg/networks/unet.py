"""The U-Net as nnU-Net plans it: the default network of volseg."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from volseg.errors import ConfigError
from volseg.networks.decoder import ConcatDecoder
from volseg.networks.encoder import PlainEncoder
from volseg.networks.layers import initialise_he_, make_conv, per_axis
from volseg.networks.network import SegmentationNetwork


class UNet(SegmentationNetwork):
    """Encoder and decoder of plain convolutions with skip connections, for 2D and 3D.

    Every level halves the size of the one above along the axes where its stride is 2, so that
    anisotropic voxels can become isotropic first. With deep supervision every decoder level but
    the coarsest has a head. nnU-Net gives that one a head too, with weight zero in the loss; the
    convolutions, their order and their initialisation are otherwise the same.

    References:
        O. Ronneberger, P. Fischer, T. Brox: U-Net: Convolutional Networks for Biomedical Image
        Segmentation, 2015, doi 10.1007/978-3-319-24574-4_28.
        O. Cicek et al.: 3D U-Net: Learning Dense Volumetric Segmentation from Sparse Annotation,
        2016, doi 10.1007/978-3-319-46723-8_49.
        F. Isensee et al.: nnU-Net: a self-configuring method for deep learning-based biomedical
        image segmentation, 2021, doi 10.1038/s41592-020-01008-z.

    >>> network = UNet(2, in_channels=1, out_channels=3, channels=(8, 16, 32)).eval()
    >>> network(torch.zeros(1, 1, 24, 32)).shape
    torch.Size([1, 3, 24, 32])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (32, 64, 128, 256, 320),
        strides: Sequence[int | Sequence[int]] | None = None,
        kernel_sizes: Sequence[int | Sequence[int]] | None = None,
        num_convs: int = 2,
        norm: str = "instance",
        activation: str = "leaky_relu",
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
            num_convs: convolutions per level, in the encoder and in the decoder.
            norm: ``"instance"``, ``"batch"`` or ``"none"``.
            activation: as in `volseg.networks.layers.ConvNormAct`.
            deep_supervision: in training mode, return a list of logits instead of one tensor.

        Raises:
            ConfigError: lengths that differ, a first stride other than 1, or an unknown name.
        """
        num_levels = len(channels)
        strides = [1] + [2] * (num_levels - 1) if strides is None else strides
        kernel_sizes = [3] * num_levels if kernel_sizes is None else kernel_sizes
        _check_levels(channels, strides, kernel_sizes)
        level_strides = [per_axis(stride, spatial_dims, "stride") for stride in strides]
        kernels = [per_axis(kernel, spatial_dims, "kernel_size") for kernel in kernel_sizes]
        total_strides = list(itertools.accumulate(level_strides, _multiply))
        num_heads = max(1, num_levels - 2) if deep_supervision else 1
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            divisor=total_strides[-1],
            supervision_strides=total_strides[:num_heads],
            needs_two_voxels=norm == "instance",
        )
        self.deep_supervision = deep_supervision
        levels: dict[str, Any] = {
            "channels": channels,
            "strides": level_strides,
            "kernel_sizes": kernels,
            "num_convs": num_convs,
            "norm": norm,
            "activation": activation,
        }
        self.encoder = PlainEncoder(spatial_dims, in_channels, **levels)
        self.decoder = ConcatDecoder(spatial_dims, **levels)
        self.heads = nn.ModuleList(
            make_conv(spatial_dims, channels[level], out_channels) for level in range(num_heads)
        )
        initialise_he_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Segment ``(B, in_channels, *S)``.

        Returns:
            Logits ``(B, out_channels, *S)``. In training mode with deep supervision a list of
            them, finest first, each at its level's resolution.

        Raises:
            ConfigError: a shape that the network cannot take.
        """
        self.check_input(x)
        decoded = self.decoder(self.encoder(x))
        if self.training and self.deep_supervision:
            return [head(decoded[level]) for level, head in enumerate(self.heads)]
        logits: torch.Tensor = self.heads[0](decoded[0])
        return logits


def _check_levels(
    channels: Sequence[int],
    strides: Sequence[int | Sequence[int]],
    kernel_sizes: Sequence[int | Sequence[int]],
) -> None:
    if not len(channels) == len(strides) == len(kernel_sizes):
        raise ConfigError(
            f"{len(channels)} channels, {len(strides)} strides and {len(kernel_sizes)} "
            "kernel_sizes; expected one of each per level."
        )
    if len(channels) < 2 or min(channels) < 1:
        raise ConfigError(f"channels {channels}; expected two levels or more, 1 or more each.")
    first = strides[0] if isinstance(strides[0], Sequence) else (strides[0],)
    if set(first) != {1}:
        raise ConfigError(
            f"strides[0] {strides[0]}; expected 1: level 0 has the input's resolution."
        )


def _multiply(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(x * y for x, y in zip(a, b, strict=True))
