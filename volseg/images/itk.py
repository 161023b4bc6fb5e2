"""NRRD and MetaImage files (.nrrd, .nhdr, .mha, .mhd) through SimpleITK.

ITK counts millimetres to the left, the back and the head (LPS); the affine is turned to RAS+ here.
MetaImage files are checked before, since ITK fills what is missing or damaged with zeros.
"""

from __future__ import annotations

import errno
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from volseg.atomic import atomic_path
from volseg.errors import ConfigError, DataError, MachineError
from volseg.geometry import Geometry
from volseg.images.label_types import COMMON_TYPES

LABEL_TYPES = COMMON_TYPES

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_CHUNK = 1 << 24
_MAX_HEADER_BYTES = 1 << 16


def read(path: Path) -> tuple[NDArray[Any], Geometry]:
    """Voxels ``(C, *S)`` and their grid; components of a vector are channels."""
    reader = _open(path)
    geometry, num_channels = _describe(reader)
    if _is_metaimage(path):
        item_bytes = np.dtype(_number_type(reader)).itemsize
        _check_metaimage(path, int(np.prod(geometry.shape)) * num_channels * item_bytes)
    try:
        array = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise DataError(f"cannot be read: {_reason(error)}. Copy or export it again.") from error
    # ITK has the axes in the opposite order, components last.
    return (array if num_channels > 1 else array[..., None]).T, geometry


def read_header(path: Path) -> tuple[Geometry, int]:
    """The grid and the number of channels, without reading voxels."""
    return _describe(_open(path))


def from_image(image: sitk.Image) -> tuple[NDArray[Any], Geometry]:
    """Voxels ``(C, *S)`` of an image in memory, and their grid."""
    geometry, num_channels = _describe(image)
    array = sitk.GetArrayFromImage(image)
    return (array if num_channels > 1 else array[..., None]).T, geometry


def write(
    path: Path,
    array: NDArray[Any],
    geometry: Geometry,
    fields: Mapping[str, str] | None = None,
) -> None:
    """Write voxels ``(C, *S)``, compressed; several channels as the components of a vector.

    Args:
        path: .nrrd or .mha.
        array: the voxels.
        geometry: the grid of `S`.
        fields: further keys and values of an NRRD header.

    Raises:
        ConfigError: a picture that does not lie in the plane of its two axes.
        FullDiskError: there is no room.
        MachineError: ITK cannot write it for another reason.
    """
    dims = geometry.spatial_dims
    affine = _LPS_TO_RAS @ geometry.affine
    if dims == 2 and not np.array_equal(affine[[2]], [[0, 0, 1, 0]]):
        raise ConfigError(
            f"cannot write {path}: a 2D file of this format has no place in 3D space. Use .nii.gz."
        )
    values = np.ascontiguousarray(array.T if len(array) > 1 else array[0].T)
    image = sitk.GetImageFromArray(values, isVector=len(array) > 1)
    spacing = np.array(geometry.spacing_mm)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:dims, :dims] / spacing).ravel().tolist())
    image.SetOrigin(affine[:dims, 3].tolist())
    for key, value in (fields or {}).items():
        image.SetMetaData(key, value)
    with atomic_path(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
        except RuntimeError as error:
            _check_room(temporary)
            raise MachineError(f"cannot write {path}: {_reason(error)}.") from error


def _check_room(path: Path) -> None:
    """ITK does not say that the disk is full, but the system does.

    Raises:
        OSError: it is; any other error is for ITK to tell.
    """
    try:
        with open(path, "ab") as file:
            file.write(bytes(_CHUNK))
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise


def _open(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("MetaImageIO" if _is_metaimage(path) else "NrrdImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataError(f"cannot be read: {_reason(error)}. Copy or export it again.") from error
    return reader


def _is_metaimage(path: Path) -> bool:
    return path.suffix.lower() in (".mha", ".mhd")


def _describe(reader: sitk.ImageFileReader | sitk.Image) -> tuple[Geometry, int]:
    dims = reader.GetDimension()
    if dims not in (2, 3):
        raise DataError(f"{dims} axes; expected 2 or 3, with channels as components of a vector.")
    _number_type(reader)
    affine = np.eye(4)
    direction = np.reshape(reader.GetDirection(), (dims, dims))
    affine[:dims, :dims] = direction * np.array(reader.GetSpacing())
    affine[:dims, 3] = reader.GetOrigin()
    return Geometry(reader.GetSize(), _LPS_TO_RAS @ affine), _count_channels(reader)


def _count_channels(reader: sitk.ImageFileReader | sitk.Image) -> int:
    if isinstance(reader, sitk.Image):
        return int(reader.GetNumberOfComponentsPerPixel())
    return int(reader.GetNumberOfComponents())


def _number_type(reader: sitk.ImageFileReader | sitk.Image) -> str:
    """Numpy's name of the type of one component."""
    words = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    for bits in (8, 16, 32, 64):
        for sign, prefix in (("signed", "int"), ("unsigned", "uint")):
            if re.search(rf"\b{bits}-bit {sign} integer", words):
                return f"{prefix}{bits}"
        if re.search(rf"\b{bits}-bit float", words) and "complex" not in words:
            return f"float{bits}"
    raise DataError(f"voxels are {words}; expected integers or real numbers.")


def _check_metaimage(path: Path, num_bytes: int) -> None:
    """Refuse a MetaImage whose data are shorter than `num_bytes` or fail their checksum."""
    fields, end = _metaimage_fields(path)
    source = fields["ElementDataFile"]
    if source == "LOCAL":
        data_path, offset = path, end
    else:
        data_path, offset = path.parent / source, max(int(fields.get("HeaderSize", 0)), 0)
    if source == "LIST" or "%" in source:
        raise DataError("spread over several data files; expected one. Store it as .mha.")
    if not data_path.is_file():
        raise DataError(f"its data file {source} is missing; expected it in the same folder.")
    if fields.get("CompressedData", "False").lower() == "true":
        found = _inflated_size(data_path, offset)
    else:
        found = data_path.stat().st_size - offset
    if found < num_bytes:
        raise DataError(
            f"truncated: {found} bytes of voxels; expected {num_bytes} by the header. "
            "Copy the file again."
        )


def _metaimage_fields(path: Path) -> tuple[dict[str, str], int]:
    """Keys and values of the header, and where it ends; ElementDataFile is its last key."""
    fields: dict[str, str] = {}
    with open(path, "rb") as file:
        while "ElementDataFile" not in fields:
            line = file.readline(_MAX_HEADER_BYTES).decode("latin-1")
            key, equals, value = line.partition("=")
            if not equals:
                raise DataError("not a MetaImage file; expected lines of 'key = value'.")
            fields[key.strip()] = value.strip()
        return fields, file.tell()


def _inflated_size(path: Path, offset: int) -> int:
    """Bytes of a zlib stream after inflation; its checksum is verified on the way."""
    inflater = zlib.decompressobj()
    size = 0
    with open(path, "rb") as file:
        file.seek(offset)
        try:
            while chunk := file.read(_CHUNK):
                size += len(inflater.decompress(chunk))
        except zlib.error as error:
            raise DataError(f"the data are damaged ({error}). Copy the file again.") from error
    return size


def _reason(error: RuntimeError) -> str:
    """The last line of an ITK report, which tells the cause, without its source location."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^\[nrrd\]\s*(\w+:\s*)?", "", lines[-1]).strip().rstrip(".")
