"""What every network of volseg promises, whatever its architecture.

``(B, in_channels, *S)`` goes in, logits ``(B, out_channels, *S)`` come out. The architectures are
in the modules beside this one; activations belong to the loss and to inference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from volseg.errors import ConfigError


class SegmentationNetwork(nn.Module):
    """A network with a stated input: derive one final class per architecture and write `forward`.

    In eval mode `forward` returns one tensor ``(B, out_channels, *S)``. In training mode a network
    with supervised levels returns a list of logits, finest first, each at its own resolution.

    Attributes:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: classes, background counted.
        divisor: per axis; input sizes must be multiples of it.
        supervision_strides: per output in training mode, input voxels per logit voxel and axis.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        divisor: Sequence[int],
        supervision_strides: Sequence[Sequence[int]],
        needs_two_voxels: bool,
    ) -> None:
        """Check and keep what callers may ask of a network.

        Args:
            spatial_dims: 2 or 3.
            in_channels: channels of the input.
            out_channels: classes, background counted.
            divisor: per axis.
            supervision_strides: per output and axis.
            needs_two_voxels: whether the coarsest level is refused when it has a single voxel.

        Raises:
            ConfigError: `spatial_dims` is neither 2 nor 3, or a channel count is below one.
        """
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ConfigError(f"spatial_dims {spatial_dims}; expected 2 or 3.")
        for name, count in (("in_channels", in_channels), ("out_channels", out_channels)):
            if count < 1:
                raise ConfigError(f"{name} {count}; expected at least 1.")
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.divisor = tuple(divisor)
        self.supervision_strides = tuple(tuple(strides) for strides in supervision_strides)
        self.needs_two_voxels = needs_two_voxels

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
        coarsest = [size[axis] // divisor[axis] for axis in range(len(size))]
        if max(coarsest) == 1 and self.needs_two_voxels:
            raise ConfigError(
                f"input size {size} leaves one voxel at the coarsest level, which instance "
                f"normalisation turns into a constant; expected twice {divisor} along an axis. "
                "Use a larger size or fewer levels."
            )
