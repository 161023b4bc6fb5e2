"""UNet++: a U-Net whose skip connections are dense nests of convolutions.

::

    level 0    X00 ----> X01 ----> X02 ----> X03         every X(0, j > 0) can have a head
                  v     ^         ^         ^
    level 1         X10 ----> X11 ----> X12              X(i, j) takes X(i, 0) .. X(i, j - 1)
                      v      ^         ^                 and X(i + 1, j - 1), upsampled
    level 2             X20 ----> X21
                           v     ^
    level 3                  X30
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from volseg.errors import ConfigError, check_choice
from volseg.networks.layers import (
    ConvStack,
    NormSpec,
    Size,
    Style,
    Unit,
    check_flag,
    initialise_he_,
    is_count,
    make_conv,
    make_deconv,
    make_nearest,
    make_pooling,
)
from volseg.networks.levels import Levels, make_levels
from volseg.networks.network import SegmentationNetwork

FORMS: dict[str, dict[str, Any]] = {
    "pytorch": {"channels": (64, 128, 256, 512, 1024), "norm": "batch"},
    "keras": {"channels": (32, 64, 128, 256, 512), "norm": "none"},
}


class UNetPlusPlus(SegmentationNetwork):
    """Nested U-Net of any depth, written from the paper.

    ``form="pytorch"`` has nodes of norm-activation-convolution, transposed convolutions of kernel
    4, and pre-activated heads of kernel 3. ``form="keras"`` has convolution-activation without
    normalisation, repeated voxels with a convolution of kernel 2 padded behind, and heads of
    kernel 1. With deep supervision all nodes of the finest level but the first have a head at
    full resolution; without, only the last has one, and no other is built.

    The method's authors publish their own code for non-commercial use only and state that a
    patent is pending. This is no copy of that code; ask your own counsel about the patent.

    References:
        Z. Zhou, M. M. R. Siddiquee, N. Tajbakhsh, J. Liang: UNet++: A Nested U-Net Architecture
        for Medical Image Segmentation, 2018, doi 10.1007/978-3-030-00889-5_1.

    >>> network = UNetPlusPlus(2, 1, 2, channels=(4, 8, 16)).train()
    >>> [tuple(logits.shape) for logits in network(torch.zeros(2, 1, 8, 8))]
    [(2, 2, 8, 8), (2, 2, 8, 8)]
    """

    options: dict[str, Any]

    __jit_ignored_attributes__ = ("levels", "options")

    supervised_parts = ("heads",)

    def __init__(  # noqa: PLR0913  # options by keyword
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        form: str = "pytorch",
        channels: Sequence[int] | None = None,
        strides: Sequence[Size] | None = None,
        kernel_sizes: Sequence[Size] | None = None,
        norm: NormSpec | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
        deep_supervision: bool = True,
        eval_output: str | int = "last",
        mean_of: str = "logits",
    ) -> None:
        """Build the network with He initialisation.

        Args:
            spatial_dims: 2 or 3.
            in_channels: channels of the image.
            out_channels: classes, background counted.
            form: ``"pytorch"`` or ``"keras"``.
            channels: feature maps per level, finest first; two levels or more. By default 64 to
                1024, or 32 to 512 in the Keras form.
            strides: of the pooling before each level, one or per axis; the first is 1.
            kernel_sizes: per level, odd, one or per axis. By default 3.
            norm: name, or name and options. By default batch, or none in the Keras form.
            activation: see `volseg.networks.layers.Style`.
            dropout: probability that a channel is set to zero behind a convolution in training.
            deep_supervision: in training mode, return the logits of all heads.
            eval_output: which logits eval mode gives: of the ``"last"`` head, of head number 1 and
                up, or the ``"mean"`` of all.
            mean_of: what ``eval_output="mean"`` averages: ``"logits"``, or the probabilities of
                ``"softmax"`` or ``"sigmoid"``, given as logits of that same activation.

        Raises:
            ConfigError: lengths that differ, an unknown name, or an output without a head.
        """
        check_choice("form", form, FORMS)
        channels = FORMS[form]["channels"] if channels is None else channels
        norm = FORMS[form]["norm"] if norm is None else norm
        check_flag("deep_supervision", deep_supervision)
        levels = make_levels(spatial_dims, channels, strides, kernel_sizes)
        channels = levels.channels
        depth = len(channels) - 1
        heads = range(1 if deep_supervision else depth, depth + 1)
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            total_stride=levels.total_strides[-1],
            norm=norm,
            supervision_strides=((1,) * spatial_dims,) * len(heads),
        )
        self.averages = isinstance(eval_output, str) and eval_output == "mean"
        self.mean_of = mean_of
        self._check_mean()
        self.eval_head = _find_head(eval_output, heads)
        self.eval_index = heads.index(self.eval_head)
        style = Style(spatial_dims, norm, activation, dropout=dropout)
        self.options = {
            "form": form,
            "norm": norm,
            "activation": activation,
            "dropout": dropout,
        }
        self.levels = levels
        self.nodes = nn.ModuleDict(
            {
                _key(i, j): Node(form, style, self.in_channels, levels, i, j)
                for i, j in _order(form, depth)
            }
        )
        self.diagonals = {_key(i, j): i + j for i, j in _order(form, depth)}
        self.heads = nn.ModuleDict(
            {_key(0, j): _make_head(form, style, channels[0], self.out_channels) for j in heads}
        )
        initialise_he_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Segment ``(B, in_channels, *S)``.

        Returns:
            Logits ``(B, out_channels, *S)``. In training mode with deep supervision a list of
            them, the last head's first.

        Raises:
            ConfigError: a shape that the network cannot take.
        """
        self.check_input(x)
        supervises = self.training and self.deep_supervision
        needs_all = supervises or self.averages
        features = {"image": x}
        for key, node in self.nodes.items():
            if needs_all or self.diagonals[key] <= self.eval_head:
                features[key] = node(features)
        outputs: list[torch.Tensor] = []
        for index, (key, head) in enumerate(self.heads.items()):
            if needs_all or index == self.eval_index:
                outputs.append(head(features[key]))
        if supervises:
            return outputs[::-1]
        return average_logits(torch.stack(outputs), self.mean_of) if self.averages else outputs[0]

    def _check_mean(self) -> None:
        check_choice("mean_of", self.mean_of, ("logits", "softmax", "sigmoid"))
        if self.mean_of != "logits" and not self.averages:
            raise ConfigError(
                f"mean_of '{self.mean_of}' without an average; expected eval_output 'mean'."
            )
        if self.mean_of == "softmax" and self.out_channels == 1:
            raise ConfigError("mean_of 'softmax' with 1 out_channels; expected 'sigmoid'.")

    def prune(self, level: int) -> UNetPlusPlus:
        """A smaller network that gives what head number `level` gives, with copies of its weights.

        Args:
            level: 1 and up; head and nodes beyond it are left out.

        Raises:
            ConfigError: this network has no such head.
        """
        key = _key(0, level)
        if not is_count(level) or key not in self.heads:
            raise ConfigError(
                f"level {level!r}; expected a head of this network: {self._head_numbers()}. Train "
                "with deep_supervision=True to have one per level."
            )
        pruned = UNetPlusPlus(
            self.spatial_dims,
            self.in_channels,
            self.out_channels,
            channels=self.levels.channels[: level + 1],
            strides=self.levels.strides[: level + 1],
            kernel_sizes=self.levels.kernel_sizes[: level + 1],
            deep_supervision=False,
            **self.options,
        )
        own = self.state_dict()
        pruned.load_state_dict({name: own[name] for name in pruned.state_dict()})
        return pruned.to(next(self.parameters())).train(self.training)

    def _head_numbers(self) -> list[int]:
        return [int(key.split("_")[1]) for key in self.heads]


