"""The plan: every choice that training and prediction share, as a file meant to be edited.

``plan.yaml`` is the only description of how an image becomes the network's input; a run folder
and a bundle both carry it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from volseg.atomic import write_text
from volseg.config import Positive, Record, dump_yaml


class Normalisation(Record):
    """How one channel's intensities become the network's input.

    ``ct``: clip to [`clip_low`, `clip_high`], subtract `mean`, divide by `std`; all in HU.
    ``zscore``: subtract the image's own mean, divide by its own standard deviation, both over
    its nonzero voxels where `nonzero_only`, whose complement then stays zero.
    """

    channel: str
    scheme: Literal["ct", "zscore"]
    nonzero_only: bool = False
    optional: bool = False
    """Whether a case may lack the channel, which is then zero."""
    clip_low: float | None = None
    clip_high: float | None = None
    mean: float | None = None
    std: Positive | None = None

    @model_validator(mode="after")
    def _check(self) -> Normalisation:
        if self.scheme == "ct" and len(self.fixed_values) < 4:
            raise ValueError("scheme 'ct' needs clip_low, clip_high, mean and std")
        if self.scheme == "ct" and self.nonzero_only:
            raise ValueError("nonzero_only belongs to scheme 'zscore'")
        return self

    @property
    def fixed_values(self) -> tuple[float, ...]:
        """`clip_low`, `clip_high`, `mean` and `std` of scheme ``ct``; those that are set."""
        values = (self.clip_low, self.clip_high, self.mean, self.std)
        return tuple(value for value in values if value is not None)


# What the dataset decides, and a file that a model folder cannot take along.
_NOT_OPTIONS = {"spatial_dims", "in_channels", "out_channels", "pretrained"}


class NetworkPlan(Record):
    """Shape of the network: one entry per level, level 0 the finest."""

    name: str
    slice_axis: Literal[0, 1, 2] | None = None
    """Axis whose slices a 2D network sees one by one; None for a network on the whole patch."""
    channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    deep_supervision: bool | None = None
    """None for a network that has a single output in training."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keywords of the network's constructor."""

    @model_validator(mode="after")
    def _check(self) -> NetworkPlan:
        lengths = (len(self.channels), len(self.strides), len(self.kernel_sizes))
        if len(set(lengths)) != 1:
            raise ValueError(
                "channels, strides and kernel_sizes have {}, {} and {} levels; expected the "
                "same number".format(*lengths)
            )
        self._check_slices()
        if taken := set(self.options) & (set(type(self).model_fields) | _NOT_OPTIONS):
            raise ValueError(f"options: {', '.join(sorted(taken))} cannot be set there")
        return self

    def _check_slices(self) -> None:
        axis = self.slice_axis
        for name in ("strides", "kernel_sizes") if axis is not None else ():
            if any(len(level) != 3 or level[axis] != 1 for level in getattr(self, name)):
                raise ValueError(
                    f"{name}: every level needs three entries and a 1 on the slice axis {axis}"
                )

    @property
    def divisor(self) -> tuple[int, ...]:
        """Product of the strides per axis; patches are multiples of it."""
        return tuple(math.prod(axis) for axis in zip(*self.strides, strict=True))

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments for `volseg.networks.build_network` besides the channel counts."""
        levels = self.model_dump(mode="json", exclude={"name", "options"}, exclude_none=True)
        return {**levels, **self.options}


class Plan(Record):
    """Input grid, patch and network of a training, and of every prediction with its result."""

    spatial_dims: Literal[2, 3]
    spacing_mm: tuple[Positive, ...]
    """Voxel size that the network sees; axes point right, anterior, superior. Across slices that
    are seen one by one volumes keep their own, and this is the median."""
    patch: tuple[int, ...]
    """Training crop and prediction window, voxels of `spacing_mm`."""
    batch_size: int
    normalisation: tuple[Normalisation, ...]
    """One per channel, in the order of the channels."""
    network: NetworkPlan

    @model_validator(mode="after")
    def _check(self) -> Plan:
        for name in ("spacing_mm", "patch"):
            if len(getattr(self, name)) != self.spatial_dims:
                raise ValueError(f"{name} has not {self.spatial_dims} entries, one per axis")
        for levels in (self.network.strides, self.network.kernel_sizes):
            if any(len(level) != self.spatial_dims for level in levels):
                raise ValueError(f"network: every level needs {self.spatial_dims} entries")
        check_divisible(self.patch, self.network.divisor)
        axis = self.network.slice_axis
        if axis is not None and (self.spatial_dims != 3 or self.patch[axis] != 1):
            raise ValueError(f"patch {self.patch} has not 1 voxel on the slice axis {axis}")
        return self

    @property
    def network_dims(self) -> int:
        """Number of axes along which the network looks."""
        return self.spatial_dims if self.network.slice_axis is None else 2

    def target_spacing(self, spacing_mm: Sequence[float]) -> tuple[float, ...]:
        """Voxel size that a volume of `spacing_mm` is brought to; its own across slices."""
        return tuple(
            own if axis == self.network.slice_axis else target
            for axis, (own, target) in enumerate(zip(spacing_mm, self.spacing_mm, strict=True))
        )

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Channels in the order the network takes them."""
        return tuple(normalisation.channel for normalisation in self.normalisation)

    @property
    def optional_channels(self) -> tuple[int, ...]:
        """Numbers of the channels that a case may lack."""
        return tuple(number for number, n in enumerate(self.normalisation) if n.optional)

    @property
    def preparation(self) -> dict[str, Any]:
        """The part that decides what a prepared case holds: the cache's key."""
        facts = self.model_dump(
            mode="json",
            include={"spacing_mm", "normalisation"},
            exclude={"normalisation": {"__all__": {"optional"}}},
        )
        axis = self.network.slice_axis
        return facts if axis is None else {**facts, "slice_axis": axis}

    def write_yaml(self, path: Path, reasons: Sequence[str] = (), replaces: bool = True) -> None:
        """Write for people: `reasons` as comments on top, then the values.

        Raises:
            FileExistsError: there is one, and `replaces` is False.
        """
        header = [
            "How images are prepared and which network sees them. Edit before training;",
            "a training in this folder uses this file as it stands.",
            *reasons,
        ]
        comments = "".join(f"# {line}\n" for line in header)
        values = dump_yaml(self.model_dump(mode="json", exclude_none=True))
        write_text(path, f"{comments}\n{values}", replaces)


def check_divisible(patch: Sequence[int], divisor: Sequence[int]) -> None:
    """Refuse a patch that the network's strides do not divide.

    Raises:
        ValueError: names the axis and the nearest sizes that work.
    """
    for axis, (size, step) in enumerate(zip(patch, divisor, strict=True)):
        if size < 1 or size % step:
            low, high = size // step * step, (size // step + 1) * step
            sizes = f"{low} or {high}" if low > 0 else f"{high}"
            raise ValueError(
                f"patch {tuple(patch)} is not divisible by the network's stride {tuple(divisor)} "
                f"on axis {axis}; use {sizes} there, or fewer strides"
            )
