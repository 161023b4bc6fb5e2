"""Change the number of voxels over the same field of view: intensities, labels and logits.

Source and result share their outer voxel edges (4 voxels of 1 mm become 2 of 2 mm), so that going
there and back shifts nothing. Interpolation is linear along each axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

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
