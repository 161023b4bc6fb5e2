"""Deep supervision: branches from features of a level to logits, and how to leave them out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from volseg.errors import ConfigError, check_choice
from volseg.networks.layers import make_conv, make_deconv
from volseg.networks.network import SegmentationNetwork

BRANCHES = ("linear", "nearest", "deconv", "none")


def strip_supervision(
    weights: Mapping[str, torch.Tensor], network: SegmentationNetwork
) -> dict[str, torch.Tensor]:
    """Leave out the weights that only the training with deep supervision needed.

    Args:
        weights: state dict of a network that was built with deep supervision.
        network: the same one built without; stays as it is.

    Returns:
        What ``network.load_state_dict`` takes.

    Raises:
        ConfigError: the two differ in more than their supervision.

    >>> from volseg.networks import UNet
    >>> trained = UNet(2, 1, 2, channels=(4, 8, 8, 8), deep_supervision=True)
    >>> network = UNet(2, 1, 2, channels=(4, 8, 8, 8))
    >>> network.load_state_dict(strip_supervision(trained.state_dict(), network))
    <All keys matched successfully>
    """
    own = network.state_dict()
    strange = [name for name in weights if name not in own]
    wrong = [name for name in strange if name.split(".")[0] not in network.supervised_parts]
    wrong += [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    if wrong:
        raise ConfigError(
            f"weights differ from the network in {len(wrong)} tensors, the first is '{wrong[0]}'; "
            "expected those of the same network with deep supervision."
        )
    return {name: weights[name] for name in own}


def make_branch(
    kind: str,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    strides: Sequence[Sequence[int]],
) -> nn.Module:
    """Build a classifier of one level.

    Args:
        kind: a convolution of kernel 1 followed by ``"linear"`` or ``"nearest"`` interpolation to
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
