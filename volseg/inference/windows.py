"""Overlapping windows over a prepared image: scores from patches that the network can take.

The windows are taken row of windows by row of windows along one axis of the image. What no later
window reaches is finished and leaves at once, so that of the scores no more than one window's
extent along that axis is ever held, however long the volume is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from volseg.data.content import Box

CPU = torch.device("cpu")
STEP = 0.5
"""From window to window, as a share of the window."""
SIGMA_SCALE = 0.125
"""Width of the Gaussian weight as a share of the window, as in nnU-Net and MONAI."""
SMALLEST_WEIGHT = 1e-3
"""In the corners of a window, as in MONAI."""
SLICE_PIXELS = 512**2
"""Of the slices that go through a network together, where each is a window."""


@torch.inference_mode()
def stream_scores(
    score: Callable[[Tensor], Tensor],
    image: Tensor,
    window: Sequence[int],
    *,
    step: float = STEP,
    at_once: int = 1,
    axis: int = 0,
    region: Box | None = None,
    device: torch.device = CPU,
) -> Iterator[Tensor]:
    """Blend the scores of overlapping windows, and give them away part by part.

    Places and weights of the windows are those of MONAI's `SlidingWindowInferer` with Gaussian
    weights, so that a bundle gives the same scores.

    Args:
        score: windows (B, C, *window) to scores (B, K, *window) float32, on any device.
        image: normalised, ``(C, *S)``; an axis shorter than the window is zero-padded.
        window: voxels per axis.
        step: from window to window, as a share of the window.
        at_once: windows per call of `score`.
        axis: of the image along which the parts follow each other; see `choose_axis`.
        region: what is wanted of the image; windows beside it are left out. By default all of it.
        device: where the scores are blended.

    Yields:
        Scores (K, *part), one part after the other; together they are those of the region. A part
        is valid until the next one is asked for.
    """
    padded, margins = _pad_to_window(image, window)
    region = region or Box((0,) * len(window), tuple(image.shape[1:]))
    lines = _place_windows(region, padded.shape[1:], window, step, margins)
    weight = make_weights(window, device)
    rows, extents = lines[axis].starts, [line.end - line.first for line in lines]
    # Single slices are too little work to go one by one, so several rows of them go together.
    per_row = math.prod(len(line.starts) for a, line in enumerate(lines) if a != axis)
    together = max(1, at_once // per_row) if window[axis] == 1 else 1
    extents[axis] = window[axis] + together - 1
    blend = _Blend(extents, axis, weight)
    for place in range(0, len(rows), together):
        current, following = rows[place : place + together], rows[place + together :]
        starts = [current if a == axis else line.starts for a, line in enumerate(lines)]
        origin = [current[0] if a == axis else line.first for a, line in enumerate(lines)]
        corners = list(itertools.product(*starts))
        for group in (corners[a : a + at_once] for a in range(0, len(corners), at_once)):
            windows = torch.stack([_cut(padded, corner, window) for corner in group])
            places = [[a - b for a, b in zip(corner, origin, strict=True)] for corner in group]
            # By no name here, so that nothing holds them while the next windows are computed.
            blend.add_all(score(windows), places)
        stop = following[0] if following else current[-1] + window[axis]
        finished = blend.finish(stop - current[0])
        wanted = lines[axis].wanted(current[0], stop)
        if wanted.start < wanted.stop:
            yield finished.narrow(axis + 1, wanted.start, wanted.stop - wanted.start)
        blend.advance(stop - current[0])


def make_weights(window: Sequence[int], device: torch.device) -> Tensor:
    """A Gaussian over the window, at least `SMALLEST_WEIGHT`.

    That of MONAI, whose import would take each prediction two seconds and 226 MB.
    """
    weight = torch.ones((), device=device)
    for size in window:
        places = torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2
        weight = weight[..., None] * torch.exp(-((places / (SIGMA_SCALE * size)) ** 2) / 2)
    return weight.clamp(min=SMALLEST_WEIGHT)


def _place_windows(
    region: Box,
    sizes: Sequence[int],
    window: Sequence[int],
    step: float,
    margins: Sequence[int],
) -> list[_Starts]:
    """Of an image of `sizes`, whose padding has `margins` in front."""
    facts = zip(sizes, window, margins, region.start, region.shape, strict=True)
    return [
        _Starts.over(list_starts(size, edge, step), edge, margin + first, length)
        for size, edge, margin, first, length in facts
    ]


@dataclass(frozen=True)
class _Starts:
    """Windows along one axis of a padded image that reach into what is wanted of it.

    Attributes:
        starts: their first voxels.
        first: the first voxel that is wanted.
        end: the one behind the last.
    """

    starts: tuple[int, ...]
    first: int
    end: int

    @classmethod
    def over(cls, every: Sequence[int], window: int, first: int, length: int) -> _Starts:
        """Those of all windows that reach into `length` voxels."""
        end = first + length
        return cls(tuple(a for a in every if a < end and a + window > first), first, end)

    def wanted(self, start: int, stop: int) -> slice:
        """What is wanted of the voxels from `start` to `stop`, counted from `start`."""
        return slice(max(0, self.first - start), max(0, min(stop, self.end) - start))


def list_starts(size: int, window: int, step: float = STEP) -> list[int]:
    """First voxels of the windows that cover `size` voxels; the last one ends with them.

    >>> list_starts(20, 8)
    [0, 4, 8, 12]
    >>> list_starts(21, 8)
    [0, 4, 8, 12, 13]
    """
    # Rounded as MONAI does, whose overlap is 1 - step.
    voxels = max(1, int(window * (1 - (1 - step))))
    number = math.ceil((size - window) / voxels) + 1
    return [min(place * voxels, size - window) for place in range(number)]


def choose_axis(shape: Sequence[int], window: Sequence[int]) -> int:
    """The axis along which the fewest scores are held at a time: that of the most windows.

    Of equal ones the last: files store the first axis fastest, and parts along it are scattered.
    """
    return max(range(len(shape)), key=lambda axis: (shape[axis] / window[axis], axis))


def count_at_once(window: Sequence[int], device: torch.device) -> int:
    """Windows per call of the network: single slices are too little work to go one by one."""
    usual = 4 if device.type == "cuda" else 1
    return max(usual, SLICE_PIXELS // math.prod(window)) if 1 in window else usual


class _Blend:
    """Weighted sums of scores in the rows in flight, as far as they are wanted."""

    def __init__(self, shape: Sequence[int], axis: int, weight: Tensor) -> None:
        self.shape, self.axis, self.weight = tuple(shape), axis, weight
        self.sums: Tensor | None = None

    def add_all(self, scores: Tensor, corners: Sequence[Sequence[int]]) -> None:
        """Add the scores (B, K, *window) of windows, each with its corner."""
        for own, corner in zip(scores, corners, strict=True):
            self.add(own, corner)

    def add(self, scores: Tensor, corner: Sequence[int]) -> None:
        """Add the scores of a window, whose `corner` is counted from the first voxel of the sums.

        It may reach beyond them: windows at the border of a strip do.
        """
        edges = list(zip(corner, self.weight.shape, self.shape, strict=True))
        inside = tuple(slice(max(0, -a), min(n, size - a)) for a, n, size in edges)
        place = tuple(slice(max(0, a), min(a + n, size)) for a, n, size in edges)
        scores, weight = scores[(slice(None), *inside)].to(self.weight.device), self.weight[inside]
        if self.sums is None:
            # The last one is the sum of the weights.
            self.sums = scores.new_zeros((len(scores) + 1, *self.shape))
        target = self.sums[(slice(None), *place)]
        target[:-1].addcmul_(scores, weight)
        target[-1].add_(weight)

    def finish(self, rows: int) -> Tensor:
        """Mean scores of the first rows, in place; `advance` by them before more are added."""
        if self.sums is None:
            raise ValueError("no window was added; expected some in each row of windows.")
        done = self.sums.narrow(self.axis + 1, 0, rows)
        return done[:-1].div_(done[-1])

    def advance(self, rows: int) -> None:
        """Move what follows the first rows to the front."""
        if self.sums is None:
            return
        dim, left = self.axis + 1, self.shape[self.axis] - rows
        for start in range(0, left, rows):
            # Piece by piece, since source and target may overlap.
            size = min(rows, left - start)
            source = self.sums.narrow(dim, start + rows, size)
            self.sums.narrow(dim, start, size).copy_(source)
        self.sums.narrow(dim, left, rows).zero_()


def _cut(array: Tensor, corner: Sequence[int], window: Sequence[int]) -> Tensor:
    places = (slice(a, a + n) for a, n in zip(corner, window, strict=True))
    return array[(slice(None), *places)]


def _pad_to_window(image: Tensor, window: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Zeros on both sides of axes that are too short, and how many of them are in front."""
    missing = [max(0, n - size) for n, size in zip(window, image.shape[1:], strict=True)]
    if not any(missing):
        return image, [0] * len(missing)
    margins = [number // 2 for number in missing]
    sides = [(front, total - front) for front, total in zip(margins, missing, strict=True)]
    return pad(image, [n for side in reversed(sides) for n in side]), margins
