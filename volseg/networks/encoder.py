"""From an image to features of falling resolution."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from volseg.networks.layers import (
    AVG_POOL,
    ConvStack,
    Size,
    Style,
    Unit,
    make_activation,
    make_pooling,
    per_axis,
)
from volseg.networks.levels import Levels


class Encoder(nn.Module):
    """A stem, then level behind level; the features of each are kept."""

    def __init__(self, levels: Iterable[nn.Module], stem: nn.Module | None = None) -> None:
        """Keep the levels.

        Args:
            levels: finest first.
            stem: what the image passes through first, if anything.
        """
        super().__init__()
        self.stem = stem or nn.Identity()
        self.levels = nn.ModuleList(levels)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Take ``(B, in_channels, *S)``; give the features of every level, finest first."""
        x = self.stem(x)
        features: list[torch.Tensor] = []
        for level in self.levels:
            x = level(x)
            features.append(x)
        return features


class PlainEncoder(Encoder):
    """A stack of convolutions per level; the first of each level carries its stride."""

    def __init__(
        self, style: Style, in_channels: int, levels: Levels, num_convs: Sequence[int]
    ) -> None:
        """Build the levels, finest first.

        Args:
            style: of the network.
            in_channels: of the image.
            levels: widths, strides and kernels.
            num_convs: per level.
        """
        super().__init__(
            ConvStack(style, before, after, num_convs=count, kernel_size=kernel, stride=stride)
            for before, after, stride, kernel, count in _transitions(in_channels, levels, num_convs)
        )


class PooledEncoder(Encoder):
    """A stack of convolutions per level; behind the finest, each level begins with pooling."""

    def __init__(
        self,
        style: Style,
        in_channels: int,
        levels: Levels,
        widths: Sequence[Sequence[int]],
        deep_dropout: float = 0.0,
    ) -> None:
        """Build the levels, finest first.

        Args:
            style: of the network.
            in_channels: of the image.
            levels: strides and kernels.
            widths: per level the feature maps behind each of its convolutions.
            deep_dropout: probability that a value behind one of the two deepest levels is set to
                zero in training.
        """
        blocks: list[nn.Module] = []
        for i, (width, kernel) in enumerate(zip(widths, levels.kernel_sizes, strict=True)):
            before = widths[i - 1][-1] if i else in_channels
            level = nn.Sequential(ConvStack(style, before, width, kernel_size=kernel))
            if i:
                level.insert(0, make_pooling(levels.strides[i], style.spatial_dims))
            if deep_dropout and i >= len(widths) - 2:
                level.append(nn.Dropout(deep_dropout))
            blocks.append(level)
        super().__init__(blocks)


class ResidualEncoder(Encoder):
    """A convolution, then `ResidualBlock` s per level; the first of each carries the stride."""

    def __init__(
        self, style: Style, in_channels: int, levels: Levels, num_blocks: Sequence[int]
    ) -> None:
        """Build the levels, finest first.

        Args:
            style: of the network.
            in_channels: of the image.
            levels: widths, strides and kernels.
            num_blocks: per level.
        """
        first = levels.channels[0]
        blocks = (
            nn.Sequential(
                *(
                    ResidualBlock(
                        style, after if index else before, after, kernel, 1 if index else stride
                    )
                    for index in range(count)
                )
            )
            for before, after, stride, kernel, count in _transitions(first, levels, num_blocks)
        )
        super().__init__(blocks, stem=Unit(style, in_channels, first, levels.kernel_sizes[0]))


class ResidualBlock(nn.Module):
    """Two convolutions whose sum with the input is activated (nnU-Net's "BasicBlockD").

    Where the resolution falls the input is averaged, where the width changes it is projected.

    References:
        K. He et al.: Deep Residual Learning for Image Recognition, 2016, doi
        10.1109/CVPR.2016.90; T. He et al.: Bag of Tricks for Image Classification, 2019, doi
        10.1109/CVPR.2019.00065 (ResNet-D, the averaged shortcut).
    """

    def __init__(
        self, style: Style, in_channels: int, out_channels: int, kernel_size: Size, stride: Size
    ) -> None:
        """Build the two paths.

        Args:
            style: of the network.
            in_channels: of the input.
            out_channels: of the output.
            kernel_size: odd; one or per axis.
            stride: of the first convolution; one or per axis.
        """
        super().__init__()
        plain = dataclasses.replace(style, order="CN")
        steps = per_axis(stride, style.spatial_dims, "stride")
        shortcut: list[nn.Module] = []
        if max(steps) > 1:
            shortcut.append(AVG_POOL[style.spatial_dims](steps, steps))
        if in_channels != out_channels:
            projection = dataclasses.replace(plain, bias=False)
            shortcut.append(Unit(projection, in_channels, out_channels, 1))
        self.shortcut = nn.Sequential(*shortcut)
        self.conv1 = Unit(style, in_channels, out_channels, kernel_size, stride)
        self.conv2 = Unit(plain, out_channels, out_channels, kernel_size)
        self.activation = make_activation(style.activation)

    def start_as_identity_(self) -> None:
        """Let the norm in front of the sum, if it has a scale, begin with zeros."""
        for name, parameter in self.conv2.named_parameters():
            if name.startswith("norm."):
                nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take ``(B, in_channels, *S)``, give ``(B, out_channels, *S / stride)``."""
        shortcut = self.shortcut(x)
        y: torch.Tensor = self.activation(self.conv2(self.conv1(x)) + shortcut)
        return y


def _transitions(in_channels: int, levels: Levels, counts: Sequence[int]) -> Any:
    """Per level: channels before and after, stride, kernel, number of blocks."""
    before = (in_channels, *levels.channels[:-1])
    return zip(before, levels.channels, levels.strides, levels.kernel_sizes, counts, strict=True)
