"""A U-Net on a pre-activation ResNet.

::

    stem       image > [norm, conv 7 / 2, norm, relu] --- skip ---> [2 conv] > x2 [2 conv] > head
                    v pool                                              ^ x2
    stage 1    [unit] x 3 ------------------- skip -------------> [conv conv]
                    v / 2                                           ^ x2
    stage 2    [unit] x 4 ------------- skip -----------> [conv conv]
                    v / 2                                   ^ x2
    stage 3    [unit] x 6 ------- skip ---------> [conv conv]
                    v / 2                           ^ x2
    stage 4    [unit] x 3 > [norm, relu] ----------+

A skip is what the next stage's first unit sees behind its first norm and relu.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from volseg.errors import ConfigError, check_choice
from volseg.networks.layers import (
    MAX_POOL,
    ConvStack,
    NormSpec,
    Size,
    Style,
    Unit,
    as_counts,
    initialise_he_,
    is_count,
    make_conv,
    make_deconv,
    make_nearest,
    make_norm,
    split_norm,
)
from volseg.networks.levels import Levels, make_levels
from volseg.networks.network import SegmentationNetwork
from volseg.networks.pretrained import PretrainedReport, load_resnet

logger = logging.getLogger(__name__)

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Units per stage, by depth."""
EXPANSION = {18: 1, 34: 1, 50: 4}
"""Channels behind a unit, as a multiple of its width; above 1 the unit is a bottleneck."""


