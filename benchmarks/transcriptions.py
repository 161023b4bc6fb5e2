"""Published segmentation networks, each written down plainly from its source.

They are the independent second opinion on volseg's builders: with the same weights, taken over in
order of execution, both give the same logits. They are also the peers in the speed benchmarks.
So nothing is imported from volseg, modules run in their source's order, and nothing is validated.

Every network takes images (B, in_channels, *S) and gives logits (B, out_channels, *S) without a
final activation; where it supervises several levels it gives a list of them, in the source's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Ints = Sequence[int]
WIDTHS = (64, 128, 256, 512, 1024)


def nd(name: str, dims: int) -> Any:
    """Pick a layer of torch for a number of axes: ``nd("Conv", 3)`` is ``nn.Conv3d``."""
    return getattr(nn, f"{name}{dims}d")


def conv3(dims: int, c_in: int, c_out: int, padding: int = 1) -> nn.Module:
    return nd("Conv", dims)(c_in, c_out, 3, padding=padding)


def conv_relu(dims: int, *channels: int, padding: int = 1) -> nn.Sequential:
    layers = [(conv3(dims, a, b, padding), nn.ReLU()) for a, b in pairwise(channels)]
    return nn.Sequential(*chain(*layers))


def conv_norm_relu(
    dims: int, *channels: int, padding: int = 1, affine: bool = True
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(channels):
        norm = nd("BatchNorm", dims)(b, affine=affine)
        layers += [conv3(dims, a, b, padding), norm, nn.ReLU()]
    return nn.Sequential(*layers)


def norm_relu_conv(dims: int, *channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(channels):
        layers += [nd("BatchNorm", dims)(a), nn.ReLU(), conv3(dims, a, b)]
    return nn.Sequential(*layers)


def keras_norm(dims: int, channels: int, eps: float = 1e-3, affine: bool = True) -> nn.Module:
    # Keras keeps 99 % of the running statistics in each step; torch names the other 1 %.
    return nd("BatchNorm", dims)(channels, eps=eps, momentum=0.01, affine=affine)


def up_conv(dims: int, c_in: int, c_out: int, kernel: int, **options: Any) -> nn.Module:
    return nd("ConvTranspose", dims)(c_in, c_out, kernel, stride=2, **options)


def double_size(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def centre_crop(x: Tensor, size: Ints) -> Tensor:
    for axis, (old, new) in enumerate(zip(x.shape[2:], size, strict=True), start=2):
        x = x.narrow(axis, round((old - new) / 2), new)
    return x


def encode(x: Tensor, downs: nn.ModuleList, pool: nn.Module) -> list[Tensor]:
    features: list[Tensor] = []
    for down in downs:
        features.append(down(pool(features[-1]) if features else x))
    return features


class LadderBlock(nn.Module):
    """Residual block of LadderNet, whose two convolutions are one and the same."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.conv = conv3(dims, channels, channels)
        self.dropout = nd("Dropout", dims)(0.25)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(F.relu(self.conv(x)))
        return F.relu(self.conv(y) + x)


