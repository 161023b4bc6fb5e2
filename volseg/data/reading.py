"""From the files of one case to one array on one grid.

Takes paths, gives ``(C, *S)`` float32 intensities and, where there is a label, class indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volseg.data.cases import Case, Classes
from volseg.errors import DataError
from volseg.images import Image, read_image, read_labels


def read_channels(paths: Sequence[Path], channels: Sequence[str]) -> Image:
    """Read one file per channel, or one file with all channels, into ``(C, *S)`` float32.

    Raises:
        DataError: a file is bad, the number of channels is wrong, or the grids differ.
    """
    images = [read_image(path) for path in paths]
    first = images[0]
    for image, path in zip(images[1:], paths[1:], strict=True):
        if not image.geometry.is_same_grid(first.geometry):
            raise DataError(
                f"{path}: {_describe_mismatch(image, first)} to {paths[0]}; expected the channels "
                "of one case on one grid. Resample one onto the other."
            )
    array = np.concatenate([image.array.astype(np.float32, copy=False) for image in images])
    if len(array) != len(channels):
        raise DataError(
            f"{paths[0]}: {len(array)} channels; expected {len(channels)} ({', '.join(channels)}). "
            "Give one file per channel, or one file with all of them."
        )
    return Image(array, first.geometry, first.path)


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
            f"{case.label}: {_describe_mismatch(label, image)} to its image {case.images[0]}; "
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