class ResNetUNet(SegmentationNetwork):
    """Decoder of double convolutions on the taps of a full pre-activation ResNet.

    Taps are the stem and the activated inputs of the units that halve the resolution. The source
    is the Keras network with ResNet-34; ``first_stage="identity"`` is the variant of it whose
    first unit has no projection. ``stem="k3s1"`` is ours, for volumes, where a stem that divides
    by 4 loses too much: a convolution of kernel 3 at full resolution and no pooling, so that stage
    1 halves the resolution and the stem's skip is the finest.

    References:
        K. He et al.: Identity Mappings in Deep Residual Networks, 2016, doi
        10.1007/978-3-319-46493-0_38.
        P. Iakubovskii: Segmentation Models, 2019,
        https://github.com/qubvel/segmentation_models (the source).

    >>> network = ResNetUNet(2, 3, 1).eval()
    >>> network(torch.zeros(1, 3, 64, 96)).shape
    torch.Size([1, 1, 64, 96])
    """

    def __init__(  # noqa: PLR0913  # options by keyword
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        depth: int = 34,
        channels: Sequence[int] = (64, 64, 128, 256, 512),
        decoder_channels: Sequence[int] | None = None,
        strides: Sequence[Size] | None = None,
        kernel_sizes: Sequence[Size] | None = None,
        blocks: Sequence[int] | None = None,
        stem: str = "k7s2pool",
        first_stage: str = "projection",
        upsampling: str = "nearest",
        norm: NormSpec = ("batch", {"eps": 2e-5, "momentum": 0.01}),
        decoder_norm: NormSpec = ("batch", {"eps": 1e-3, "momentum": 0.01}),
        activation: str = "relu",
        dropout: float = 0.0,
        pretrained: str | Path | None = None,
    ) -> None:
        """Build the network with He initialisation, or on pretrained weights.

        Args:
            spatial_dims: 2 or 3.
            in_channels: channels of the image.
            out_channels: classes, background counted.
            depth: 18, 34, or 50 with bottleneck units, behind which there are 4 times as many
                channels.
            channels: width of the stem and of each stage.
            decoder_channels: per decoder level, coarsest first. By default halved from level to
                level, beginning with half the last stage's width.
            strides: of stem and stages, one or per axis; the pooling carries stage 1's. By default
                2 each, or 1 and then 2 with the small stem.
            kernel_sizes: of stem and stages, odd, one or per axis. By default 7 and then 3, or 3
                with the small stem. Decoder levels have that of their tap, the head and the
                levels in front of a large stem at most 3.
            blocks: units per stage. By default those of `depth`, cut or with the last repeated.
            stem: ``"k7s2pool"`` or ``"k3s1"``.
            first_stage: the first unit of stage 1 has a ``"projection"`` of its input, or adds it
                as it is (``"identity"``, where neither width nor resolution changes).
            upsampling: ``"nearest"`` or ``"deconv"`` (kernel = stride).
            norm: of the encoder; name, or name and options.
            decoder_norm: of the decoder.
            activation: see `volseg.networks.layers.Style`.
            dropout: probability that a channel is set to zero behind a convolution of the decoder
                in training.
            pretrained: state dict of a torchvision ResNet of this depth, see `load_pretrained`.

        Raises:
            ConfigError: lengths that differ, an unknown name, or a stride that the stem excludes.
            DataError: `pretrained` cannot be read or does not fit.
        """
        check_choice("stem", stem, ("k7s2pool", "k3s1"))
        check_choice("first_stage", first_stage, ("projection", "identity"))
        check_choice("upsampling", upsampling, ("nearest", "deconv"))
        if not is_count(depth) or depth not in BLOCKS:
            raise ConfigError(f"depth {depth!r}; expected one of {', '.join(map(str, BLOCKS))}.")
        is_small = stem == "k3s1"
        levels = _make_levels(spatial_dims, channels, strides, kernel_sizes, is_small)
        channels = levels.channels
        strictness = ("none", "group", "batch", "instance")
        names = (split_norm(decoder_norm)[0], split_norm(norm)[0])
        is_stricter = strictness.index(names[0]) > strictness.index(names[1])
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            total_stride=levels.total_strides[-1],
            # Behind a last stride of 1 the decoder, too, works at the coarsest resolution.
            norm=decoder_norm if is_stricter and set(levels.strides[-1]) == {1} else norm,
        )
        self.depth = int(depth)
        style = Style(spatial_dims, norm, activation, order="NAC", bias=False)
        self.stem = _make_stem(style, self.in_channels, levels)
        self.pool = nn.Identity() if is_small else _make_stem_pool(spatial_dims, levels.strides[1])
        self.stages = _make_stages(style, depth, levels, blocks, is_small, first_stage)
        taps = [channels[0], *(width * EXPANSION[depth] for width in channels[1:])]
        self.final = Unit(dataclasses.replace(style, order="NA"), taps[-1], taps[-1])
        widths = _decoder_widths(decoder_channels, channels[-1], len(channels) - is_small)
        # The large kernel is the stem's alone.
        fine_kernel = tuple(min(3, size) for size in levels.kernel_sizes[0])
        self.decoder = nn.ModuleList()
        coarse = taps[-1]
        style = dataclasses.replace(style, norm=decoder_norm, order="CDNA", dropout=dropout)
        for index, width in enumerate(widths):
            level = len(channels) - 1 - index
            up = _make_up(upsampling, spatial_dims, coarse, levels.strides[level])
            skip = taps[level - 1] if level else 0
            kernel = levels.kernel_sizes[level - 1] if level > 1 or is_small else fine_kernel
            convs = ConvStack(style, coarse + skip, width, kernel_size=kernel)
            self.decoder.append(UpLevel(up, convs))
            coarse = width
        self.head = make_conv(spatial_dims, widths[-1], self.out_channels, fine_kernel)
        initialise_he_(self)
        if pretrained is not None:
            self.load_pretrained(pretrained)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Segment ``(B, in_channels, *S)``.

        Returns:
            Logits ``(B, out_channels, *S)``.

        Raises:
            ConfigError: a shape that the network cannot take.
        """
        self.check_input(x)
        x = self.stem(x)
        taps = [x]
        x = self.pool(x)
        for number, stage in enumerate(self.stages):
            x, activated = stage(x)
            if number > 0:
                taps.append(activated)
        x = self.final(x)
        for index, level in enumerate(self.decoder):
            x = level(x, taps[-1 - index] if index < len(taps) else None)
        logits: torch.Tensor = self.head(x)
        return logits

    def load_pretrained(self, path: str | Path) -> PretrainedReport:
        """Take over what fits from a torchvision ResNet and log what was and was not loaded.

        Args:
            path: state dict in torchvision's format, of a ResNet of the same depth.

        Returns:
            Which entries were loaded, adapted and left.

        Raises:
            ConfigError: `path` is no path.
            DataError: the file cannot be read, holds more than tensors, or does not fit.
        """
        if not isinstance(path, (str, Path)):
            raise ConfigError(f"pretrained {path!r}; expected the path of a file.")
        report = load_resnet(self, Path(path), BLOCKS[self.depth])
        logger.info("%s", report)
        return report


class Stage(nn.Module):
    """Units in a row; the first changes width and resolution."""

    def __init__(self, units: Sequence[nn.Module]) -> None:
        """Keep the units."""
        super().__init__()
        self.first = units[0]
        self.units = nn.ModuleList(units[1:])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take ``(B, C, *S)``; give the stage's output and its activated input."""
        x, tap = self.first(x)
        for unit in self.units:
            x, _ = unit(x)
        return x, tap


