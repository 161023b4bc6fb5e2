"""Mirrored patches: left and right change places, and so do the classes that are named by them.

Axis 0 of a prepared array points to the patient's right (in a picture, along its width), whatever
the file's orientation was.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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


_WORD = re.compile(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![a-z])|\d+")
"""Of a name, whether its words are parted by marks or by capitals."""


@dataclass(frozen=True)
class Mirroring:
    """What may be mirrored, and what happens to the classes.

    Attributes:
        axes: spatial axes along which a mirrored patch is as good as the patch.
        swapped: per label index the one that it becomes when axis 0 is mirrored.
        outputs: the same per output of the network, which are regions where there are some.
    """

    axes: tuple[int, ...]
    swapped: tuple[int, ...]
    outputs: tuple[int, ...]

    def describe(self, names: Sequence[str]) -> str:
        """One line for a log, with the names of the classes."""
        pairs = [
            f"{names[index]} and {names[other]}"
            for index, other in enumerate(self.swapped)
            if index < other
        ]
        axes = "right-left, posterior-anterior, inferior-superior".split(", ")
        what = ", ".join(axes[axis] for axis in self.axes) or "no axis"
        if 0 not in self.axes:
            return f"{what}; left and right stay"
        return f"{what}; {', '.join(pairs) or 'no classes'} change places with left and right"

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
            label = _make_table(self.swapped, label.dtype, label.device)[label.long()]
        return image, label

    def draw(self, chances: Sequence[float], rng: np.random.Generator) -> tuple[int, ...]:
        """Axes to mirror, each by its own chance."""
        return tuple(axis for axis in self.axes if rng.random() < chances[axis])


@lru_cache(maxsize=4)
def _make_table(swapped: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied to a device once: each copy would wait for a GPU."""
    return torch.tensor(swapped, dtype=dtype, device=device)


def plan_mirroring(classes: Classes, spatial_dims: int) -> Mirroring:
    """Find the classes that have a side, and what that means for mirroring.

    Classes such as ``left kidney`` and ``right kidney``, or ``lung_upper_L`` and ``lung_upper_R``,
    change places. Axis 0 is ruled out by a class with a side but without its counterpart, by
    regions that do not become each other when the classes change places, and by partly annotated
    cases of classes with a side.

    Args:
        classes: of the dataset.
        spatial_dims: 2 or 3.
    """
    pairs, single = find_sides(classes.names)
    swapped = list(range(classes.num_indices))
    for left, right in pairs:
        swapped[left], swapped[right] = right, left
    outputs = _find_counterparts(classes, swapped)
    is_ruled_out = bool(single) or (bool(pairs) and bool(classes.unsure)) or outputs is None
    axes = tuple(range(1 if is_ruled_out else 0, spatial_dims))
    return Mirroring(axes, tuple(swapped), outputs or tuple(range(classes.num_outputs)))


def _find_counterparts(classes: Classes, swapped: Sequence[int]) -> tuple[int, ...] | None:
    """Per output the one that it becomes; None if a region becomes what is no region.

    Regions with a side must become their counterparts, and others themselves.
    """
    if not classes.regions:
        return tuple(swapped[: classes.num_classes])
    pairs, single = find_sides([region.name for region in classes.regions])
    counterparts = list(range(len(classes.regions)))
    for left, right in pairs:
        counterparts[left], counterparts[right] = right, left
    regions = [set(indices) for indices in classes.region_indices]
    mirrored = [{swapped[index] for index in region} for region in regions]
    is_kept = all(mirrored[i] == regions[other] for i, other in enumerate(counterparts))
    return tuple(counterparts) if is_kept and not single else None


def are_numbered(names: Sequence[str]) -> bool:
    """Whether several classes are called by their values alone, so that `find_sides` finds none."""
    return len(names) > 1 and all(re.fullmatch(r"label_\d+", name) for name in names)


def find_sides(names: Sequence[str]) -> tuple[list[tuple[int, int]], list[int]]:
    """Indices of the pairs (left, right), and of classes with a side but no counterpart.

    A single letter, or the abbreviation of two, is a side only where both sides are there.

    >>> find_sides(["background", "left lung", "RightLung", "heart", "kidney (l)"])
    ([(1, 2)], [])
    """
    found: dict[tuple[str, ...], dict[str, int]] = {}
    clear: set[int] = set()
    for index, name in enumerate(names):
        parts = [part.lower() for part in _WORD.findall(name)]
        words = [part for part in parts if part in _SIDES]
        sides = {_SIDES[word] for word in words}
        if any(len(word) > 2 for word in words):
            clear.add(index)
        if len(sides) == 1:
            others = tuple(part for part in parts if part not in _SIDES)
            if found.setdefault(others, {}).setdefault(sides.pop(), index) != index:
                clear.add(index)
    pairs = [(group["left"], group["right"]) for group in found.values() if len(group) == 2]
    paired = {index for pair in pairs for index in pair}
    return sorted(pairs), sorted(clear - paired)
