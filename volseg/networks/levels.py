"""Width, stride and kernel of every level of a network, checked once for all architectures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from volseg.errors import ConfigError
from volseg.networks.layers import Size, as_counts, check_spatial_dims, per_axis


@dataclass(frozen=True)
class Levels:
    """One entry per level, the finest first.

    Attributes:
        channels: feature maps.
        strides: from the level above (the first: from the input), per axis.
        kernel_sizes: of the convolutions, odd, per axis.
    """

    channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]

    @property
    def total_strides(self) -> tuple[tuple[int, ...], ...]:
        """Input voxels per voxel of each level and axis."""
        return tuple(itertools.accumulate(self.strides, _multiply))

    def find_smallest(
        self, *, has_norm: bool, last_kernel: Sequence[int] | None = None
    ) -> tuple[int, ...]:
        """Per axis the smallest input of a U-Net whose double convolutions are not padded.

        Args:
            has_norm: leave two voxels at the coarsest level, over which a normalisation makes
                sense; an axis along which nothing happens may have one.
            last_kernel: of a convolution behind the decoder, if there is one.
        """
        needed = last_kernel or (1,) * len(self.strides[0])
        smallest = []
        for axis, least in enumerate(needed):
            is_idle = all(sizes[axis] == 1 for sizes in (*self.strides, *self.kernel_sizes))
            coarsest = 2 if has_norm and not is_idle else 1
            sizes = itertools.count(1)
            smallest.append(
                next(n for n in sizes if self._unpadded_output(n, axis, coarsest) >= least)
            )
        return tuple(smallest)

    def _unpadded_output(self, size: int, axis: int, coarsest: int) -> int:
        """Size behind the decoder; 0 or less where less than `coarsest` is left before it."""
        strides = [stride[axis] for stride in self.strides]
        margins = [2 * (kernel[axis] - 1) for kernel in self.kernel_sizes]
        for stride, margin in zip(strides, margins, strict=True):
            size = size // stride - margin
            if size < 1:
                return size
        if size < coarsest:
            return 0
        for stride, margin in zip(strides[:0:-1], margins[-2::-1], strict=True):
            size = size * stride - margin
            if size < 1:
                return size
        return size


def make_levels(
    spatial_dims: int,
    channels: Sequence[int],
    strides: Sequence[Size] | None = None,
    kernel_sizes: Sequence[Size] | None = None,
    *,
    first_stride_is_one: bool = True,
) -> Levels:
    """Check what a user says about the levels of a network.

    Args:
        spatial_dims: 2 or 3.
        channels: two levels or more.
        strides: by default 1, then 2.
        kernel_sizes: by default 3.
        first_stride_is_one: whether level 0 must have the input's resolution.

    Raises:
        ConfigError: lengths that differ, a first stride other than 1, an even kernel, or a value
            that is no whole number of 1 or more.
    """
    spatial_dims = check_spatial_dims(spatial_dims)
    widths = as_counts(channels)
    if len(widths) < 2:
        raise ConfigError(
            f"channels {channels!r}; expected two levels or more, whole numbers of 1 or more each."
        )
    strides = [1, *[2] * (len(widths) - 1)] if strides is None else strides
    kernel_sizes = [3] * len(widths) if kernel_sizes is None else kernel_sizes
    for name, sizes in (("strides", strides), ("kernel_sizes", kernel_sizes)):
        if not isinstance(sizes, Sequence):
            raise ConfigError(f"{name} {sizes!r}; expected a list of one per level.")
    if not len(widths) == len(strides) == len(kernel_sizes):
        raise ConfigError(
            f"{len(widths)} channels, {len(strides)} strides and {len(kernel_sizes)} "
            "kernel_sizes; expected one of each per level."
        )
    steps = tuple(per_axis(stride, spatial_dims, "stride") for stride in strides)
    if first_stride_is_one and set(steps[0]) != {1}:
        raise ConfigError(
            f"strides[0] {strides[0]}; expected 1: level 0 has the input's resolution."
        )
    kernels = tuple(per_axis(kernel, spatial_dims, "kernel_size") for kernel in kernel_sizes)
    for kernel in kernels:
        if any(size % 2 == 0 for size in kernel):
            raise ConfigError(f"kernel_size {kernel}; expected odd sizes.")
    return Levels(widths, steps, kernels)


def check_smallest(x: torch.Tensor, smallest: list[int]) -> None:
    """Refuse ``(B, C, *S)`` where S is below `smallest` along an axis.

    Raises:
        ConfigError: names the size to use.
    """
    for axis in range(len(smallest)):
        if x.shape[axis + 2] < smallest[axis]:
            raise ConfigError(f"input size {list(x.shape[2:])}; expected at least {smallest}.")


def _multiply(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(x * y for x, y in zip(a, b, strict=True))
