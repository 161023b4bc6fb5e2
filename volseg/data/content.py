"""Where in a volume there is anything to look at: the box of nonzero voxels.

Scanners and skull stripping pad with exact zeros. Cropping them away saves memory and keeps
statistics honest; CT, whose air is -1000 HU, keeps its full extent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Box:
    """A block of voxels: `start` index and `shape` per spatial axis."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index for the spatial axes of an array."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))


def find_content(array: NDArray[Any]) -> Box:
    """Smallest box that holds every voxel of ``(C, *S)`` that is nonzero in any channel.

    An image of zeros only is kept whole.
    """
    faces = ((axis, side) for axis in range(1, array.ndim) for side in (0, -1))
    if all(array[(slice(None),) * axis + (side,)].any() for axis, side in faces):
        # As of any CT, whose air is not zero: no need to look through the whole volume.
        return Box((0,) * (array.ndim - 1), tuple(array.shape[1:]))
    mask = np.any(array != 0, axis=0)
    start, shape = [], []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        filled = np.flatnonzero(mask.any(axis=others))
        first, last = (filled[0], filled[-1]) if filled.size else (0, mask.shape[axis] - 1)
        start.append(int(first))
        shape.append(int(last - first + 1))
    return Box(tuple(start), tuple(shape))
