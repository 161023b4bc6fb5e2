"""From the files of one case to one array on one grid.

Takes paths, gives ``(C, *S)`` intensities and, where there is a label, class indices.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volseg.data.cases import Case, Classes
from volseg.errors import DataError
from volseg.images import Image, read_image, read_labels


def read_channels(paths: Sequence[Path | None], channels: Sequence[str]) -> Image:
    """Read one file per channel, or one file with all channels, into ``(C, *S)``.

    A single file keeps its type; several are put together in float32.

    Args:
        paths: None for a channel that is not there; its voxels are zero then.
        channels: their names.

    Raises:
        DataError: a file is bad, the number of channels is wrong, the grids differ, or there is
            no file at all.
    """
    images = {path: read_image(path) for path in paths if path is not None}
    if not images:
        raise DataError(f"no image; expected one of {', '.join(channels)} at least. Add it.")
    first = next(iter(images.values()))
    for path, image in images.items():
        if not image.geometry.is_same_grid(first.geometry):
            raise DataError(
                f"{path}: {_describe_mismatch(image, first)} to {first.path}; expected the "
                "channels of one case on one grid. Resample one onto the other."
            )
    parts = [None if path is None else images[path].array for path in paths]
    numbers = [1 if part is None else len(part) for part in parts]
    if sum(numbers) != len(channels):
        names = ", ".join([str(first.path), *(path.name for path in list(images)[1:])])
        raise DataError(
            f"{names}: {sum(numbers)} channels; expected {len(channels)} "
            f"({', '.join(channels)}). Give one file per channel, "
            "numbered from 0000 without a gap, or one file with all of them."
        )
    places = list(itertools.accumulate(numbers, initial=0))
    absent = tuple(place for place, path in zip(places, paths, strict=False) if path is None)
    return Image(_join(parts, places, first.geometry.shape), first.geometry, first.path, absent)


def _join(
    parts: Sequence[NDArray[Any] | None], places: Sequence[int], shape: Sequence[int]
) -> NDArray[Any]:
    """Channels ``(C, *S)`` at their places; each voxel is copied once at most."""
    if len(parts) == 1 and parts[0] is not None:
        return parts[0]
    # As files have it: the first axis of space is the fastest, and channels follow each other.
    array = np.moveaxis(np.zeros((*shape, places[-1]), np.float32, order="F"), -1, 0)
    for part, start in zip(parts, places, strict=False):
        if part is not None:
            array[start : start + len(part)] = part
    return array


def read_case(
    case: Case, channels: Sequence[str], classes: Classes
) -> tuple[Image, NDArray[Any] | None]:
    """Read a case's intensities ``(C, *S)`` and its label indices ``(*S)``, None if unlabelled.

    Raises:
        DataError: as `read_channels`; a label on another grid or with an undeclared value.
    """
    image = read_channels(case.images, channels)
    if case.label is None:
        return image, None
    label = read_labels(case.label)
    if not label.geometry.is_same_grid(image.geometry):
        raise DataError(
            f"{case.label}: {_describe_mismatch(label, image)} to its image {case.files[0]}; "
            "expected both on one grid. Resample the label onto the image."
        )
    try:
        return image, classes.encode(label.array[0], case.annotated)
    except DataError as error:
        raise DataError(f"{case.label}: {error}") from error


def _describe_mismatch(image: Image, reference: Image) -> str:
    if image.geometry.shape != reference.geometry.shape:
        return f"shape {image.geometry.shape} differs from {reference.geometry.shape}"
    return f"its grid lies up to {image.geometry.distance_mm(reference.geometry):.3g} mm away"
