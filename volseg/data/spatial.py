"""Patches that are turned and scaled: which part of a volume they show, and its resampling.

Voxel ``q`` of a patch shows the place ``centre + matrix @ (q - middle of the patch)``, in voxels of
the volume.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Matrix = NDArray[np.float64]

_CPU_SLAB_VOXELS, _GPU_SLAB_VOXELS = 2**16, 2**24
"""Resampled at a time: on a CPU what lies in its cache, on a GPU what fills it."""
_ROUNDING = 1e-6
"""In voxels; a matrix of sines and cosines is never exactly that of a right angle."""


def rotation_matrix(angles: Sequence[float]) -> Matrix:
    """Turn by one angle in 2D, about axis 0, then 1, then 2 in 3D; angles in radians."""
    if len(angles) == 1:
        return _turn(2, 0, 1, angles[0])
    about_0, about_1, about_2 = angles
    return _turn(3, 0, 1, about_2) @ _turn(3, 2, 0, about_1) @ _turn(3, 1, 2, about_0)


def _turn(dims: int, first: int, second: int, angle: float) -> Matrix:
    """Of the plane of two axes, `first` towards `second`."""
    matrix = np.eye(dims)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[second, first] = np.sin(angle)
    matrix[first, second] = -matrix[second, first]
    return matrix


def keep_inside(
    matrix: Matrix, centre: NDArray[np.float64], patch: Sequence[int], voxel: Sequence[int]
) -> NDArray[np.float64]:
    """Middle of a changed patch that shows a voxel, as the patch without the change does.

    Patches are turned and scaled about their middle. Near the border of a volume the voxel that a
    patch was cut for is far from it, and may fall out; then the patch turns about that voxel.

    Args:
        matrix: of the change.
        centre: middle of the patch, in voxels of the volume.
        patch: its shape.
        voxel: in the patch without the change.
    """
    offset = np.subtract(voxel, centre)
    half = (np.asarray(patch) - 1) / 2
    is_inside = bool((np.abs(np.linalg.solve(matrix, offset)) <= half).all())
    return centre if is_inside else centre + offset - matrix @ offset


def find_region(
    matrix: Matrix,
    centre: NDArray[np.float64],
    start: Sequence[int],
    patch: Sequence[int],
    shape: Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and shape of the box that holds what a changed patch shows.

    It reaches as far as the volume. Where the patch itself reaches beyond a volume that is smaller,
    so does the box.

    Args:
        matrix: of the change.
        centre: middle of the changed patch.
        start: first voxel of the patch without the change.
        patch: its shape.
        shape: of the volume.
    """
    reach = np.abs(matrix) @ ((np.asarray(patch) - 1) / 2) - _ROUNDING
    low = np.maximum(np.floor(centre - reach), np.minimum(start, 0))
    end = np.minimum(np.ceil(centre + reach) + 1, np.maximum(np.add(start, patch), shape))
    return tuple(low.astype(int).tolist()), tuple((end - low).astype(int).tolist())


def resample(
    image: Tensor, label: Tensor, matrix: Matrix, centre: Sequence[float], patch: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Show a region through a changed patch: image linearly, label by nearest neighbours.

    What lies outside is continued from the border, in both alike: an organ that is cut off there
    stays an organ in the image and in the label.

    Args:
        image: (C, *R) float32.
        label: (*R) integer.
        matrix: of the change.
        centre: place of the patch's middle, in voxels of the region.
        patch: shape to make.

    Returns:
        Image (C, *patch) float32 and label (*patch) of its former type.
    """
    changed = image.new_empty((len(image), *patch))
    labels = label.new_empty(tuple(patch))
    lead, rest = _make_axes(matrix, centre, patch, image.device)
    flat, region = label.reshape(-1), label.shape
    slab_voxels = _CPU_SLAB_VOXELS if image.is_cpu else _GPU_SLAB_VOXELS
    thickness = max(1, slab_voxels // labels[0].numel())
    image = image.contiguous()
    for first in range(0, patch[0], thickness):
        slab = slice(first, first + thickness)
        places = [
            torch.add(steps[slab], plane).clamp_(0, size - 1)
            for steps, plane, size in zip(lead, rest, region, strict=True)
        ]
        index = _find_nearest(places, region)
        labels[slab] = flat.index_select(0, index.view(-1)).view(index.shape)
        _interpolate(image, places, changed[:, slab])
    return changed, labels


def _make_axes(
    matrix: Matrix, centre: Sequence[float], patch: Sequence[int], device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Two summands of each coordinate: by the first axis of the patch, and by the others."""
    steps = []
    for axis, size in enumerate(patch):
        step = torch.arange(size, dtype=torch.float64, device=device) - (size - 1) / 2
        steps.append(step.view(-1, *[1] * (len(patch) - axis - 1)))
    lead: list[Tensor] = []
    rest: list[Tensor] = []
    for row, middle in zip(matrix.tolist(), centre, strict=True):
        plane = row[1] * steps[1] + middle
        for factor, step in zip(row[2:], steps[2:], strict=True):
            plane = plane + factor * step
        lead.append((row[0] * steps[0]).float())
        rest.append(plane.float())
    return lead, rest


def _find_nearest(places: Sequence[Tensor], region: Sequence[int]) -> Tensor:
    """Running numbers of the voxels next to `places`."""
    index = places[0].round().int()
    for place, size in zip(places[1:], region[1:], strict=True):
        index.mul_(size).add_(place.round().int())
    return index


def _interpolate(image: Tensor, places: Sequence[Tensor], result: Tensor) -> None:
    """Fill ``result`` (C, *slab) with the values of ``image`` (C, *R) at `places`, linearly.

    torch samples planes several times as fast as volumes. A volume is therefore taken as one tall
    plane, its slices below each other, which is sampled twice, one slice apart.
    """
    if len(places) == 2:
        result.copy_(_sample(image[None], places[0], places[1]).view(result.shape))
        return
    depth, height, width = image.shape[1:]
    lower = places[0].floor().clamp_(max=max(depth - 2, 0))
    row = torch.add(places[1], lower, alpha=height)
    between = places[0].sub_(lower)
    for channel, target in zip(image, result, strict=True):
        # One slice alone is its own neighbour.
        pair = (1, 2, max(depth - 1, 1) * height, width)
        planes = channel.as_strided(pair, (0, height * width if depth > 1 else 0, width, 1))
        below, above = _sample(planes, row, places[2])[0].view(2, *target.shape)
        torch.lerp(below, above, between, out=target)


def _sample(planes: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Sample ``(1, C, H, W)`` at any number of places, in pixels: (1, C, 1, n)."""
    height, width = planes.shape[2:]
    grid = row.new_empty((1, 1, row.numel(), 2))
    for part, place, size in ((0, column, width), (1, row, height)):
        scaled = torch.mul(place, 2 / max(size - 1, 1)).sub_(1)
        grid[..., part] = scaled.view(1, 1, -1)
    return functional.grid_sample(planes, grid, padding_mode="border", align_corners=True)
