"""Branches that turn the features of a coarser level into logits, for deep supervision."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from volseg.networks.layers import check_choice, make_conv, make_deconv

BRANCHES = ("linear", "nearest", "deconv", "none")


def make_branch(
    kind: str,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    strides: Sequence[Sequence[int]],
) -> nn.Module:
    """Build a classifier of one level.

    Args:
        kind: a convolution of width 1 followed by ``"linear"`` or ``"nearest"`` interpolation to
            full resolution, or by nothing (``"none"``); or ``"deconv"``, see `DeconvBranch`.
        spatial_dims: 2 or 3.
        in_channels: of the level.
        out_channels: classes.
        strides: of all levels between full resolution and this one, per axis, finest first.

    Raises:
        ConfigError: unknown kind.
    """
    check_choice("branch", kind, BRANCHES)
    if kind == "deconv":
        return DeconvBranch(spatial_dims, in_channels, out_channels, strides, bias=False)
    head = make_conv(spatial_dims, in_channels, out_channels)
    if kind == "none":
        return head
    total = tuple(float(math.prod(axis)) for axis in zip(*strides, strict=True))
    if kind == "nearest":
        return nn.Sequential(head, nn.Upsample(scale_factor=total, mode="nearest"))
    mode = "bilinear" if spatial_dims == 2 else "trilinear"
    return nn.Sequential(head, nn.Upsample(scale_factor=total, mode=mode, align_corners=False))


class DeconvBranch(nn.Sequential):
    """Transposed convolutions that halve the width, one per level, and a head behind them.

    References:
        Q. Dou et al.: 3D Deeply Supervised Network for Automated Segmentation of Volumetric
        Medical Images, 2017, doi 10.1016/j.media.2017.05.001.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        strides: Sequence[Sequence[int]],
        *,
        bias: bool,
    ) -> None:
        """Build the branch.

        Args:
            spatial_dims: 2 or 3.
            in_channels: of the level.
            out_channels: classes.
            strides: of all levels between full resolution and this one, per axis, finest first.
            bias: whether the transposed convolutions have one.
        """
        widths = [max(1, in_channels // 2**i) for i in range(len(strides) + 1)]
        deconvs = (
            make_deconv(spatial_dims, widths[i], widths[i + 1], stride, max(4, *stride), bias=bias)
            for i, stride in enumerate(reversed(strides))
        )
        super().__init__(*deconvs, make_conv(spatial_dims, widths[-1], out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn ``(B, in_channels, *S / stride)`` into logits ``(B, out_channels, *S)``."""
        for layer in self:
            x = layer(x)
        return x
