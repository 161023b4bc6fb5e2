"""Which module reads and writes a file, by the suffix of its name.

The modules are imported when a file of theirs is met: they bring nibabel, SimpleITK or Pillow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from volseg.errors import ConfigError, DataError
from volseg.geometry import Geometry
from volseg.images.label_types import IntegerTypes

SEGMENTS = ".seg.nrrd"
"""3D Slicer's segmentations."""
DICOM = ".dcm"
_NIFTI = (".nii.gz", ".nii", ".hdr")
_ITK = (SEGMENTS, ".nrrd", ".nhdr", ".mha", ".mhd")
_MGH = (".mgz", ".mgh")
_PICTURE = (".png", ".tif", ".tiff")
_DICOM = (DICOM, ".ima")
_DICOM_MAGIC = b"DICM"
_DICOM_OFFSET = 128

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
    """Whether a folder holds DICOM files directly."""
    return any(is_dicom(path) for path in folder.iterdir())


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its content, or says so by its name."""
    if path.name.startswith(".") or path.name == "DICOMDIR" or not path.is_file():
        return False
    with open(path, "rb") as file:
        file.seek(_DICOM_OFFSET)
        is_marked = file.read(len(_DICOM_MAGIC)) == _DICOM_MAGIC
    return is_marked or path.name.lower().endswith(_DICOM)


def is_picture(name: str) -> bool:
    """Whether a file is a PNG or TIFF picture, by its name."""
    return name.lower().endswith(_PICTURE)
