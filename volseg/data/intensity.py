"""Changes of the intensities of one channel, in place, on whatever device it lies.

What is measured of a channel stays on its device: to read it would mean to wait for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

TRUNCATE = 3.5
"""A Gaussian ends after so many standard deviations; beyond lie 5 of 10,000 parts."""
_LINEAR = {2: "bilinear", 3: "trilinear"}


def add_noise_(image: Tensor, deviation: float, seed: int) -> None:
    """Add Gaussian noise of a standard deviation to all channels of ``(C, *P)``.

    It is drawn on the CPU, so that it is the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(image.shape, generator=generator, pin_memory=image.is_cuda)
    image.add_(noise.to(image.device, non_blocking=True), alpha=deviation)


def blur_(channel: Tensor, sigma: float) -> None:
    """Blur ``(*P)`` by a Gaussian of `sigma` voxels, cut off at the border and normalised there.

    Axis by axis, as a sum of shifted images: on a CPU several times as fast as torch's convolution,
    which is made for many channels.
    """
    source, result = channel.clone(), channel
    for axis, size in enumerate(channel.shape):
        radius = min(max(1, round(TRUNCATE * sigma)), size - 1)
        weights = [math.exp(-0.5 * (step / sigma) ** 2) for step in range(radius + 1)]
        torch.mul(source, weights[0], out=result)
        total = torch.full((size,), weights[0], device=channel.device)
        for step, weight in enumerate(weights[1:], start=1):
            for to, origin in ((0, step), (step, 0)):
                left = size - step
                part = source.narrow(axis, origin, left)
                result.narrow(axis, to, left).add_(part, alpha=weight)
                total[to : to + left] += weight
        result.mul_(total.reciprocal().view(-1, *[1] * (channel.dim() - axis - 1)))
        source, result = result, source
    if source is not channel:
        channel.copy_(source)


def lower_resolution_(channel: Tensor, zoom: float, axes: Sequence[int]) -> None:
    """Take ``(*P)`` to `zoom` times its size by nearest neighbours, and back linearly.

    Args:
        channel: changed.
        zoom: above 0, at most 1.
        axes: along which the resolution is lost.
    """
    size = list(channel.shape)
    for axis in axes:
        size[axis] = max(1, round(size[axis] * zoom))
    coarse = functional.interpolate(channel[None, None], size, mode="nearest-exact")
    mode = _LINEAR[channel.dim()]
    channel.copy_(functional.interpolate(coarse, channel.shape, mode=mode)[0, 0])


def change_contrast_(channel: Tensor, factor: float) -> None:
    """Multiply the distances from the mean; what leaves the former range is clipped to it."""
    low, high = torch.aminmax(channel)
    mean = channel.mean().double()
    channel.mul_(factor).add_(mean * (1 - factor)).clamp_min_(low).clamp_max_(high)


def change_gamma_(channel: Tensor, exponent: float, *, inverted: bool) -> None:
    """Raise ``(*P)``, scaled to [0, 1], to a power; mean and standard deviation stay.

    Args:
        channel: changed; left alone if it is constant.
        exponent: above 0.
        inverted: whether it is the negative image that is raised.
    """
    low, high = (value.double() for value in torch.aminmax(channel))
    is_constant = low == high
    mean, deviation = _moments(channel)
    sign = -1 if inverted else 1
    spread = (high - low).masked_fill(is_constant, 1.0)
    channel.sub_(high if inverted else low).mul_(sign / spread)
    # Several times as fast as a power; 0 becomes 2 ** -inf = 0.
    channel.log2_().mul_(exponent).exp2_()
    new_mean, new_deviation = _moments(channel)
    scale = (sign * deviation / new_deviation).masked_fill(is_constant, 0.0)
    channel.mul_(scale).add_(torch.where(is_constant, low, mean - scale * new_mean))


def _moments(channel: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float64."""
    mean = channel.mean()
    deviation = torch.linalg.vector_norm(channel - mean).double() / math.sqrt(channel.numel())
    return mean.double(), deviation
