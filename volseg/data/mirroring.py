"""Mirrored patches: left and right change places, and so do the classes that are named by them.

Axis 0 of a prepared array points to the patient's right (in a picture, along its width), whatever
the file's orientation was.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from volseg.data.cases import Classes

_SIDES = {
    "left": "left",
    "lt": "left",
    "lh": "left",
    "l": "left",
    "right": "right",
    "rt": "right",
    "rh": "right",
    "r": "right",
}


@dataclass(frozen=True)
class Mirroring:
    """What may be mirrored, and what happens to the classes.

    Attributes:
        axes: spatial axes along which a mirrored patch is as good as the patch.
        swapped: per label index the one that it becomes when axis 0 is mirrored.
    """

    axes: tuple[int, ...]
    swapped: tuple[int, ...]

    def apply(self, image: Tensor, label: Tensor, axes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mirror ``(C, *P)`` and its label indices ``(*P)`` along some axes.

        An axis of a single voxel stays: a sagittal slice does not show which side it is of.
        """
        axes = [axis for axis in axes if label.shape[axis] > 1]
        if not axes:
            return image, label
        # Counted from the end, the axes are the same for both.
        dims = [axis - label.dim() for axis in axes]
        image, label = image.flip(dims), label.flip(dims)
        if 0 in axes and self.swapped != tuple(range(len(self.swapped))):
            label = torch.tensor(self.swapped, dtype=label.dtype, device=label.device)[label.long()]
        return image, label

    def draw(self, probability: float, seed: int) -> tuple[int, ...]:
        """Axes to mirror, each with the given probability; the same for the same seed."""
        rng = np.random.default_rng((seed, 1))
        return tuple(axis for axis in self.axes if rng.random() < probability)


def plan_mirroring(classes: Classes, spatial_dims: int) -> Mirroring:
    """Find the classes that have a side, and what that means for mirroring.

    Classes such as ``left kidney`` and ``right kidney``, or ``lung_upper_L`` and ``lung_upper_R``,
    change places. A class with a side but without its counterpart rules axis 0 out, and so do
    partly annotated cases of classes with a side.

    Args:
        classes: of the dataset.
        spatial_dims: 2 or 3.
    """
    pairs, single = find_sides(classes.names)
    swapped = list(range(classes.num_indices))
    for left, right in pairs:
        swapped[left], swapped[right] = right, left
    is_ruled_out = bool(single) or (bool(pairs) and bool(classes.unsure))
    axes = tuple(range(1 if is_ruled_out else 0, spatial_dims))
    return Mirroring(axes, tuple(swapped))


def find_sides(names: Sequence[str]) -> tuple[list[tuple[int, int]], list[int]]:
    """Indices of the pairs (left, right), and of classes with a side but no counterpart.

    A single letter, or the abbreviation of two, is a side only where both sides are there.

    >>> find_sides(["background", "left lung", "right lung", "heart", "kidney_l"])
    ([(1, 2)], [])
    """
    found: dict[tuple[str, ...], dict[str, int]] = {}
    words: dict[int, bool] = {}
    for index, name in enumerate(names):
        parts = [part for part in re.split(r"[\s_.\-]+", name.lower()) if part]
        sides = [part for part in parts if part in _SIDES]
        if len(sides) != 1:
            continue
        others = tuple(part for part in parts if part not in _SIDES)
        found.setdefault(others, {})[_SIDES[sides[0]]] = index
        words[index] = len(sides[0]) > 2
    pairs = [(group["left"], group["right"]) for group in found.values() if len(group) == 2]
    single = [
        index
        for group in found.values()
        if len(group) == 1
        for index in group.values()
        if words[index]
    ]
    return sorted(pairs), sorted(single)
