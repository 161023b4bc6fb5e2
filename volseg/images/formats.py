"""Which module reads and writes a file, by the suffix of its name.

The modules are imported when a file of theirs is met: they bring nibabel, SimpleITK or Pillow.
"""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from volseg.errors import ConfigError, DataError
from volseg.geometry import Geometry
from volseg.images.label_types import IntegerTypes

logger = logging.getLogger(__name__)

SEGMENTS = ".seg.nrrd"
"""3D Slicer's segmentations."""
DICOM = ".dcm"
_NIFTI = (".nii.gz", ".nii", ".hdr")
_ITK = (SEGMENTS, ".nrrd", ".nhdr", ".mha", ".mhd")
_MGH = (".mgz", ".mgh")
_RAW = (".raw", ".raw.gz", ".raw.bz2", ".zraw", ".bin", ".dat", ".img")
_OTHER_PARTS = {".hdr": (".img",), ".img": (".hdr",), ".nhdr": _RAW, ".mhd": _RAW}
"""Where header and voxels are kept apart, the usual suffixes of the other file."""
_PICTURE = (".png", ".tif", ".tiff")
_DICOM = (DICOM, ".ima")
_DICOM_MAGIC = b"DICM"
_DICOM_OFFSET = 128
_CLASS_TAG, _META_BYTES = (0x0002, 0x0002), 1024
_STORAGE = "1.2.840.10008.5.1.4.1.1."
"""Before the number of a class of DICOM objects that are stored."""
_RT_IMAGE = f"{_STORAGE}481.1"
_NO_SLICES = {
    "9": "waveforms",
    "11": "presentation states",
    "30": "parametric maps",
    "66": "raw data, registrations, segmentations",
    "88": "reports, key objects",
    "104": "documents",
    "481": "structures, doses and plans of a radiotherapy, but for its images",
}

IMAGE_SUFFIXES: tuple[str, ...] = (*_NIFTI, *_ITK, *_MGH, *_PICTURE)
"""Suffixes of readable files in lower case; a pair of .hdr and .img counts once, as its .hdr."""


class Format(Protocol):
    """What a module of this package offers for its file format."""

    def read(self, path: Path) -> tuple[NDArray[Any], Geometry]:
        """Voxels ``(C, *S)`` and their grid."""

    def read_header(self, path: Path) -> tuple[Geometry, int]:
        """The grid and the number of channels, without reading voxels."""


class WritableFormat(Format, Protocol):
    """A format that volseg writes as well."""

    LABEL_TYPES: IntegerTypes
    """Integer types of label files, the preferred first."""

    def write(self, path: Path, array: NDArray[Any], geometry: Geometry) -> None:
        """Write voxels ``(C, *S)``, whole or not at all."""


def image_stem(path: Path) -> str:
    """The file name without its image suffix: ``case_1`` for ``case_1.nii.gz``."""
    return path.name[: len(path.name) - len(_suffix(path))]


def readable_format(path: Path) -> Format:
    """The format that reads `path`; a folder is a DICOM series.

    Raises:
        DataError: the suffix is not that of an image.
    """
    if path.is_dir():
        from volseg.images import dicom

        return dicom
    suffix = _suffix(path)
    if suffix in _MGH:
        from volseg.images import mgh

        return mgh
    if found := _find_writable(suffix):
        return found
    if may_be_slice(path):
        raise DataError(
            f"{path} is a slice of a DICOM series; expected the folder of the series. Give that, "
            "with this series alone in it."
        )
    raise DataError(
        f"{path} is not an image by its name; expected {' '.join(IMAGE_SUFFIXES)}. "
        "Convert it, or correct its name."
    )


def writable_format(path: Path) -> WritableFormat:
    """The format that writes `path`.

    Raises:
        ConfigError: volseg does not write files with this suffix.
    """
    suffix = _suffix(path)
    found = None if suffix in (".hdr", ".img", ".nhdr", ".mhd") else _find_writable(suffix)
    if found is None:
        raise ConfigError(
            f"cannot write {path}; expected .nii.gz .nii .nrrd .mha, for labels also .seg.nrrd "
            ".dcm, or for 2D .png .tif. Change the suffix."
        )
    return found


def _find_writable(suffix: str) -> WritableFormat | None:
    if suffix in (*_NIFTI, ".img"):
        from volseg.images import nifti

        return nifti
    if suffix in _ITK:
        from volseg.images import itk

        return itk
    if suffix in _PICTURE:
        from volseg.images import pictures

        return pictures
    return None


def _suffix(path: Path) -> str:
    name = path.name.lower()
    known = (suffix for suffix in (*IMAGE_SUFFIXES, ".img") if name.endswith(suffix))
    return next(known, path.suffix.lower())


def is_series(folder: Path) -> bool:
    """Whether a folder holds directly what may be slices of a DICOM series."""
    paths = list(folder.iterdir())
    for path in paths:
        # An image that may not be read fails as a case of its own.
        if path.is_file() and not os.access(path, os.R_OK) and _suffix(path) not in IMAGE_SUFFIXES:
            logger.warning("%s may not be read", path)
    return any(os.access(path, os.R_OK) and may_be_slice(path) for path in paths)


def list_stored(path: Path) -> list[Path]:
    """The files of an image: the slices of a series, a header and its voxels by the usual names."""
    if path.is_dir():
        return sorted(filter(may_be_slice, path.iterdir()))
    others = _OTHER_PARTS.get(_suffix(path), ())
    return [path, *filter(Path.is_file, map(path.with_suffix, others))]


def may_be_slice(path: Path) -> bool:
    """Whether a file is DICOM by its content or name, and does not say that it is no image.

    Structures, doses, reports, segmentations and the like lie among the slices they belong to.
    """
    uid = find_class(path)
    return uid is not None and is_of_slices(uid)


def is_of_slices(uid: str) -> bool:
    """Whether a class of DICOM objects may be one of slices; empty where a file does not say."""
    kind = uid.removeprefix(_STORAGE).partition(".")[0]
    return uid == _RT_IMAGE or not (uid.startswith(_STORAGE) and kind in _NO_SLICES)


def find_class(path: Path) -> str | None:
    """Which class of DICOM objects a file is of, empty where it does not say; None for no DICOM."""
    if path.name.startswith(".") or path.name == "DICOMDIR" or not path.is_file():
        return None
    with open(path, "rb") as file:
        file.seek(_DICOM_OFFSET)
        is_marked = file.read(len(_DICOM_MAGIC)) == _DICOM_MAGIC
        meta = file.read(_META_BYTES) if is_marked else b""
    return _parse_class(meta) if is_marked or path.name.lower().endswith(_DICOM) else None


def _parse_class(meta: bytes) -> str:
    """The class by the elements of group 2, which are explicit and little-endian in every file."""
    place = 0
    while place + 12 <= len(meta):
        group, element, kind, size = struct.unpack_from("<HH2sH", meta, place)
        place += 8
        if kind in (b"OB", b"UN"):
            (size,) = struct.unpack_from("<I", meta, place)
            place += 4
        if (group, element) == _CLASS_TAG:
            return meta[place : place + size].rstrip(b"\0 ").decode("ascii", "replace")
        if group != _CLASS_TAG[0]:
            break
        place += size
    return ""


def is_picture(name: str) -> bool:
    """Whether a file is a PNG or TIFF picture, by its name."""
    return name.lower().endswith(_PICTURE)
