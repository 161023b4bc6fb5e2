"""What is taken out of a label map after the network: parts that are too small to be meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from volseg.data.cases import Classes
from volseg.errors import ConfigError, check_choice

EVERY = "all"
"""Stands for every class but the background."""
_CHUNK = 2**22


@dataclass(frozen=True)
class Postprocessing:
    """Which connected parts of a class stay.

    Voxels are connected through faces, edges and corners. What is taken out becomes background.

    Attributes:
        largest: values of the classes of which only the largest part stays.
        least_ml: by value, the volume below which a part does not stay.
    """

    largest: tuple[int, ...] = ()
    least_ml: Mapping[int, float] | None = None

    def describe(self) -> dict[str, Any]:
        """The same as plain data."""
        least = self.least_ml or {}
        return {
            "largest": list(self.largest),
            "least_ml": {str(value): volume for value, volume in sorted(least.items())},
        }

    def apply(self, labels: NDArray[Any], background: int, voxel_ml: float) -> None:
        """Change label values ``(*S)`` in place.

        Args:
            labels: of the image's grid.
            background: value of what is taken out.
            voxel_ml: volume of a voxel.
        """
        least = self.least_ml or {}
        for value in sorted({*self.largest, *least}):
            mask = labels == value
            box = ndimage.find_objects(mask.view(np.uint8))
            if not box:
                continue
            parts, number = ndimage.label(mask[box[0]], np.ones((3,) * labels.ndim))
            sizes = count_values(parts, number + 1)[1:]
            stays = sizes * voxel_ml >= least.get(value, 0.0)
            if value in self.largest:
                stays &= np.arange(number) == sizes.argmax()
            goes = np.concatenate([[False], ~stays])[parts]
            labels[box[0]][goes] = background


def count_values(array: NDArray[Any], number: int) -> NDArray[np.int64]:
    """How often each value from 0 to `number` - 1 occurs in an array of integers."""
    flat, counts = array.ravel(order="K"), np.zeros(number, np.int64)
    # Chunk by chunk, since numpy counts in a copy of eight bytes per voxel.
    for start in range(0, flat.size, _CHUNK):
        counts += np.bincount(flat[start : start + _CHUNK], minlength=number)
    return counts


def plan_postprocessing(
    classes: Classes, largest: Sequence[str], least_ml: Mapping[str, float]
) -> Postprocessing:
    """Take the classes by name; ``all`` stands for every one.

    Raises:
        ConfigError: an unknown class, or a volume that is not above zero.
    """
    if wrong := [f"{name}={volume:g}" for name, volume in least_ml.items() if not volume > 0]:
        raise ConfigError(f"a least volume of {wrong[0]} ml; expected more than 0.")
    named: dict[int, float] = {}
    for name, volume in sorted(least_ml.items(), key=lambda item: item[0] != EVERY):
        named |= dict.fromkeys(_find_values(classes, name), volume)
    kept = {value for name in largest for value in _find_values(classes, name)}
    return Postprocessing(tuple(sorted(kept)), named)


def _find_values(classes: Classes, name: str) -> tuple[int, ...]:
    if name == EVERY:
        return classes.values[1:]
    check_choice("class", name, [*classes.names[1:], EVERY])
    return (classes.values[classes.names.index(name)],)