class PreActivationUnit(nn.Module):
    """Norm-activation-convolution twice, or a bottleneck of three, added to the input.

    A projected shortcut takes the activated input.
    """

    def __init__(
        self,
        style: Style,
        in_channels: int,
        width: int,
        *,
        kernel_size: Size,
        stride: Size,
        expansion: int,
        projects: bool,
    ) -> None:
        """Build the unit.

        Args:
            style: of the network.
            in_channels: of the input.
            width: of the convolutions.
            kernel_size: odd; one or per axis.
            stride: of the unit; one or per axis.
            expansion: 1 for a basic unit, else of a bottleneck.
            projects: whether the shortcut is a convolution of kernel 1.
        """
        super().__init__()
        dims, out_channels = style.spatial_dims, width * expansion
        self.preactivation = Unit(dataclasses.replace(style, order="NA"), in_channels, in_channels)
        self.projects = projects
        self.projection = (
            make_conv(dims, in_channels, out_channels, 1, stride, bias=False)
            if projects
            else nn.Identity()
        )
        if expansion == 1:
            self.convs = nn.Sequential(
                make_conv(dims, in_channels, width, kernel_size, stride, bias=False),
                Unit(style, width, width, kernel_size),
            )
        else:
            self.convs = nn.Sequential(
                make_conv(dims, in_channels, width, 1, bias=False),
                Unit(style, width, width, kernel_size, stride),
                Unit(style, width, out_channels, 1),
            )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take ``(B, C, *S)``; give the unit's output and its activated input."""
        activated = self.preactivation(x)
        y = self.convs(activated)
        return y + (self.projection(activated) if self.projects else x), activated


