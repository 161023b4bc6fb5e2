"""FreeSurfer's MGH and MGZ files, read only. The header is parsed by nibabel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from volseg.errors import DataError
from volseg.geometry import Geometry
from volseg.images.compressed import open_inflated, read_voxels

_HEADER_BYTES = 284


def read(path: Path) -> tuple[NDArray[Any], Geometry]:
    """Voxels ``(C, *S)`` and their grid; frames are channels."""
    header = _load_header(path)
    geometry, num_channels = _describe(header)
    offset = int(header.get_data_offset())
    array = read_voxels(path, offset, (*geometry.shape, num_channels), header.get_data_dtype())
    return np.moveaxis(array, -1, 0), geometry


def read_header(path: Path) -> tuple[Geometry, int]:
    """The grid and the number of channels, without reading voxels."""
    return _describe(_load_header(path))


def _load_header(path: Path) -> Any:
    with open_inflated(path) as stream:
        block = stream.read(_HEADER_BYTES)
    try:
        header = MGHHeader(block)
        header.get_data_dtype()
    except (HeaderDataError, KeyError, ValueError) as error:
        raise DataError("not an MGH file; expected its header. Correct its name.") from error
    return header


def _describe(header: Any) -> tuple[Geometry, int]:
    *shape, num_channels = (int(size) for size in header["dims"])
    if min(*shape, num_channels) < 1:
        raise DataError(f"shape {(*shape, num_channels)} by the header; expected no empty axis.")
    return Geometry(tuple(shape), header.get_affine()), num_channels
