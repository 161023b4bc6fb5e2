"""NIfTI-1 and NIfTI-2 files, single or as .hdr and .img, plain or gzipped.

The header is parsed by nibabel, whose affine is taken as it is. Axes after the third are channels.
The header's description of space goes along in `Geometry.nifti`, so that a file written on the
same grid has the same affine bit for bit.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from volseg.atomic import atomic_path
from volseg.errors import DataError
from volseg.geometry import Geometry, NiftiSpace
from volseg.images.compressed import create_gzip, is_gzipped, open_inflated, read_voxels
from volseg.images.label_types import COMMON_TYPES

logger = logging.getLogger(__name__)

LABEL_TYPES = COMMON_TYPES

_SPACE_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
    *("pixdim", "xyzt_units"),
)
_SCANNER = 1
_MILLIMETRES = 2
_OTHER_UNITS = {1: "metres", 3: "micrometres"}
_CIFTI_INTENTS = range(3000, 3100)
_MAX_NIFTI1_SIZE = 32767
_PAIR_MAGIC = (b"ni1", b"ni2")


def read(path: Path) -> tuple[NDArray[Any], Geometry]:
    """Voxels ``(C, *S)`` and their grid; see `volseg.images.reading`."""
    header = _load_header(path)
    geometry, num_channels = _describe(header, path)
    stored = _stored_type(header)
    is_pair = header["magic"].item() in _PAIR_MAGIC
    offset = int(header["vox_offset"]) or (0 if is_pair else header.single_vox_offset)
    voxel_path = path.with_suffix(".img") if is_pair else path
    if not voxel_path.is_file():
        raise DataError(f"its voxels {voxel_path.name} are missing; expected them in its folder.")
    array = read_voxels(voxel_path, offset, (*geometry.shape, num_channels), stored)
    return np.moveaxis(_scale(array, header), -1, 0), geometry


def read_header(path: Path) -> tuple[Geometry, int]:
    """The grid and the number of channels, without reading voxels."""
    header = _load_header(path)
    _stored_type(header)
    return _describe(header, path)


def write(path: Path, array: NDArray[Any], geometry: Geometry) -> None:
    """Write voxels ``(C, *S)``; one channel is stored without an axis for it.

    Several channels in 2D are written as those of a volume of one slice: NIfTI would take a third
    axis for space.
    """
    if geometry.spatial_dims == 2 and len(array) > 1:
        array = array[..., None]
    array = array[0] if len(array) == 1 else np.moveaxis(array, 0, -1)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    header = _make_header(geometry, array.shape, array.dtype)
    no_extension = bytes(4)
    # The transpose of an array with the first axis fastest is contiguous and needs no copy.
    voxels = np.ascontiguousarray(array.T).reshape(-1).view(np.uint8).data
    with atomic_path(path) as temporary, _create(temporary) as stream:
        stream.write(header.binaryblock + no_extension)
        stream.write(voxels)


def nifti_space(header: Any) -> NiftiSpace:
    """The fields of a nibabel NIfTI header that place its voxels in space."""
    fields = {name: header[name].tolist() for name in _SPACE_FIELDS}
    return NiftiSpace(2 if isinstance(header, nib.Nifti2Header) else 1, fields)


def _create(path: Path) -> Any:
    return create_gzip(path) if path.name.lower().endswith(".gz") else open(path, "wb")


def _load_header(path: Path) -> Any:
    """A checked nibabel header of version 1 or 2."""
    is_named_gzip = path.name.lower().endswith(".gz")
    if is_named_gzip != is_gzipped(path) and path.suffix.lower() in (".gz", ".nii"):
        found = "plain NIfTI" if is_named_gzip else "gzip"
        _warn(f"{path} is {found} by its content, not what its name says; it is read all the same.")
    if path.suffix.lower() == ".img":
        path = path.with_suffix(".hdr")
        if not path.is_file():
            raise DataError(f"its header {path.name} is missing; expected it in the same folder.")
    with open_inflated(path) as stream:
        header = _parse(stream)
    reports = _Reports()
    try:
        header.check_fix(logger=reports, error_level=logging.ERROR)
    except HeaderDataError as error:
        raise DataError(f"the NIfTI header is damaged ({error}).") from error
    for message in reports.messages:
        _warn(f"{path}: {message}")
    return header


def _parse(stream: IO[bytes]) -> Any:
    block = stream.read(nib.Nifti2Header.sizeof_hdr)
    if block[344:348] in (b"n+1\0", b"ni1\0"):
        return nib.Nifti1Header(block[: nib.Nifti1Header.sizeof_hdr], check=False)
    if block[4:8] in (b"n+2\0", b"ni2\0") and len(block) == nib.Nifti2Header.sizeof_hdr:
        return nib.Nifti2Header(block, check=False)
    raise DataError(
        "not a NIfTI file; expected a NIfTI-1 or NIfTI-2 header. "
        "Convert it (Analyze files do not tell left from right), or correct its name."
    )


class _Reports:
    """Takes the place of the logger in nibabel's header checks: keeps what a user should know."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def log(self, level: int, message: str) -> None:
        if level >= logging.WARNING:
            self.messages.append(message)


