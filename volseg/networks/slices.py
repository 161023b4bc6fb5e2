"""A 2D network on the slices of volumes, each slice on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from volseg.errors import ConfigError
from volseg.networks.network import SegmentationNetwork

_PER_LEVEL = ("strides", "kernel_sizes")
"""Options with one size per level, which may be given per axis."""


class SliceNetwork(SegmentationNetwork):
    """Volumes in, volumes out: a 2D network sees one slice after the other.

    Attributes:
        network: the 2D network.
        slice_axis: spatial axis along which the slices lie; any number of them goes in.
    """

    def __init__(self, network: SegmentationNetwork, slice_axis: int) -> None:
        """Wrap a network.

        Args:
            network: with `spatial_dims` 2.
            slice_axis: 0, 1 or 2.

        Raises:
            ConfigError: a network that is not 2D, or no such axis.
        """
        if network.spatial_dims != 2:
            raise ConfigError(
                f"a network with spatial_dims {network.spatial_dims} on slices; expected 2."
            )
        if slice_axis not in (0, 1, 2):
            raise ConfigError(f"slice_axis {slice_axis!r}; expected 0, 1 or 2.")
        super().__init__(
            3,
            network.in_channels,
            network.out_channels,
            total_stride=_insert_one(network.total_stride, slice_axis),
            norm=network.coarsest_norm,
            supervision_strides=[_insert_one(s, slice_axis) for s in network.supervision_strides],
            divisor=_insert_one(network.divisor, slice_axis),
        )
        self.smallest = _insert_one(network.smallest, slice_axis)
        self.deep_supervision = network.deep_supervision
        self.slice_axis = slice_axis
        self.network = network

    def set_deep_supervision(self, enabled: bool) -> None:
        """As of the 2D network."""
        self.network.set_deep_supervision(enabled)
        self.deep_supervision = self.network.deep_supervision

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Segment ``(B, in_channels, *S)``, slice by slice.

        Returns:
            Logits ``(B, out_channels, *S)``, or a list of them where the 2D network gives several.

        Raises:
            ConfigError: a shape that the network cannot take.
        """
        self.check_input(x)
        # Slices are a part of the batch meanwhile.
        outputs = self.network(x.movedim(self.slice_axis + 2, 1).flatten(0, 1))
        if isinstance(outputs, torch.Tensor):
            return self._stack(outputs, x.shape[0])
        return [self._stack(output, x.shape[0]) for output in outputs]

    def _stack(self, slices: torch.Tensor, batch: int) -> torch.Tensor:
        """Volumes ``(batch, K, *S)`` of ``(batch * slices, K, *S)``."""
        _, classes, width, height = slices.shape
        volumes = slices.reshape(batch, -1, classes, width, height)
        return volumes.movedim(1, self.slice_axis + 2)


def inside_slices(network: SegmentationNetwork) -> SegmentationNetwork:
    """The 2D network of a `SliceNetwork`; any other network is given back."""
    return network.network if isinstance(network, SliceNetwork) else network


def drop_axis(options: Mapping[str, Any], slice_axis: int) -> dict[str, Any]:
    """Options of a network on volumes that never looks along an axis, for the one on its slices.

    Raises:
        ConfigError: a stride or a kernel of other than 1 along the axis.
    """
    return {
        name: [_drop_one(name, size, slice_axis) for size in value] if name in _PER_LEVEL else value
        for name, value in options.items()
    }


def _drop_one(name: str, size: Any, axis: int) -> Any:
    if not isinstance(size, Sequence):
        return size
    if len(size) != 3 or size[axis] != 1:
        raise ConfigError(
            f"{name} {list(size)} of a network on slices; expected three values, with a 1 on the "
            f"slice axis {axis}."
        )
    return [value for index, value in enumerate(size) if index != axis]


def _insert_one(values: Sequence[int], axis: int) -> tuple[int, ...]:
    return (*values[:axis], 1, *values[axis:])
