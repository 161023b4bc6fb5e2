"""Changes of the intensities of one channel, in place, on whatever device it lies.

Blurring and the loss of resolution are linear and treat each axis alone, so that each of them is a
product with one small matrix per axis. Matrix products are the fastest thing that a processor does:
they beat convolutions and interpolations of a single channel by far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]


def add_noise_(image: Tensor, deviation: float, seed: int) -> None:
    """Add Gaussian noise of a standard deviation to all channels of ``(C, *P)``.

    It is drawn on the CPU, so that it is the same on every device.
    """
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    image.add_(noise.to(image.device), alpha=deviation)


def blur_(channel: Tensor, sigma: float) -> None:
    """Blur ``(*P)`` by a Gaussian of `sigma` voxels, cut off at the border and normalised there."""
    _apply_per_axis_(channel, range(channel.dim()), lambda size: blurring_matrix(size, sigma))


def lower_resolution_(channel: Tensor, zoom: float, axes: Sequence[int]) -> None:
    """Take ``(*P)`` to `zoom` times its size by nearest neighbours, and back linearly.

    Args:
        channel: changed.
        zoom: above 0, at most 1.
        axes: along which the resolution is lost.
    """
    _apply_per_axis_(channel, axes, lambda size: coarsening_matrix(size, zoom))


def change_contrast_(channel: Tensor, factor: float) -> None:
    """Multiply the distances from the mean; what leaves the former range is clipped to it."""
    low, high = (float(value) for value in torch.aminmax(channel))
    mean = float(channel.mean())
    channel.mul_(factor).add_(mean * (1 - factor)).clamp_(low, high)


def change_gamma_(channel: Tensor, exponent: float, *, inverted: bool) -> None:
    """Raise ``(*P)``, scaled to [0, 1], to a power; mean and standard deviation stay.

    Args:
        channel: changed; left alone if it is constant.
        exponent: above 0.
        inverted: whether it is the negative image that is raised.
    """
    low, high = (float(value) for value in torch.aminmax(channel))
    if not high > low:
        return
    mean, deviation = _moments(channel)
    sign = -1 if inverted else 1
    channel.sub_(high if inverted else low).mul_(sign / (high - low))
    # Several times as fast as a power; 0 becomes exp(-inf) = 0.
    channel.log_().mul_(exponent).exp_()
    new_mean, new_deviation = _moments(channel)
    scale = sign * deviation / new_deviation
    channel.mul_(scale).add_(mean - scale * new_mean)


def blurring_matrix(size: int, sigma: float) -> Matrix:
    """(size, size); each row is the Gaussian around its voxel, with sum 1."""
    distance = np.subtract.outer(np.arange(size), np.arange(size))
    weights = np.exp(-0.5 * (distance / sigma) ** 2)
    matrix: Matrix = weights / weights.sum(axis=1, keepdims=True)
    return matrix


def coarsening_matrix(size: int, zoom: float) -> Matrix:
    """(size, size) to ``round(size * zoom)`` voxels, nearest, and back to `size`, linear.

    Voxels keep the outer edges of the axis in common, as everywhere in volseg.
    """
    coarse = max(1, round(size * zoom))
    taken = np.floor((np.arange(coarse) + 0.5) * size / coarse).astype(np.intp)
    place = np.clip((np.arange(size) + 0.5) * coarse / size - 0.5, 0, coarse - 1)
    lower = np.floor(place).astype(np.intp)
    upper = np.minimum(lower + 1, coarse - 1)
    matrix, rows = np.zeros((size, size)), np.arange(size)
    matrix[rows, taken[lower]] = 1 - (place - lower)
    matrix[rows, taken[upper]] += place - lower
    return matrix


def _apply_per_axis_(
    channel: Tensor, axes: Sequence[int], make_matrix: Callable[[int], Matrix]
) -> None:
    """Multiply ``(*P)`` along each of `axes` with the matrix of its size."""
    result, shape = channel, channel.shape
    for axis in axes:
        size = shape[axis]
        if size == 1:
            continue
        matrix = torch.from_numpy(make_matrix(size)).to(channel)
        if axis == len(shape) - 1:
            result = result.reshape(-1, size) @ matrix.T
        else:
            result = matrix @ result.reshape(math.prod(shape[:axis]), size, -1)
    channel.copy_(result.view(shape))


def _moments(channel: Tensor) -> tuple[float, float]:
    """Mean and standard deviation."""
    mean = float(channel.mean())
    deviation = float(torch.linalg.vector_norm(channel - mean)) / math.sqrt(channel.numel())
    return mean, deviation
