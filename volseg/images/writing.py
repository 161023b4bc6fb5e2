"""Write label maps and probabilities on a given grid; the suffix chooses the format.

Arrays and their grid come in, one file appears, whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volseg.errors import ConfigError, DataError
from volseg.geometry import Geometry
from volseg.images.formats import DICOM, SEGMENTS, is_picture, writable_format
from volseg.images.label_types import smallest_type

PathLike = str | os.PathLike[str]


def write_labels(
    path: PathLike,
    labels: NDArray[Any],
    geometry: Geometry,
    names: Mapping[int, str] | None = None,
    series: Path | None = None,
) -> None:
    """Write a label map in the smallest integer type of the format that holds its values.

    On a grid that was read from a NIfTI file, a NIfTI file gets that file's affine bit for bit.

    Args:
        path: .nii.gz, .nii, .nrrd, .mha; .seg.nrrd, which 3D Slicer opens as segments; .dcm, a
            DICOM segmentation; in 2D also .png, .tif. Its folder is created.
        labels: (*S), integers or booleans.
        geometry: the grid of `S`.
        names: of the values that are segments in a .seg.nrrd or .dcm, background left out; other
            formats have no names. By default every value but 0 is its own name.
        series: for .dcm, the folder of the DICOM series that was segmented.

    Raises:
        ConfigError: a suffix that is not written, or that cannot hold this grid or these values.
        DataError: labels that are no integers, do not fit the grid, or fit no type.
        MachineError: it cannot be written; `FullDiskError` where there is no room.
    """
    path = Path(path)
    if labels.dtype.kind not in "iub":
        raise DataError(f"{path}: labels of type {labels.dtype}; expected integers.")
    _check_shape(path, labels.shape, geometry)
    if names is None and path.name.lower().endswith((SEGMENTS, DICOM)):
        names = {int(value): str(value) for value in np.unique(labels) if value}
    if path.name.lower().endswith(DICOM):
        _write_dicom(path, labels, geometry, names or {}, series)
        return
    file_format = writable_format(path)
    stored = smallest_type(int(labels.min()), int(labels.max()), file_format.LABEL_TYPES)
    array = labels.astype(stored, order="K", copy=False)
    if path.name.lower().endswith(SEGMENTS):
        from volseg.images import segments

        segments.write(path, array, geometry, names or {})
    else:
        file_format.write(path, array[None], geometry)


def _write_dicom(
    path: Path,
    labels: NDArray[Any],
    geometry: Geometry,
    names: Mapping[int, str],
    series: Path | None,
) -> None:
    from volseg.images import dicom_seg

    if series is None or not series.is_dir():
        raise ConfigError(
            f"cannot write {path}: a DICOM segmentation needs the DICOM series that it is of. "
            "Segment its folder, or change the suffix."
        )
    dicom_seg.write(path, labels, geometry, names, series)


def write_image(path: PathLike, array: NDArray[Any], geometry: Geometry) -> None:
    """Write channels, as probabilities, in their own type (float16 as float32).

    Args:
        path: .nii.gz, .nii (channels last), .nrrd, .mha (vectors). Its folder is created.
        array: (C, *S), numbers.
        geometry: the grid of `S`.

    Raises:
        ConfigError: a suffix that is not written, or that cannot hold these channels.
        DataError: an array that is not numbers or does not fit the grid.
        MachineError: it cannot be written; `FullDiskError` where there is no room.
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


def check_label_suffix(suffix: str, spatial_dims: int) -> None:
    """Refuse a format that label maps cannot be written in, before there is one.

    Args:
        suffix: as ``.nii.gz``.
        spatial_dims: of the label maps.

    Raises:
        ConfigError: volseg does not write it, or it holds no volumes.
        MachineError: the package that writes it is not installed.
    """
    if spatial_dims == 3 and is_picture(suffix):
        raise ConfigError(f"cannot write volumes as {suffix}; expected .nii.gz. Change the suffix.")
    if suffix == DICOM:
        from volseg.images.dicom_seg import import_highdicom

        import_highdicom()
    else:
        writable_format(Path(f"labels{suffix}"))