class ImageNorm(nn.Module):
    """Normalise and shift the image; a scale is left to the convolution behind."""

    def __init__(self, style: Style, channels: int) -> None:
        """Build the norm of the style without its own scale and shift.

        Args:
            style: of the network.
            channels: of the image.
        """
        super().__init__()
        name, options = split_norm(style.norm)
        if name != "none":
            options["affine"] = False
        if name == "group":
            # The channels of an image are few; one group holds them all.
            options["num_groups"] = 1
        self.norm = make_norm((name, options), style.spatial_dims, channels)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take and give ``(B, channels, *S)``."""
        y: torch.Tensor = self.norm(x) + self.bias.view([-1] + [1] * (x.dim() - 2))
        return y


class UpLevel(nn.Module):
    """Upsample, join a tap behind if there is one, convolve."""

    def __init__(self, upsampling: nn.Module, convs: nn.Module) -> None:
        """Keep the two parts."""
        super().__init__()
        self.upsampling = upsampling
        self.convs = convs

    def forward(self, x: torch.Tensor, tap: torch.Tensor | None) -> torch.Tensor:
        """Take ``(B, C, *S / stride)`` and ``(B, C_tap, *S)``."""
        x = self.upsampling(x)
        if tap is not None:
            x = torch.cat([x, tap], 1)
        y: torch.Tensor = self.convs(x)
        return y


def _make_levels(
    spatial_dims: int,
    channels: Sequence[int],
    strides: Sequence[Size] | None,
    kernel_sizes: Sequence[Size] | None,
    is_small: bool,
) -> Levels:
    count = len(as_counts(channels))
    strides = [1 if is_small else 2, *[2] * (count - 1)] if strides is None else strides
    kernels = [3 if is_small else 7, *[3] * (count - 1)] if kernel_sizes is None else kernel_sizes
    levels = make_levels(spatial_dims, channels, strides, kernels, first_stride_is_one=is_small)
    if not is_small and max(levels.strides[0]) == 1:
        raise ConfigError(
            f"strides[0] {strides[0]} with stem 'k7s2pool'; expected 2 along an axis. Use stem "
            "'k3s1' for a stem at full resolution."
        )
    return levels


def _make_stem(style: Style, in_channels: int, levels: Levels) -> nn.Sequential:
    width = levels.channels[0]
    style = dataclasses.replace(style, order="CNA")
    unit = Unit(style, in_channels, width, levels.kernel_sizes[0], levels.strides[0])
    return nn.Sequential(ImageNorm(style, in_channels), unit)


def _make_stem_pool(spatial_dims: int, stride: tuple[int, ...]) -> nn.Module:
    return MAX_POOL[spatial_dims](kernel_size=3, stride=stride, padding=1)


def _make_stages(
    style: Style,
    depth: int,
    levels: Levels,
    blocks: Sequence[int] | None,
    is_small: bool,
    first_stage: str,
) -> nn.ModuleList:
    num_stages, expansion = len(levels.channels) - 1, EXPANSION[depth]
    if blocks is None:
        blocks = [*BLOCKS[depth], *[BLOCKS[depth][-1]] * num_stages][:num_stages]
    counts = as_counts(blocks)
    if len(counts) != num_stages:
        raise ConfigError(f"blocks {blocks!r}; expected {num_stages} numbers of 1 or more.")
    before = levels.channels[0]
    stages = nn.ModuleList()
    for number, width in enumerate(levels.channels[1:]):
        # The pooling behind the large stem has carried the stride of stage 1.
        stride = levels.strides[number + 1] if number or is_small else (1,) * style.spatial_dims
        is_identity = number == 0 and first_stage == "identity"
        if is_identity and (max(stride) > 1 or before != width * expansion):
            raise ConfigError(
                f"first_stage 'identity' with stride {stride} and {before} to {width * expansion} "
                "channels; expected stride 1 and equal numbers. Use 'projection'."
            )
        units: list[nn.Module] = []
        for index in range(counts[number]):
            units.append(
                PreActivationUnit(
                    style,
                    before,
                    width,
                    kernel_size=levels.kernel_sizes[number + 1],
                    stride=1 if index else stride,
                    expansion=expansion,
                    projects=index == 0 and not is_identity,
                )
            )
            before = width * expansion
        stages.append(Stage(units))
    return stages


def _decoder_widths(widths: Sequence[int] | None, coarsest: int, count: int) -> list[int]:
    if widths is None:
        return [max(1, coarsest // 2 ** (index + 1)) for index in range(count)]
    counts = as_counts(widths)
    if len(counts) != count:
        raise ConfigError(f"decoder_channels {widths!r}; expected {count} of 1 or more.")
    return [*counts]


def _make_up(kind: str, spatial_dims: int, channels: int, stride: tuple[int, ...]) -> nn.Module:
    if kind == "nearest":
        return make_nearest(stride, spatial_dims)
    return make_deconv(spatial_dims, channels, channels, stride)
