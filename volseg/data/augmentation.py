"""Random changes of training patches: nnU-Net's set, drawn from a seed, applied on any device.

What happens to a patch is drawn first. So the region that a turned patch shows can be cut from its
volume, with what really lies beyond the patch's corners, and a patch that is not turned costs no
more than itself. Applying the changes is another step: loader processes do it for a training on a
CPU, and the GPU does it for a training there.

References:
    F. Isensee et al.: nnU-Net, 2021, doi 10.1038/s41592-020-01008-z (the changes, their order).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from volseg.config import AugmentationConfig
from volseg.data import intensity
from volseg.data.cases import Classes
from volseg.data.dropping import choose_dropped
from volseg.data.mirroring import plan_mirroring
from volseg.data.spatial import Matrix, resample, rotation_matrix
from volseg.errors import DataError, is_dead_worker, is_out_of_memory

COARSE_AXIS = 2.0
"""An axis whose spacing is this many times the finest is not rotated into the others."""

PerChannel = tuple[float | None, ...]
"""One number per channel, None for a channel that is left alone; () if all are."""


@dataclass(frozen=True, eq=False)
class Changes:
    """What happens to one patch.

    Attributes:
        matrix: from voxels of the patch, counted from its middle, to voxels of the volume, counted
            from there; None if the patch is neither turned nor scaled.
        mirrored: spatial axes.
        seed: of what is drawn later: the noise, and the channels that are dropped.
        noise: standard deviation; 0 for none.
        blur: standard deviations of the Gaussian in voxels.
        brightness: factors.
        contrast: factors.
        low_resolution: shares of the voxels per axis that are kept.
        gamma_inverted: exponents for the negative image.
        gamma: exponents.
    """

    matrix: Matrix | None
    mirrored: tuple[int, ...]
    seed: int
    noise: float
    blur: PerChannel
    brightness: PerChannel
    contrast: PerChannel
    low_resolution: PerChannel
    gamma_inverted: PerChannel
    gamma: PerChannel


class Cut(NamedTuple):
    """A region of a prepared case, and what becomes of it.

    Attributes:
        image: (C, *R).
        label: (*R) label indices.
        centre: place of the patch's middle, in voxels of the region.
        patch: shape *P of the patch. R is P where the patch is not turned or scaled.
        changes: from the region to the patch.
        case_id: of the case.
        absent: numbers of the channels that the case lacks.
    """

    image: Tensor
    label: Tensor
    centre: Sequence[float]
    patch: Sequence[int]
    changes: Changes
    case_id: str = ""
    absent: Sequence[int] = ()


class Augmentation:
    """Draws changes of patches, and makes batches of changed patches.

    Args:
        config: how often and how strong.
        spacing_mm: of the prepared cases.
        classes: of the dataset; they say what mirroring means.
        optional_channels: numbers of the channels that a case may lack, and that are dropped.
        slice_axis: across which nothing is resampled, as the network sees slices one by one.
        masked_channels: numbers of the channels whose zeros are no intensities, and stay zero.

    Raises:
        ConfigError: not one chance of mirroring for each axis.
    """

    def __init__(
        self,
        config: AugmentationConfig,
        spacing_mm: Sequence[float],
        classes: Classes,
        optional_channels: Sequence[int] = (),
        slice_axis: int | None = None,
        masked_channels: Sequence[int] = (),
    ) -> None:
        self.config, self.spatial_dims = config, len(spacing_mm)
        self.optional_channels, self.slice_axis = tuple(optional_channels), slice_axis
        coarse_axes = enumerate(find_coarse(spacing_mm))
        is_coarse = [coarse or axis == slice_axis for axis, coarse in coarse_axes]
        self.angles = rotation_range(config.rotate_degrees, is_coarse)
        self.fine_axes = tuple(axis for axis, coarse in enumerate(is_coarse) if not coarse)
        self.mirroring = plan_mirroring(classes, self.spatial_dims)
        self.flip = config.flips(self.spatial_dims)
        self.masked_channels = tuple(masked_channels)

    def draw(self, rng: np.random.Generator, num_channels: int) -> Changes:
        """Changes for a patch."""
        config = self.config
        per_channel = partial(_draw_per_channel, rng, num_channels)
        evenly, around_one = partial(_draw_evenly, rng), partial(_draw_around_one, rng)
        return Changes(
            matrix=self._draw_matrix(rng),
            noise=evenly(config.noise_deviation) if rng.random() < config.noise else 0.0,
            seed=int(rng.integers(2**32)),
            blur=per_channel(config.blur, evenly, config.blur_sigma, config.blur_channels),
            brightness=per_channel(config.brightness, around_one, config.brightness_range),
            contrast=per_channel(config.contrast, around_one, config.contrast_range),
            low_resolution=per_channel(
                config.low_resolution,
                evenly,
                config.low_resolution_range,
                config.low_resolution_channels,
            ),
            gamma_inverted=per_channel(config.gamma_inverted, around_one, config.gamma_range),
            gamma=per_channel(config.gamma, around_one, config.gamma_range),
            mirrored=self.mirroring.draw(self.flip, rng),
        )

    def _draw_matrix(self, rng: np.random.Generator) -> Matrix | None:
        config, dims = self.config, self.spatial_dims
        is_turned, is_scaled = rng.random() < config.rotate, rng.random() < config.scale
        if not (is_turned or is_scaled):
            return None
        matrix = np.eye(dims)
        if is_turned:
            matrix = rotation_matrix([angle * rng.uniform(-1, 1) for angle in self.angles])
        if is_scaled:
            num_factors = dims if config.scale_per_axis else 1
            factors = [_draw_evenly(rng, config.scale_range) for _ in range(num_factors)]
            factors *= dims // num_factors
            if self.slice_axis is not None:
                factors[self.slice_axis] = 1.0
            matrix = matrix * factors
        return matrix

    def __call__(
        self, cuts: Sequence[Cut], device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """Change patches one by one, and stack them.

        Args:
            cuts: of a batch; on the CPU.
            device: where to change them; the CPU by default.

        Returns:
            Images (B, C, *P) float32 and labels (B, *P) int64. A patch is the same, bit for bit, in
            whatever batch on the same device.

        Raises:
            DataError: a patch cannot be changed; names its case.
        """
        patch, num_channels = tuple(cuts[0].patch), len(cuts[0].image)
        images = torch.empty((len(cuts), num_channels, *patch), device=device)
        labels = torch.empty((len(cuts), *patch), dtype=torch.int64, device=device)
        for cut, image, label in zip(cuts, images, labels, strict=True):
            try:
                self._change(cut, image, label)
            except Exception as error:  # Whatever it is, the case must be known.
                if is_out_of_memory(error) or is_dead_worker(error):
                    raise
                raise DataError(
                    f"case {cut.case_id}: its patch could not be changed "
                    f"({type(error).__name__}: {error}). --debug shows where."
                ) from error
        return images, labels

    def _change(self, cut: Cut, image: Tensor, label: Tensor) -> None:
        """Fill `image` (C, *P) and `label` (*P) with the changed patch."""
        changes = cut.changes
        source = cut.image.to(image.device, non_blocking=True)
        indices = cut.label.to(image.device, non_blocking=True)
        if changes.matrix is not None:
            matrix, centre, patch = changes.matrix, cut.centre, cut.patch
            source, indices = resample(source.float(), indices, matrix, centre, patch)
        source, indices = self.mirroring.apply(source, indices, changes.mirrored)
        image.copy_(source)
        label.copy_(indices)
        masked = [image[channel] for channel in self.masked_channels]
        outside = [part == 0 for part in masked]
        self._change_intensities(image, changes)
        for part, mask in zip(masked, outside, strict=True):
            part.masked_fill_(mask, 0)
        if self.optional_channels:
            for channel in self._find_empty(cut):
                image[channel] = 0

    def _find_empty(self, cut: Cut) -> list[int]:
        """Channels that the case lacks, to which noise was added, and those to be dropped."""
        present = set(range(len(cut.image))) - set(cut.absent)
        probability, seed = self.config.drop_channel, cut.changes.seed
        return [*cut.absent, *choose_dropped(present, self.optional_channels, probability, seed)]

    def _change_intensities(self, image: Tensor, changes: Changes) -> None:
        """Of ``(C, *P)``, in place."""
        if changes.noise:
            intensity.add_noise_(image, changes.noise, changes.seed)
        _apply(image, changes.blur, intensity.blur_)
        _apply(image, changes.brightness, Tensor.mul_)
        _apply(image, changes.contrast, intensity.change_contrast_)
        _apply(
            image,
            changes.low_resolution,
            partial(intensity.lower_resolution_, axes=self.fine_axes),
        )
        _apply(image, changes.gamma_inverted, partial(intensity.change_gamma_, inverted=True))
        _apply(image, changes.gamma, partial(intensity.change_gamma_, inverted=False))


def _apply(image: Tensor, numbers: PerChannel, change: Callable[[Tensor, float], object]) -> None:
    for channel, number in enumerate(numbers):
        if number is not None:
            change(image[channel], number)


def _draw_per_channel(
    rng: np.random.Generator,
    num_channels: int,
    probability: float,
    draw: Callable[[tuple[float, float]], float],
    limits: tuple[float, float],
    channels: float = 1.0,
) -> PerChannel:
    """By `probability` a number for each channel, or for some where `channels` is below 1."""
    if rng.random() >= probability:
        return ()
    return tuple(draw(limits) if rng.random() < channels else None for _ in range(num_channels))


def _draw_evenly(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    return float(rng.uniform(*limits))


def _draw_around_one(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    """As often below 1 as above, where the limits have both."""
    low, high = limits
    if low < 1 < high:
        low, high = (low, 1.0) if rng.random() < 0.5 else (1.0, high)
    return float(rng.uniform(low, high))


def find_coarse(spacing_mm: Sequence[float]) -> list[bool]:
    """Per axis whether its spacing is `COARSE_AXIS` times the finest one or more."""
    return [value >= COARSE_AXIS * min(spacing_mm) for value in spacing_mm]


def rotation_range(degrees: float, is_coarse: Sequence[bool]) -> list[float]:
    """Largest rotation in radians about each array axis (about the normal alone, in 2D).

    Rotation happens on the voxel grid. Turning a coarse axis into a fine one would shear the
    anatomy, so on anisotropic grids only the rotation about the coarse axis is left.
    """
    radians = math.radians(degrees)
    if len(is_coarse) == 2:
        return [radians]
    if not any(is_coarse):
        return [radians] * 3
    return [radians if coarse and sum(is_coarse) == 1 else 0.0 for coarse in is_coarse]
