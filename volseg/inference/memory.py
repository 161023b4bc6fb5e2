"""How much memory a prediction takes, and how it is made to take less.

What grows with the number of classes is the sum of scores in flight: classes x one window's extent
x the cross-section of the volume. Where that is too much, the volume is predicted in strips of a
smaller one. Windows at their borders are computed for both sides; the result is the same.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from volseg.control_groups import find_groups
from volseg.data.content import Box
from volseg.data.resampling import count_slabs, resampled_shape
from volseg.errors import MachineError
from volseg.geometry import Geometry
from volseg.inference.windows import STEP, choose_axis
from volseg.planning.plan import Plan

_FLOAT = 4
_LIMIT_USAGE_CACHED = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Files of cgroups of version 2, and of version 1; the last is a row of their memory.stat."""


@dataclass(frozen=True)
class Strips:
    """Regions of the network's grid that are predicted one after the other.

    Attributes:
        regions: they cover the image, and neighbours share a voxel, between whose centres the
            results of both lie.
        axis: along which the scores of each follow each other.
        blend_bytes: what the scores in flight take at most.
    """

    regions: tuple[Box, ...]
    axis: int
    blend_bytes: int


def plan_strips(
    region: Box,
    shape: Sequence[int],
    window: Sequence[int],
    num_scores: int,
    most_bytes: float = math.inf,
    *,
    step: float = STEP,
) -> Strips:
    """Strips that fit into memory, cut so that few windows are computed twice.

    Args:
        region: what is wanted of the prepared image.
        shape: of that image.
        window: voxels per axis.
        num_scores: per voxel.
        most_bytes: what the scores in flight may take.
        step: from window to window, as a share of the window.

    Raises:
        MachineError: the thinnest strips take more.
    """
    axis = choose_axis(region.shape, window)
    blend_bytes = 0
    for regions in _cut(region, window, step, axis):
        in_flight = max(_count_in_flight(part, window, axis) for part in regions)
        blend_bytes = _FLOAT * (num_scores + 1) * in_flight
        if blend_bytes <= most_bytes:
            return Strips(regions, axis, blend_bytes)
    raise MachineError(
        f"an image of {' x '.join(map(str, shape))} voxels at the network's spacing takes "
        f"{blend_bytes / 1e9:.2g} GB for {num_scores} scores each, and "
        f"{max(0.0, most_bytes) / 1e9:.2g} GB are left beside the image, its maps and the network. "
        "Allow more with --memory, leave --probabilities out, or use a larger machine."
    )


def free_bytes(device: torch.device, root: Path = Path("/")) -> float:
    """Memory of a device that nobody uses; without end where the system does not tell.

    Args:
        device: of the main memory, what the process's cgroups leave counts too.
        root: of the file system that has ``proc`` and ``sys``.
    """
    if device.type == "cuda":
        # What torch keeps for its next tensors is free, too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    found = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return min([1024 * float(next(found, math.inf)), *_find_left(root)])


def _find_left(root: Path) -> Iterator[float]:
    """Bytes that the process's cgroups, and those around them, have left."""
    for group in find_groups("memory", root):
        for limit, usage, cached in _LIMIT_USAGE_CACHED:
            # A file may be missing, and "max" is no number.
            with contextlib.suppress(OSError, ValueError):
                most, used = (float((group / name).read_text()) for name in (limit, usage))
                rows = (group / "memory.stat").read_text().splitlines()
                # Files that the system keeps at hand give way.
                spare = (float(row.split()[1]) for row in rows if row.split()[0] == cached)
                yield most - used + next(spare, 0.0)


def count_reading(grid: Geometry, num_channels: int, plans: Sequence[Plan]) -> float:
    """Bytes that reading an image and preparing it for each plan takes at most.

    Args:
        grid: of the file.
        num_channels: of the file.
        plans: one after the other; their results are kept.
    """
    source, kept = num_channels * math.prod(grid.shape), 0
    _, canonical = grid.to_canonical(np.broadcast_to(np.uint8(0), grid.shape))
    # Voxels of 64 bits, once more where ITK hands them over.
    most = 4.0 * source
    for plan in plans if plans[0].spatial_dims == grid.spatial_dims else ():
        target_mm = plan.target_spacing(canonical.spacing_mm)
        shape = resampled_shape(canonical.shape, canonical.spacing_mm, target_mm)
        result = num_channels * math.prod(shape)
        slabs = num_channels * count_slabs(canonical.shape, shape)
        # The image, in 64 bits at most; and what is made of it slab by slab, then the result once
        # more when its axes are put in order and when it is normalised, a mask beside it.
        most = max(most, kept + 2 * source + max(result + slabs, 2.25 * result))
        kept += result
    return _FLOAT * most


def resident_bytes() -> float:
    """Main memory that this process has; zero where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return _peak_bytes()
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def _peak_bytes() -> float:
    """The most that this process had; on a Mac the system tells in bytes."""
    try:
        import resource
    except ImportError:
        return 0.0
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def stays_on(device: torch.device, needed_bytes: float) -> bool:
    """Whether scores are blended where they are computed: on an NVIDIA GPU with room for them."""
    return device.type == "cuda" and needed_bytes < free_bytes(device)


def _cut(region: Box, window: Sequence[int], step: float, axis: int) -> Iterator[tuple[Box, ...]]:
    """The region, then more and more strips of it across `axis`, down to a step's width.

    Those come first that compute the fewest windows, about: a cut has as many of them computed
    twice as cover a voxel, whatever the length of the axis.
    """
    others = [other for other in range(len(window)) if other != axis]
    most = [max(1, int(region.shape[o] / max(1, step * window[o]))) for o in others]

    def count_windows(numbers: tuple[int, ...]) -> float:
        parts = zip(others, numbers, strict=True)
        return math.prod(region.shape[o] / window[o] + number - 1 for o, number in parts)

    cuts = itertools.product(*(range(1, number + 1) for number in most))
    for numbers in sorted(cuts, key=count_windows):
        strips = [region]
        for other, number in zip(others, numbers, strict=True):
            strips = [part for strip in strips for part in _divide(strip, other, number)]
        yield tuple(strips)


def _divide(box: Box, axis: int, number: int) -> Iterator[Box]:
    """Parts of a box along an axis, of which neighbours share a voxel."""
    length = box.shape[axis]
    edges = [place * length // number for place in range(number + 1)]
    for start, stop in itertools.pairwise(edges):
        yield _narrow(box, axis, start, min(stop + 1, length))


def _narrow(box: Box, axis: int, start: int, stop: int) -> Box:
    """The part of a box from `start` to `stop`, counted from its own start."""
    starts, shape = list(box.start), list(box.shape)
    starts[axis], shape[axis] = box.start[axis] + start, stop - start
    return Box(tuple(starts), tuple(shape))


def _count_in_flight(region: Box, window: Sequence[int], axis: int) -> int:
    """Voxels whose scores are summed at a time."""
    return math.prod(window[axis] if a == axis else n for a, n in enumerate(region.shape))
