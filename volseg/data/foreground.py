"""Where patches are centred, so that nothing small or rare is lost.

Three draws favour neither what is frequent nor what is large: of the class, of the case that has
it, and of the voxel, which counts connected parts as much as voxels. A lesion of ten voxels beside
one of ten thousand is centred in a quarter of the patches of that class and case, not in a
thousandth of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

FOREGROUND_VOXELS = 10_000
"""Positions kept per class and case; patches are centred on them."""

Positions = NDArray[np.int32]
"""(n, spatial_dims) voxels."""


def draw_voxels(rng: np.random.Generator, mask: NDArray[np.bool_]) -> Positions:
    """Up to `FOREGROUND_VOXELS` positions inside a mask, evenly drawn."""
    found = np.flatnonzero(mask)
    if found.size > FOREGROUND_VOXELS:
        found = rng.choice(found, FOREGROUND_VOXELS, replace=False)
    return _unravel(found, mask.shape)


def draw_parts(rng: np.random.Generator, mask: NDArray[np.bool_]) -> Positions:
    """As many positions, half of them evenly over the voxels and half over the connected parts.

    Every part is there, and a voxel of a small one may be several times.
    """
    box = ndimage.find_objects(mask.astype(np.uint8))
    if not box:
        return draw_voxels(rng, mask)
    # Neighbours by edges and corners too: one voxel's gap makes no second lesion of a thin one.
    around = np.ones((3,) * mask.ndim)
    parts, number = ndimage.label(mask[box[0]], structure=around)
    if number == 1:
        return draw_voxels(rng, mask)
    found = rng.permutation(np.flatnonzero(parts))
    part_of = parts.ravel()[found]
    half = min(found.size, FOREGROUND_VOXELS // 2)
    evenly = found[:half]
    _, one_each = np.unique(part_of, return_index=True)
    one_each = rng.permutation(found[one_each])[:half]
    chances = 1 / (number * np.bincount(part_of)[part_of])
    by_part = rng.choice(found, half - one_each.size, p=chances / chances.sum())
    positions = _unravel(np.concatenate([evenly, one_each, by_part]), parts.shape)
    return positions + np.array([axis.start for axis in box[0]], dtype=np.int32)


def _unravel(indices: NDArray[np.int64], shape: Sequence[int]) -> Positions:
    return np.stack(np.unravel_index(indices, tuple(shape)), 1).astype(np.int32)


def choose_shares(holders: Sequence[Sequence[int]], num_cases: int) -> NDArray[np.float64]:
    """How often a patch is centred on each class.

    Evenly where every case has every class. A class of few cases comes less often, by the square
    root of their share: as often as others it would be learned from the same few cases by heart.

    Args:
        holders: per class, the cases that have it.
        num_cases: in all.
    """
    shares: NDArray[np.float64] = np.sqrt([len(cases) / num_cases for cases in holders])
    normalised: NDArray[np.float64] = shares / shares.sum()
    return normalised
