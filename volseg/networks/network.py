"""What every network of volseg promises, whatever its architecture.

``(B, in_channels, *S)`` goes in, logits ``(B, out_channels, *S)`` come out. The architectures are
in the modules beside this one; activations belong to the loss and to inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from volseg.errors import ConfigError
from volseg.networks.layers import (
    NormSpec,
    check_count,
    check_flag,
    check_spatial_dims,
    split_norm,
)


class SegmentationNetwork(nn.Module):
    """A network with a stated input: derive one final class per architecture and write `forward`.

    In eval mode `forward` returns one tensor ``(B, out_channels, *S)``. In training mode a network
    with several supervised outputs returns a list of logits, main output first, as long as
    `deep_supervision` is on.

    Attributes:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: classes, background counted.
        divisor: per axis; input sizes must be multiples of it.
        smallest: per axis; below it no voxel is left at the coarsest level, where a normalisation
            may need more than one.
        total_stride: per axis, input voxels per voxel of the coarsest level.
        supervision_strides: per output in training mode, input voxels per logit voxel and axis.
        deep_supervision: see `set_deep_supervision`.
        supervised_parts: names of the modules that may be there for supervised outputs alone.
    """

    supervised_parts: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        total_stride: Sequence[int],
        norm: NormSpec,
        supervision_strides: Sequence[Sequence[int]] | None = None,
        divisor: Sequence[int] | None = None,
    ) -> None:
        """Check and keep what callers may ask of a network.

        Args:
            spatial_dims: 2 or 3.
            in_channels: channels of the input.
            out_channels: classes, background counted.
            total_stride: per axis.
            norm: of the coarsest level; decides how few voxels it may have.
            supervision_strides: per output and axis; by default one output at full resolution.
            divisor: per axis; by default the total stride.

        Raises:
            ConfigError: `spatial_dims` is neither 2 nor 3, or a channel count is no whole number
                of 1 or more.
        """
        super().__init__()
        self.spatial_dims = check_spatial_dims(spatial_dims)
        self.in_channels = check_count("in_channels", in_channels)
        self.out_channels = check_count("out_channels", out_channels)
        strides = supervision_strides or ((1,) * self.spatial_dims,)
        self.total_stride = tuple(total_stride)
        self.divisor = tuple(total_stride if divisor is None else divisor)
        self.smallest = self.total_stride
        self.supervision_strides = tuple(tuple(stride) for stride in strides)
        self.deep_supervision = len(self.supervision_strides) > 1
        self.coarsest_norm = split_norm(norm)[0]

    def set_deep_supervision(self, enabled: bool) -> None:
        """Give one tensor in training mode too, as in eval mode, or all supervised outputs again.

        Raises:
            ConfigError: a network that was built with one output shall give several.
        """
        check_flag("set_deep_supervision", enabled)
        if enabled and len(self.supervision_strides) == 1:
            raise ConfigError(
                "set_deep_supervision(True) of a network with one output; expected several. Build "
                "it with deep_supervision=True, if it has that option, and with enough levels."
            )
        self.deep_supervision = enabled

    def check_input(self, x: torch.Tensor) -> None:
        """Refuse an input that the network cannot take, before anything is computed.

        Args:
            x: what `forward` got; ``(B, in_channels, *S)`` is right.

        Raises:
            ConfigError: wrong number of axes or channels, a size that is no multiple of `divisor`,
                or too few voxels at the coarsest level. It names the size to use.
        """
        if x.dim() != self.spatial_dims + 2:
            raise ConfigError(
                f"input shape {list(x.shape)}; expected batch, channels and {self.spatial_dims} "
                "spatial axes."
            )
        if x.shape[1] != self.in_channels:
            raise ConfigError(f"input has {x.shape[1]} channels; expected {self.in_channels}.")
        size = list(x.shape[2:])
        divisor = list(self.divisor)
        padded = [-(-size[axis] // divisor[axis]) * divisor[axis] for axis in range(len(size))]
        if padded != size or min(size) < 1:
            raise ConfigError(
                f"input size {size}; expected positive multiples of {divisor}. Pad to {padded}."
            )
        self._check_coarsest(x.shape[0], size)

    def _check_coarsest(self, batch: int, size: list[int]) -> None:
        strides = list(self.total_stride)
        voxels = 1
        for axis in range(len(size)):
            voxels = voxels * (size[axis] // strides[axis])
        if voxels < 1:
            raise ConfigError(f"input size {size}; expected at least {strides}. Pad to it.")
        # Over a single value a normalisation gives a constant.
        is_constant = voxels == 1 and self.coarsest_norm == "instance"
        if self.training and self.coarsest_norm == "batch" and voxels * batch == 1:
            is_constant = True
        if is_constant:
            raise ConfigError(
                f"input size {size} leaves one voxel at the coarsest level, which "
                f"{self.coarsest_norm} normalisation turns into a constant; expected twice "
                f"{strides} along an axis. Use a larger size or fewer levels."
            )
