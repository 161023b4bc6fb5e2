"""From an image on its own grid to the network's input: canonical, cropped, resampled, normalised.

`Placement` remembers the way, so that `volseg.inference` can bring logits back to the source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from volseg.data.content import Box, find_content
from volseg.data.resampling import resample_labels, resample_slabs, resampled_shape
from volseg.errors import DataError
from volseg.geometry import Geometry
from volseg.images import Image
from volseg.planning.plan import Normalisation, Plan


@dataclass(frozen=True)
class Placement:
    """Where a prepared array lies in its source.

    Attributes:
        source: grid of the file.
        canonical_shape: the same volume with axes pointing right, anterior, superior.
        box: content in the canonical volume.
        shape: voxels of the prepared array, which covers the box.
    """

    source: Geometry
    canonical_shape: tuple[int, ...]
    box: Box
    shape: tuple[int, ...]

    def find_region(self, mask: NDArray[np.bool_], margin_mm: float) -> Box | None:
        """The smallest block of the prepared array around a mask, None for an empty one.

        Args:
            mask: ``(*source shape)``.
            margin_mm: that is added on all sides, as far as there are voxels.
        """
        canonical, grid = self.source.to_canonical(mask)
        inside = canonical[self.box.slices]
        if not inside.any():
            return None
        found = find_content(inside[None])
        start, shape = [], []
        for axis, (size, total) in enumerate(zip(self.shape, inside.shape, strict=True)):
            margin = margin_mm / grid.spacing_mm[axis]
            scale = size / total
            # One voxel more on both sides, since results lie between the centres of a region's.
            first = math.floor((found.start[axis] - margin) * scale) - 1
            end = math.ceil((found.start[axis] + found.shape[axis] + margin) * scale) + 1
            start.append(max(0, first))
            shape.append(min(size, end) - start[-1])
        return Box(tuple(start), tuple(shape))


@dataclass(frozen=True, eq=False)
class Prepared:
    """The network's view of a case: `image` ``(C, *S)`` float32, `label` ``(*S)`` indices."""

    image: Tensor
    label: Tensor | None
    placement: Placement
    path: Path | None = None
    """The file, or folder of a series, that the image was read from."""
    coarse: Prepared | None = None
    """The same image as another model sees it that says where to look."""


def prepare(
    image: Image, plan: Plan, label: NDArray[Any] | None = None, num_classes: int = 0
) -> Prepared:
    """Bring an image, and its class indices if given, onto the plan's grid.

    Args:
        image: ``(C, *S)`` in file axis order.
        plan: spacing and normalisation.
        label: ``(*S)`` class indices on the same grid.
        num_classes: background counted; needed with `label`.

    Raises:
        DataError: the image has not the plan's number of spatial axes, or lacks a channel.
    """
    if image.geometry.spatial_dims != plan.spatial_dims:
        where = f"{image.path}: " if image.path else ""
        raise DataError(
            f"{where}a {image.geometry.spatial_dims}D image; expected "
            f"{plan.spatial_dims}D, as the network was planned for."
        )
    _check_channels(image, plan)
    array, canonical = image.geometry.to_canonical(image.array)
    box = find_content(array)
    target_mm = plan.target_spacing(canonical.spacing_mm)
    shape = resampled_shape(box.shape, canonical.spacing_mm, target_mm)
    placement = Placement(image.geometry, canonical.shape, box, shape)
    resampled = _resample_as_stored(array[(slice(None), *box.slices)], shape)
    # In place: of a large volume there is no room for all channels twice.
    for channel, normalisation in zip(resampled, plan.normalisation, strict=True):
        channel.copy_(normalise(channel, normalisation))
    # Zero is no intensity of a CT: a channel that is not there is zero for the network.
    resampled[list(image.absent)] = 0
    if label is None:
        return Prepared(resampled, None, placement, image.path)
    label, _ = image.geometry.to_canonical(label)
    # Always a copy: torch takes no array that runs backwards.
    indices = torch.from_numpy(np.array(label[box.slices], order="C"))
    return Prepared(resampled, resample_labels(indices, num_classes, shape), placement, image.path)


def _resample_as_stored(array: NDArray[Any], shape: tuple[int, ...]) -> Tensor:
    """Resample ``(C, *S)`` of any memory layout to contiguous ``(C, *shape)`` float32.

    Files store the first axis fastest. Copying a large volume against the order of its memory takes
    longer than resampling it, so the axes are put in order after that.
    """
    order = sorted(range(len(shape)), key=lambda axis: -abs(array.strides[1 + axis]))
    stored = array.transpose(0, *(1 + axis for axis in order))
    resampled = resample_slabs(stored, [shape[axis] for axis in order])
    return resampled.permute(0, *(1 + order.index(axis) for axis in range(len(shape)))).contiguous()


def _check_channels(image: Image, plan: Plan) -> None:
    for number in image.absent:
        if not plan.normalisation[number].optional:
            name = plan.channel_names[number]
            raise DataError(
                f"{image.path}: there is no image of channel {name} beside it; expected one, since "
                "the network was never without. Add it, or train with "
                f"data.optional_channels=[{name}]."
            )


def normalise(channel: Tensor, normalisation: Normalisation) -> Tensor:
    """Apply the plan's normalisation to one channel ``(*S)``, which stays as it is."""
    if normalisation.scheme == "ct":
        low, high, mean_hu, std_hu = normalisation.fixed_values
        return channel.clamp(low, high).sub_(mean_hu).div_(std_hu)
    mean, std = _measure(channel, normalisation.nonzero_only)
    # A constant image has nothing to scale; dividing by 1 leaves it at zero.
    scaled = (channel - mean).div_(torch.where(std > 0, std, torch.ones_like(std)))
    return scaled.masked_fill_(channel == 0, 0) if normalisation.nonzero_only else scaled


def _measure(channel: Tensor, nonzero_only: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a channel, or of its voxels that are not zero."""
    # numpy copies the voxels alone, where torch makes a list of their places, six times as large.
    voxels = torch.from_numpy(channel.numpy()[channel.numpy() != 0]) if nonzero_only else channel
    if voxels.numel() == 0:
        return torch.zeros(()), torch.ones(())
    return voxels.mean(), voxels.std(correction=0)