def average_logits(logits: torch.Tensor, mean_of: str) -> torch.Tensor:
    """Mean over the first axis of ``(N, B, C, *S)``: of logits, or of what they mean.

    Args:
        logits: of N heads.
        mean_of: ``"logits"``, or the activation behind which to average: ``"softmax"`` or
            ``"sigmoid"``.

    Returns:
        Logits ``(B, C, *S)``; the activation turns them into the mean probabilities.
    """
    if mean_of == "softmax":
        return functional.log_softmax(logits, 2).logsumexp(0) - math.log(len(logits))
    if mean_of == "sigmoid":
        # The logit of p is log p - log(1 - p); the number of heads cancels out.
        return functional.logsigmoid(logits).logsumexp(0) - functional.logsigmoid(
            -logits
        ).logsumexp(0)
    return logits.mean(0)


class Node(nn.Module):
    """X(i, j) of the paper: what comes from another level joined with its own row, convolved."""

    def __init__(
        self, form: str, style: Style, in_channels: int, levels: Levels, i: int, j: int
    ) -> None:
        """Build what node (i, j) of the form needs.

        Args:
            form: a key of `FORMS`.
            style: of the network.
            in_channels: of the image.
            levels: widths, strides and kernels.
            i: row, the level; 0 is the finest.
            j: column; 0 is the encoder.
        """
        super().__init__()
        width, kernel = levels.channels[i], levels.kernel_sizes[i]
        dims = style.spatial_dims
        # TorchScript cannot tell the type of an empty list.
        self.row = [_key(i, k) for k in range(j)] or [""]
        if j == 0:
            before = levels.channels[i - 1] if i else in_channels
            self.source = _key(i - 1, 0) if i else "image"
            self.resampling = make_pooling(levels.strides[i], dims) if i else nn.Identity()
            self.convs = ConvStack(style, before, width, kernel_size=kernel)
            return
        self.source = _key(i + 1, j - 1)
        stride, coarse = levels.strides[i + 1], levels.channels[i + 1]
        if form == "keras":
            conv = Unit(style, coarse, width, kernel_size=stride)
            self.resampling = nn.Sequential(make_nearest(stride, dims), conv)
        else:
            style = dataclasses.replace(style, order="NACD")
            self.resampling = make_deconv(dims, coarse, width, stride, max(4, *stride))
        self.convs = ConvStack(style, (j + 1) * width, width, kernel_size=kernel)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Compute the node from the nodes before it, which are named by row and column."""
        x: torch.Tensor = self.resampling(features[self.source])
        if self.row[0]:
            x = torch.cat([x] + [features[key] for key in self.row], 1)
        y: torch.Tensor = self.convs(x)
        return y


def _key(i: int, j: int) -> str:
    return f"{i}_{j}"


def _order(form: str, depth: int) -> list[tuple[int, int]]:
    """Nodes as their sources run them: it decides nothing but which weights are whose."""
    if form == "keras":
        return [(d - j, j) for d in range(depth + 1) for j in range(d + 1)]
    columns = [(i, j) for j in (0, 1) for i in range(depth + 1 - j)]
    rows = [(i, j) for i in range(depth - 2, -1, -1) for j in range(2, depth - i + 1)]
    return columns + rows


def _make_head(form: str, style: Style, in_channels: int, out_channels: int) -> nn.Module:
    if form == "keras":
        return make_conv(style.spatial_dims, in_channels, out_channels)
    pre_activated = dataclasses.replace(style, order="NAC")
    return Unit(pre_activated, in_channels, out_channels)


def _find_head(eval_output: str | int, heads: Sequence[int]) -> int:
    if eval_output in ("last", "mean"):
        return heads[-1]
    if not is_count(eval_output) or eval_output not in heads:
        raise ConfigError(
            f"eval_output {eval_output!r}; expected 'last', 'mean' or a number of {[*heads]}."
        )
    return int(eval_output)
