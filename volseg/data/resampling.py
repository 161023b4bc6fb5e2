"""Change the number of voxels over the same field of view: intensities, labels and logits.

Source and result share their outer voxel edges (4 voxels of 1 mm become 2 of 2 mm), so that going
there and back shifts nothing. Interpolation is linear along each axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

SLAB_VOXELS = 2**21
"""Of a channel at a time: little memory, and enough work for every thread."""
_MODES = {2: "bilinear", 3: "trilinear"}


def resampled_shape(
    shape: Sequence[int], spacing_mm: Sequence[float], target_mm: Sequence[float]
) -> tuple[int, ...]:
    """Voxels per axis at `target_mm` for a volume of `shape` voxels of `spacing_mm`."""
    return tuple(
        max(1, round(size * old / new))
        for size, old, new in zip(shape, spacing_mm, target_mm, strict=True)
    )


def resample(array: Tensor, shape: Sequence[int]) -> Tensor:
    """Interpolate ``(C, *S)`` float to ``(C, *shape)``; the same tensor if nothing changes."""
    if tuple(array.shape[1:]) == tuple(shape):
        return array
    mode = _MODES[array.ndim - 1]
    return interpolate(array[None], size=tuple(shape), mode=mode, align_corners=False)[0]


def resample_slabs(array: NDArray[Any], shape: Sequence[int]) -> Tensor:
    """Interpolate ``(C, *S)`` of any type to ``(C, *shape)`` float32, slab by slab.

    Of the whole array there is never a copy in float32, which for a large volume would take longer
    to write than the rest of the work.

    Args:
        array: the first spatial axis is the slowest in memory.
        shape: per spatial axis.
    """
    result = torch.empty((len(array), *shape))
    low, high, share = find_neighbours(array.shape[1], shape[0])
    planes = math.prod(array.shape[2:]), math.prod(shape[1:])
    # A result lies between two rows.
    rows, start = max(2, SLAB_VOXELS // max(planes)), 0
    while start < shape[0]:
        first = int(low[start])
        stop = int(torch.searchsorted(high, first + rows))
        stop = min(stop, start + max(1, SLAB_VOXELS // planes[1]))
        here = slice(start, stop)
        stored = array[:, first : int(high[stop - 1]) + 1]
        _fill_rows(result[:, here], stored, low[here] - first, high[here] - first, share[here])
        start = stop
    return result


def _fill_rows(
    result: Tensor, stored: NDArray[Any], low: Tensor, high: Tensor, share: Tensor
) -> None:
    """Interpolate ``(C, slab, *S)`` to ``(C, rows, *T)`` by the rows' neighbours in the slab."""
    # Always a copy: torch takes no array that runs backwards.
    slab = torch.from_numpy(np.array(stored, dtype=np.float32, order="C"))
    flat = _resample_planes(slab, result.shape[2:])
    if flat.shape == result.shape and torch.equal(low, high):
        result.copy_(flat)
        return
    below, above = flat.index_select(1, low), flat.index_select(1, high)
    torch.lerp(below, above, share.view(-1, *[1] * (flat.ndim - 2)), out=result)


def count_slabs(*shapes: Sequence[int]) -> int:
    """Voxels that `resample_slabs` holds of a channel besides source and result, at most.

    Args:
        shapes: of both; any axis may be the slowest in memory.
    """
    two_rows = max(2 * math.prod(shape) // min(shape) for shape in shapes)
    whole: int = math.prod(max(sizes) for sizes in zip(*shapes, strict=True))
    # A slab, its rows interpolated, and of these the ones below and above the results.
    return 4 * min(whole, max(SLAB_VOXELS, two_rows))


def find_neighbours(sources: int, results: int) -> tuple[Tensor, Tensor, Tensor]:
    """Linear interpolation along an axis whose outer edges stay: each result lies between two.

    Returns:
        The number of the source below each result, of the one above (at most one more), and the
        share (float32) of the one above.
    """
    centres = (torch.arange(results, dtype=torch.float64) + 0.5) * sources / results - 0.5
    centres = centres.clamp(0, sources - 1)
    low, high = centres.floor().long(), centres.ceil().long()
    return low, high, (centres - low).float()


def _resample_planes(slab: Tensor, shape: Sequence[int]) -> Tensor:
    """Interpolate ``(C, rows, *S)`` to ``(C, rows, *shape)``."""
    if tuple(slab.shape[2:]) == tuple(shape):
        return slab
    mode = {1: "linear", 2: "bilinear"}[len(shape)]
    return interpolate(slab, size=tuple(shape), mode=mode, align_corners=False)


def resample_labels(indices: Tensor, num_classes: int, shape: Sequence[int]) -> Tensor:
    """Resample class indices ``(*S)`` uint8/int to ``(*shape)`` by the largest interpolated share.

    Unlike nearest neighbour this keeps thin oblique structures connected and their volume right.
    """
    if tuple(indices.shape) == tuple(shape):
        return indices
    present = torch.unique(indices).tolist()
    return reduce_to_indices(
        (
            (c, resample((indices == c).float()[None], shape)[0])
            for c in range(num_classes)
            if c in present
        ),
        indices.dtype,
    )


def reduce_to_indices(scores: Iterable[tuple[int, Tensor]], dtype: torch.dtype) -> Tensor:
    """Class with the largest score per voxel, from ``(class, scores (*S))`` pairs one at a time.

    A running maximum: on a CPU several times faster than argmax over a channel axis, and it never
    holds more than one class at full size. Ties go to the class that comes first.
    """
    best: Tensor | None = None
    winner: Tensor | None = None
    for index, score in scores:
        if best is None or winner is None:
            best, winner = score, torch.full(score.shape, index, dtype=dtype, device=score.device)
            continue
        is_better = score > best
        winner.masked_fill_(is_better, index)
        best = torch.maximum(best, score)
    if winner is None:
        raise ValueError("no classes to choose from; expected at least one.")
    return winner