class Ladder(nn.Module):
    """One encoder and decoder of LadderNet, on features that already have the first width."""

    def __init__(self, dims: int, widths: Ints) -> None:
        super().__init__()
        conv, pairs = nd("Conv", dims), list(pairwise(widths))
        self.down_blocks = nn.ModuleList(LadderBlock(dims, a) for a, _ in pairs)
        self.downs = nn.ModuleList(conv(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.bottom = LadderBlock(dims, widths[-1])
        self.ups = nn.ModuleList(
            up_conv(dims, b, a, 3, padding=1, output_padding=1) for a, b in reversed(pairs)
        )
        self.up_blocks = nn.ModuleList(LadderBlock(dims, a) for a, _ in reversed(pairs))

    def forward(self, x: Tensor, previous: Sequence[Tensor] = ()) -> list[Tensor]:
        """Give the decoder's features, coarsest first; `previous` are the last ladder's."""
        skips = []
        for i, (block, down) in enumerate(zip(self.down_blocks, self.downs, strict=True)):
            skips.append(block(x + previous[-1 - i] if previous else x))
            x = F.relu(down(skips[-1]))
        features = [self.bottom(x)]
        for up, block in zip(self.ups, self.up_blocks, strict=True):
            features.append(block(up(features[-1]) + skips.pop()))
        return features


class LadderNet(nn.Module):
    """LadderNet of two ladders (Zhuang, 2018, doi 10.48550/arXiv.1810.07810)."""

    def __init__(
        self,
        dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 2,
        layers: int = 3,
        filters: int = 16,
    ) -> None:
        super().__init__()
        widths = [filters * 2**i for i in range(layers + 1)]
        self.first = conv3(dims, in_channels, filters)
        self.ladder1 = Ladder(dims, widths)
        self.between = LadderBlock(dims, filters)
        self.ladder2 = Ladder(dims, widths)
        self.head = nd("Conv", dims)(filters, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.ladder1(F.relu(self.first(x)))
        return self.head(self.ladder2(self.between(features[-1]), features)[-1])


class CroppingUNet(nn.Module):
    """The way through U-Net and 3D U-Net, which crop their skips at the centre."""

    def forward(self, x: Tensor) -> Tensor:
        *skips, x = encode(x, self.downs, self.pool)
        for up, merge in zip(self.ups, self.merges, strict=True):
            x = up(x)
            x = merge(torch.cat([x, centre_crop(skips.pop(), x.shape[2:])], dim=1))
        return self.head(x)


class LabmlUNet(CroppingUNet):
    """U-Net as labml writes it (Ronneberger et al., 2015, doi 10.1007/978-3-319-24574-4_28)."""

    def __init__(
        self,
        dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 1,
        widths: Ints = WIDTHS,
        padding: int = 1,
    ) -> None:
        super().__init__()
        pairs = list(pairwise((in_channels, *widths)))
        self.downs = nn.ModuleList(conv_relu(dims, a, b, b, padding=padding) for a, b in pairs)
        self.pool = nd("MaxPool", dims)(2)
        pairs = pairs[:0:-1]
        self.ups = nn.ModuleList(up_conv(dims, b, a, 2) for a, b in pairs)
        self.merges = nn.ModuleList(conv_relu(dims, 2 * a, a, a, padding=padding) for a, _ in pairs)
        self.head = nd("Conv", dims)(widths[0], out_channels, 1)


class RonnebergerUNet(LabmlUNet):
    """U-Net with the paper's unpadded convolutions: 572 pixels in, 388 out."""

    def __init__(
        self, dims: int = 2, in_channels: int = 1, out_channels: int = 2, widths: Ints = WIDTHS
    ) -> None:
        super().__init__(dims, in_channels, out_channels, widths, padding=0)


class CicekUNet(CroppingUNet):
    """3D U-Net (Çiçek et al., 2016, doi 10.1007/978-3-319-46723-8_49); the paper has padding 0."""

    def __init__(
        self,
        dims: int = 3,
        in_channels: int = 3,
        out_channels: int = 3,
        widths: Ints = (32, 64, 128, 256),
        padding: int = 1,
    ) -> None:
        super().__init__()

        def block(*channels: int) -> nn.Sequential:
            return conv_norm_relu(dims, *channels, padding=padding, affine=False)

        # Each level doubles its width before it pools, in its second convolution.
        doubled = [2 * w for w in widths]
        inputs = [in_channels, *doubled[:-1]]
        self.downs = nn.ModuleList(map(block, inputs, widths, doubled))
        self.pool = nd("MaxPool", dims)(2)
        pairs = list(pairwise(reversed(doubled)))
        self.ups = nn.ModuleList(up_conv(dims, b, b, 2, bias=False) for b, _ in pairs)
        self.merges = nn.ModuleList(block(b + a, a, a) for b, a in pairs)
        self.head = nd("Conv", dims)(doubled[0], out_channels, 1)


class ZengUNet(CicekUNet):
    """3D U-Net with middle levels classified (Zeng, 2017, doi 10.1007/978-3-319-67389-9_32).

    ``taps="encoder"`` has the branches of `DeeplySupervised3d` on the way down instead.
    """

    def __init__(
        self,
        dims: int = 3,
        in_channels: int = 3,
        out_channels: int = 3,
        widths: Ints = (32, 64, 128, 256),
        taps: Literal["decoder", "encoder"] = "decoder",
    ) -> None:
        super().__init__(dims, in_channels, out_channels, widths)
        self.taps = taps
        self.branches = nn.ModuleList()
        for level, width in enumerate(widths[1:-1], start=1):
            channels = [2 * width // 2**i for i in range(level + 1)]
            if taps == "encoder":
                pairs = pairwise(channels)
                ups = [up_conv(dims, b, a, 4, padding=1, bias=False) for b, a in pairs]
                branch = nn.Sequential(*ups, nd("Conv", dims)(channels[-1], out_channels, 1))
            else:
                mode = "bilinear" if dims == 2 else "trilinear"
                head = nd("Conv", dims)(2 * width, out_channels, 1)
                branch = nn.Sequential(head, nn.Upsample(scale_factor=2**level, mode=mode))
            self.branches.append(branch)

    def forward(self, x: Tensor) -> list[Tensor]:
        encoded = encode(x, self.downs, self.pool)
        decoded = [encoded[-1]]
        for up, merge, skip in zip(self.ups, self.merges, encoded[-2::-1], strict=True):
            decoded.append(merge(torch.cat([up(decoded[-1]), skip], dim=1)))
        taps = encoded if self.taps == "encoder" else decoded[::-1]
        outputs = [self.head(decoded[-1])]
        outputs += [branch(tap) for branch, tap in zip(self.branches, taps[1:-1], strict=True)]
        return outputs


class KerasUp(nn.Module):
    """Nearest neighbour to twice the size, then a convolution of kernel 2 and ReLU."""

    def __init__(self, dims: int, c_in: int, c_out: int) -> None:
        super().__init__()
        self.trailing = (0, 1) * dims  # Keras pads an even kernel at the end of each axis
        self.conv = nd("Conv", dims)(c_in, c_out, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.pad(double_size(x), self.trailing)))


class KerasUNet(nn.Module):
    """U-Net in zhixuhao's Keras form; `tail` is its convolution to two channels before the head."""

    def __init__(
        self,
        dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 1,
        widths: Ints = WIDTHS,
        tail: bool = True,
    ) -> None:
        super().__init__()
        pairs = list(pairwise((in_channels, *widths)))
        self.downs = nn.ModuleList(conv_relu(dims, a, b, b) for a, b in pairs)
        for deepest in self.downs[-2:]:
            deepest.append(nn.Dropout(0.5))
        self.pool = nd("MaxPool", dims)(2)
        pairs = pairs[:0:-1]
        self.ups = nn.ModuleList(KerasUp(dims, b, a) for a, b in pairs)
        self.merges = nn.ModuleList(conv_relu(dims, 2 * a, a, a) for a, _ in pairs)
        self.tail = conv_relu(dims, widths[0], 2) if tail else nn.Identity()
        self.head = nd("Conv", dims)(2 if tail else widths[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        *skips, x = encode(x, self.downs, self.pool)
        for up, merge in zip(self.ups, self.merges, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        return self.head(self.tail(x))


class NestedGrid(nn.Module):
    """The nodes of UNet++ at (level, column), run in a given order, and heads on its top row."""

    def __init__(
        self,
        dims: int,
        channels: Ints,
        order: Sequence[tuple[int, int]],
        down: Callable[[int, int], nn.Module],
        up: Callable[[int, int], nn.Module],
        node: Callable[[int, int], nn.Module],
    ) -> None:
        super().__init__()
        self.order = order
        self.pool = nd("MaxPool", dims)(2)
        self.ups, self.nodes = nn.ModuleDict(), nn.ModuleDict()
        for i, j in order:
            above, width = channels[i : i + 2]
            if j:
                self.ups[f"{i}{j}"] = up(channels[i + 2], width)
                self.nodes[f"{i}{j}"] = node((j + 1) * width, width)
            else:
                self.nodes[f"{i}{j}"] = down(above, width)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        grid: dict[tuple[int, int], Tensor] = {}
        for i, j in self.order:
            if j:
                up = self.ups[f"{i}{j}"](grid[i + 1, j - 1])
                x = torch.cat([up, *(grid[i, k] for k in range(j))], dim=1)
            elif i:
                x = self.pool(grid[i - 1, 0])
            grid[i, j] = self.nodes[f"{i}{j}"](x)
        top = [grid[0, j] for i, j in sorted(self.order) if i == 0 and j]
        if not self.deep_supervision:
            return self.heads[-1](top[-1])
        return [head(x) for head, x in zip(self.heads, top, strict=True)]


class NestedUNet(NestedGrid):
    """UNet++ in its PyTorch form (Zhou et al., 2018, doi 10.1007/978-3-030-00889-5_1)."""

    ORDER = ((0, 1), (1, 1), (2, 1), (3, 1), (2, 2), (1, 2), (1, 3), (0, 2), (0, 3), (0, 4))

    def __init__(
        self,
        dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 3,
        widths: Ints = WIDTHS,
        deep_supervision: bool = False,
    ) -> None:
        order = [(i, 0) for i in range(len(widths))]
        order += [(i, j) for i, j in self.ORDER if i + j < len(widths)]
        super().__init__(
            dims,
            (in_channels, *widths),
            order,
            down=lambda a, b: conv_norm_relu(dims, a, b, b),
            up=lambda a, b: up_conv(dims, a, b, 4, padding=1),
            node=lambda a, b: norm_relu_conv(dims, a, b, b),
        )
        self.deep_supervision = deep_supervision
        # All heads are built, and counted, even where only the last is used.
        self.heads = nn.ModuleList(
            norm_relu_conv(dims, widths[0], out_channels) for _ in widths[1:]
        )


class NestedUNetKeras(NestedGrid):
    """UNet++ in its Keras form: without normalisation, each node run as soon as it can be."""

    def __init__(
        self,
        dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 2,
        widths: Ints = (32, 64, 128, 256, 512),
        deep_supervision: bool = True,
    ) -> None:
        order = [(d - j, j) for d in range(len(widths)) for j in range(d + 1)]
        super().__init__(
            dims,
            (in_channels, *widths),
            order,
            down=lambda a, b: conv_relu(dims, a, b, b),
            up=lambda a, b: KerasUp(dims, a, b),
            node=lambda a, b: conv_relu(dims, a, b, b),
        )
        self.deep_supervision = deep_supervision
        supervised = widths[1:] if deep_supervision else widths[-1:]
        self.heads = nn.ModuleList(nd("Conv", dims)(widths[0], out_channels, 1) for _ in supervised)


class NormWithoutScale(nn.Module):
    """Batch norm that learns a bias per channel and no scale."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.norm = keras_norm(dims, channels, eps=2e-5, affine=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.bias.view(-1, *[1] * (x.ndim - 2))


class PreActivationUnit(nn.Module):
    """Residual unit of the pre-activated ResNet; gives its output and its activated input."""

    def __init__(self, dims: int, c_in: int, c_out: int, stride: int, project: bool) -> None:
        super().__init__()
        conv = nd("Conv", dims)
        self.norm1 = keras_norm(dims, c_in, eps=2e-5)
        self.conv1 = conv(c_in, c_out, 3, stride, padding=1, bias=False)
        self.norm2 = keras_norm(dims, c_out, eps=2e-5)
        self.conv2 = conv(c_out, c_out, 3, padding=1, bias=False)
        self.project = conv(c_in, c_out, 1, stride, bias=False) if project else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        active = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return y + (self.project(active) if self.project else x), active


class ResNet34UNet(nn.Module):
    """U-Net on a pre-activated ResNet-34 (qubvel's segmentation_models for Keras).

    The variant "identity" leaves out the projection in the first unit of the first stage.
    """

    def __init__(
        self,
        dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 1,
        widths: Ints = (64, 64, 128, 256, 512),
        decoder_widths: Ints = (256, 128, 64, 32, 16),
        variant: Literal["qubvel", "identity"] = "qubvel",
    ) -> None:
        super().__init__()
        self.norm_data = NormWithoutScale(dims, in_channels)
        self.stem = nd("Conv", dims)(in_channels, widths[0], 7, stride=2, padding=3, bias=False)
        self.stem_norm = keras_norm(dims, widths[0], eps=2e-5)
        self.pool = nd("MaxPool", dims)(3, stride=2, padding=1)
        self.stages = nn.ModuleList()
        for level, (a, b) in enumerate(pairwise(widths)):
            stride, project = (2, True) if level else (1, variant == "qubvel")
            units = [PreActivationUnit(dims, a, b, stride, project)]
            units += [PreActivationUnit(dims, b, b, 1, False) for _ in range((2, 3, 5, 2)[level])]
            self.stages.append(nn.ModuleList(units))
        self.last_norm = keras_norm(dims, widths[-1], eps=2e-5)
        self.decoder = nn.ModuleList()
        skips = (*widths[-2::-1], 0)
        for skip, (a, b) in zip(skips, pairwise((widths[-1], *decoder_widths)), strict=True):
            self.decoder.append(self.decoder_block(dims, a + skip, b))
        self.head = conv3(dims, decoder_widths[-1], out_channels)

    @staticmethod
    def decoder_block(dims: int, c_in: int, c_out: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for c in (c_in, c_out):
            conv = nd("Conv", dims)(c, c_out, 3, padding=1, bias=False)
            layers += [conv, keras_norm(dims, c_out), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(self.norm_data(x))))
        taps = [x]
        x = self.pool(x)
        for level, stage in enumerate(self.stages):
            for n, unit in enumerate(stage):
                x, active = unit(x)
                if level and n == 0:  # the first stage does not shrink, and is not tapped
                    taps.append(active)
        x = F.relu(self.last_norm(x))
        for block in self.decoder:
            x = double_size(x)
            x = block(torch.cat([x, taps.pop()], dim=1) if taps else x)
        return self.head(x)


class SummedLogitsUNet(nn.Module):
    """3D U-Net that adds up the logits of its three finest levels (3DUnet-Tensorflow-Brats18).

    The source pads strided convolutions as TensorFlow does; here they are padded on both sides.
    """

    def __init__(
        self,
        dims: int = 3,
        in_channels: int = 4,
        out_channels: int = 4,
        widths: Ints = (16, 32, 64, 128, 256),
        residual: bool = True,
        norm: Literal["instance", "batch"] = "instance",
    ) -> None:
        super().__init__()
        make_norm = nd("InstanceNorm" if norm == "instance" else "BatchNorm", dims)

        def unit(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
            conv = nd("Conv", dims)(c_in, c_out, kernel, stride, padding=kernel // 2)
            return nn.Sequential(conv, make_norm(c_out, affine=True), nn.ReLU())

        self.residual = residual
        fine, pairs = widths[:-1], list(pairwise(widths))
        self.first = unit(in_channels, widths[0])
        self.blocks = nn.ModuleList(nn.Sequential(unit(w, w), unit(w, w)) for w in widths)
        self.downs = nn.ModuleList(unit(a, b, stride=2) for a, b in pairs)
        self.ups = nn.ModuleList(unit(b, a) for a, b in pairs)
        self.merges = nn.ModuleList(nn.Sequential(unit(2 * w, w), unit(w, w, 1)) for w in fine)
        self.heads = nn.ModuleList(nd("Conv", dims)(w, out_channels, 1) for w in fine[:3])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        skips: list[Tensor] = []
        for level, block in enumerate(self.blocks):
            x = self.downs[level - 1](x) if level else x
            x = x + block(x) if self.residual else block(x)
            skips.append(x)
        logits: Tensor | None = None
        for level in reversed(range(len(self.ups))):
            x = self.ups[level](double_size(x))
            x = self.merges[level](torch.cat([x, skips[level]], dim=1))
            if level < len(self.heads):
                own = self.heads[level](x)
                logits = own if logits is None else own + double_size(logits)
        return logits


class HyperUnit(nn.Module):
    """Residual unit of the hypercolumn network; `last` closes it with a norm and ReLU."""

    def __init__(self, dims: int, channels: int, last: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = keras_norm(dims, channels), keras_norm(dims, channels)
        self.conv1, self.conv2 = conv3(dims, channels, channels), conv3(dims, channels, channels)
        self.norm3 = keras_norm(dims, channels) if last else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y))) + x
        return F.relu(self.norm3(y)) if self.norm3 else y


class HypercolumnUNet(nn.Module):
    """Residual U-Net whose head reads all decoder levels at once (a Keras kernel for TGS Salt).

    The source pads transposed convolutions as TensorFlow does; here they are padded symmetrically.
    """

    def __init__(
        self,
        dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 1,
        widths: Ints = (16, 32, 64, 128, 256),
    ) -> None:
        super().__init__()

        def stage(c_in: int, c_out: int, dropout: float) -> nn.Sequential:
            units = HyperUnit(dims, c_out, last=False), HyperUnit(dims, c_out, last=True)
            return nn.Sequential(nn.Dropout(dropout), conv3(dims, c_in, c_out), *units)

        pairs, dropouts = list(pairwise((in_channels, *widths))), (0, 0.25, 0.5, 0.5, 0.5)
        self.downs = nn.ModuleList(
            stage(a, b, p) for (a, b), p in zip(pairs, dropouts, strict=False)
        )
        self.pool = nd("MaxPool", dims)(2)
        pairs = pairs[:0:-1]
        self.ups = nn.ModuleList(
            up_conv(dims, b, a, 3, padding=1, output_padding=1) for a, b in pairs
        )
        self.merges = nn.ModuleList(stage(2 * a, a, 0.5) for a, _ in pairs)
        fuse = conv3(dims, sum(widths[:-1]), widths[0])
        head = nd("Conv", dims)(widths[0], out_channels, 1)
        self.head = nn.Sequential(nn.Dropout(0.5), fuse, nn.ReLU(), head)

    def forward(self, x: Tensor) -> Tensor:
        *skips, x = encode(x, self.downs, self.pool)
        columns: list[Tensor] = []
        for up, merge in zip(self.ups, self.merges, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], dim=1))
            columns.insert(0, x)
        size, mode = x.shape[2:], "bilinear" if x.ndim == 4 else "trilinear"
        coarse = [F.interpolate(column, size, mode=mode) for column in columns[1:]]
        return self.head(torch.cat([x, *coarse], dim=1))


class DeeplySupervised3d(nn.Module):
    """3D deeply supervised network as in HeartSeg (Dou, 2017, doi 10.1016/j.media.2017.05.001)."""

    def __init__(
        self,
        dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 3,
        widths: Ints = (32, 64, 128, 256),
    ) -> None:
        super().__init__()

        def branch(*channels: int, bias: bool) -> nn.Sequential:
            pairs = pairwise(channels)
            ups = [up_conv(dims, b, a, 4, padding=1, bias=bias) for b, a in pairs]
            return nn.Sequential(*ups, nd("Conv", dims)(channels[-1], out_channels, 1))

        w1, w2, w3, w4 = widths
        self.stages = nn.ModuleList([conv_norm_relu(dims, in_channels, w1)])
        self.stages.extend(conv_norm_relu(dims, a, b, b) for a, b in pairwise(widths))
        self.pool = nd("MaxPool", dims)(2)
        self.main = branch(w4, w3, w2, w1, bias=True)
        self.aux1 = branch(w2, w1, bias=False)
        self.aux2 = branch(w3, w2, w1, bias=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        _, half, quarter, eighth = encode(x, self.stages, self.pool)
        return [self.main(eighth), self.aux1(half), self.aux2(quarter)]


def conv_norm_leaky(
    dims: int, c_in: int, c_out: int, kernel: Ints, stride: Ints | int = 1
) -> nn.Sequential:
    conv = nd("Conv", dims)(c_in, c_out, kernel, stride, padding=[k // 2 for k in kernel])
    norm = nd("InstanceNorm", dims)(c_out, affine=True)
    return nn.Sequential(conv, norm, nn.LeakyReLU(0.01, inplace=True))


def conv_stack(
    dims: int, c_in: int, c_out: int, kernel: Ints, stride: Ints | int, n_conv: int
) -> nn.Sequential:
    first = conv_norm_leaky(dims, c_in, c_out, kernel, stride)
    others = [conv_norm_leaky(dims, c_out, c_out, kernel) for _ in range(n_conv - 1)]
    return nn.Sequential(first, *others)


class PlannedUNet(nn.Module):
    """nnU-Net's decoder behind an encoder with one stage per entry of `channels`.

    Under deep supervision it gives logits at every decoder stage's own size, finest first.
    """

    def __init__(
        self,
        encoder: Sequence[nn.Module],
        dims: int,
        out_channels: int,
        channels: Ints,
        strides: Sequence[Ints],
        kernels: Sequence[Ints],
        n_conv: int,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.encoder = nn.ModuleList(encoder)
        self.ups, self.merges, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for s in reversed(range(len(channels) - 1)):
            c, stride = channels[s], strides[s + 1]
            self.ups.append(nd("ConvTranspose", dims)(channels[s + 1], c, stride, stride))
            self.merges.append(conv_stack(dims, 2 * c, c, kernels[s], 1, n_conv))
            # Heads are built, and counted, even where only the finest is used.
            self.heads.append(nd("Conv", dims)(c, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        *skips, x = encode(x, self.encoder, nn.Identity())
        logits: list[Tensor] = []
        for up, merge, head in zip(self.ups, self.merges, self.heads, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], dim=1))
            if self.deep_supervision or not skips:
                logits.insert(0, head(x))
        return logits if self.deep_supervision else logits[0]


class PlanUNet(PlannedUNet):
    """nnU-Net's plain U-Net (Isensee et al., 2021, doi 10.1038/s41592-020-01008-z).

    `channels`, `strides` and `kernels` have one entry per stage, finest first.
    """

    def __init__(
        self,
        channels: Ints,
        strides: Sequence[Ints],
        kernels: Sequence[Ints],
        n_conv: int = 2,
        dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 2,
        deep_supervision: bool = False,
    ) -> None:
        encoder = [
            conv_stack(dims, a, b, kernels[s], strides[s], n_conv)
            for s, (a, b) in enumerate(pairwise((in_channels, *channels)))
        ]
        super().__init__(
            encoder, dims, out_channels, channels, strides, kernels, n_conv, deep_supervision
        )


class ResidualBlock(nn.Module):
    """Residual block of nnU-Net, with a shortcut by average pooling (form D of ResNet)."""

    def __init__(self, dims: int, c_in: int, c_out: int, kernel: Ints, stride: Ints) -> None:
        super().__init__()
        self.skip = nn.Sequential()
        if any(step != 1 for step in stride):
            self.skip.append(nd("AvgPool", dims)(stride, stride))
        if c_in != c_out:
            self.skip.append(nd("Conv", dims)(c_in, c_out, 1, bias=False))
            self.skip.append(nd("InstanceNorm", dims)(c_out, affine=True))
        self.conv1 = conv_norm_leaky(dims, c_in, c_out, kernel, stride)
        self.conv2 = conv_norm_leaky(dims, c_out, c_out, kernel)[:2]

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.skip(x)
        return F.leaky_relu(self.conv2(self.conv1(x)) + shortcut, 0.01, inplace=True)


class ResEncUNet(PlannedUNet):
    """nnU-Net with a residual encoder (Isensee et al., 2024, doi 10.1007/978-3-031-72114-4_47)."""

    def __init__(
        self,
        channels: Ints,
        strides: Sequence[Ints],
        kernels: Sequence[Ints],
        blocks: Ints = (1, 3, 4, 6, 6, 6),
        dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 2,
        deep_supervision: bool = False,
    ) -> None:
        encoder = []
        for s, (a, b) in enumerate(pairwise((channels[0], *channels))):
            units = [ResidualBlock(dims, a, b, kernels[s], strides[s])]
            units += [ResidualBlock(dims, b, b, kernels[s], [1]) for _ in range(blocks[s] - 1)]
            encoder.append(nn.Sequential(*units))
        encoder[0].insert(0, conv_norm_leaky(dims, in_channels, channels[0], kernels[0]))
        super().__init__(
            encoder, dims, out_channels, channels, strides, kernels, 1, deep_supervision
        )
