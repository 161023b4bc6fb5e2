"""Write label maps and probabilities on a given grid; the suffix chooses the format.

Arrays and their grid come in, one file appears, whole or not at all.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volseg.errors import DataError
from volseg.geometry import Geometry
from volseg.images.formats import writable_format
from volseg.images.label_types import smallest_type

PathLike = str | os.PathLike[str]


def write_labels(path: PathLike, labels: NDArray[Any], geometry: Geometry) -> None:
    """Write a label map in the smallest integer type of the format that holds its values.

    On a grid that was read from a NIfTI file, a NIfTI file gets that file's affine bit for bit.

    Args:
        path: .nii.gz, .nii, .nrrd, .mha; in 2D also .png, .tif. Its folder is created.
        labels: (*S), integers or booleans.
        geometry: the grid of `S`.

    Raises:
        ConfigError: a suffix that is not written, or that cannot hold this grid or these values.
        DataError: labels that are no integers, do not fit the grid, or fit no type.
        MachineError: the disk is full.
    """
    path = Path(path)
    file_format = writable_format(path)
    if labels.dtype.kind not in "iub":
        raise DataError(f"{path}: labels of type {labels.dtype}; expected integers.")
    _check_shape(path, labels.shape, geometry)
    stored = smallest_type(int(labels.min()), int(labels.max()), file_format.LABEL_TYPES)
    file_format.write(path, labels.astype(stored, order="K", copy=False)[None], geometry)


def write_image(path: PathLike, array: NDArray[Any], geometry: Geometry) -> None:
    """Write channels, as probabilities, in their own type (float16 as float32).

    Args:
        path: .nii.gz, .nii (channels last), .nrrd, .mha (vectors). Its folder is created.
        array: (C, *S), numbers.
        geometry: the grid of `S`.

    Raises:
        ConfigError: a suffix that is not written, or that cannot hold these channels.
        DataError: an array that is not numbers or does not fit the grid.
        MachineError: the disk is full.
    """
    path = Path(path)
    file_format = writable_format(path)
    if array.dtype.kind not in "iuf" or array.dtype.itemsize > 8:
        raise DataError(f"{path}: voxels of type {array.dtype}; expected numbers.")
    _check_shape(path, array.shape[1:], geometry)
    if array.dtype == np.float16:
        array = array.astype(np.float32, order="K")
    file_format.write(path, array, geometry)


def _check_shape(path: Path, shape: tuple[int, ...], geometry: Geometry) -> None:
    if shape != geometry.shape:
        raise DataError(f"{path}: voxels of shape {shape}; expected the grid's {geometry.shape}.")