def _describe(header: Any, path: Path) -> tuple[Geometry, int]:
    """Grid and number of channels by the header."""
    if int(header["intent_code"]) in _CIFTI_INTENTS:
        raise DataError("CIFTI (surfaces and connectivity); expected a volume of voxels.")
    sizes = [int(size) for size in header["dim"]]
    shape = sizes[1 : sizes[0] + 1]
    if sizes[0] > 7 or not shape or min(shape) < 1:
        raise DataError(f"shape {tuple(shape)} by the header; expected axes of at least one voxel.")
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) not in (2, 3, 4):
        raise DataError(
            f"{len(shape)} axes {tuple(shape)}; expected 2 or 3, or 4 with channels last. "
            "Vector files are not supported; store one file per channel."
        )
    try:
        affine = header.get_best_affine()
        _warn_about_space(header, tuple(shape[:3]), path)
    except (HeaderDataError, ValueError) as error:
        raise DataError(f"qform is damaged ({error}).") from error
    geometry = Geometry(tuple(shape[:3]), affine, nifti_space(header))
    return geometry, shape[3] if len(shape) == 4 else 1


def _warn_about_space(header: Any, shape: tuple[int, ...], path: Path) -> None:
    """Tell what the file leaves open or says twice."""
    if units := _OTHER_UNITS.get(int(header["xyzt_units"]) & 7):
        _warn(f"{path} declares {units}; its numbers are read as millimetres.")
    sform, sform_code = header.get_sform(coded=True)
    try:
        qform, qform_code = header.get_qform(coded=True)
    except (HeaderDataError, ValueError) as error:
        if not sform_code:
            raise
        _warn(f"{path}: qform is damaged ({error}); the sform is used.")
        return
    if not qform_code and not sform_code:
        _warn(
            f"{path} has neither qform nor sform: left, right and position are not known; the "
            "axes are assumed to run to the left, the front and the head (LAS)."
        )
    if not qform_code or not sform_code or not np.isfinite([qform, sform]).all():
        return
    first, second = Geometry(shape, qform), Geometry(shape, sform)
    distance_mm = first.distance_mm(second)
    # A float32 quaternion alone may be off by 0.2 mm over a body; half a voxel is another grid.
    if distance_mm > min(second.spacing_mm) / 2:
        _warn(
            f"{path}: qform (spacing {_rounded(first)} mm) and sform (spacing {_rounded(second)} "
            f"mm) differ by up to {distance_mm:.3g} mm; the sform is used."
        )


def _rounded(geometry: Geometry) -> str:
    return " x ".join(f"{spacing:.4g}" for spacing in geometry.spacing_mm)


@functools.lru_cache(maxsize=10_000)
def _warn(message: str) -> None:
    """Warn once per file, however often it is read."""
    logger.warning(message)


def _stored_type(header: Any) -> np.dtype[Any]:
    try:
        stored: np.dtype[Any] = header.get_data_dtype()
    except HeaderDataError as error:
        raise DataError(f"the NIfTI header is damaged ({error}).") from error
    if stored.names:
        raise DataError("RGB colours; expected one number per voxel. Convert it to greyscale.")
    if stored.kind not in "iuf" or stored.itemsize > 8:
        raise DataError(
            f"voxels of type {stored}; expected integers or real numbers of up to 64 bits. "
            "Store magnitude, or phase, or one file for each."
        )
    return stored


def _scale(array: NDArray[Any], header: Any) -> NDArray[Any]:
    """Apply slope and intercept, in float32 unless the stored type needs float64."""
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise DataError(f"scaling is damaged ({error}).") from error
    if slope is None or (slope, intercept) == (1, 0):
        return array
    scaled = array.astype(np.result_type(array.dtype, np.float32), order="K")
    scaled *= scaled.dtype.type(slope)
    scaled += scaled.dtype.type(intercept)
    return scaled


def _make_header(geometry: Geometry, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Header of a single file whose space is that of `geometry`."""
    space = geometry.nifti
    version = space.version if space else 1 + (max(shape) > _MAX_NIFTI1_SIZE)
    header = (nib.Nifti1Header, nib.Nifti2Header)[version - 1](endianness="<")
    header.set_data_shape(shape)
    header.set_data_dtype(dtype)
    header["magic"] = header.single_magic
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = 1, 0
    if space:
        for name, value in space.fields.items():
            header[name] = value
        return header
    header.set_sform(geometry.affine, _SCANNER)
    header.set_qform(geometry.affine, _SCANNER)
    header["xyzt_units"] = _MILLIMETRES
    # A quaternion cannot hold shear; readers that prefer the qform must not find a wrong one.
    if not Geometry(geometry.shape, header.get_qform()).is_same_grid(geometry):
        header["qform_code"] = 0
    return header
