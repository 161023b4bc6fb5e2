"""PNG and TIFF pictures in 2D through Pillow: greyscale, or RGB as three channels.

The first array axis is the column (X, to the right), the second the row (Y, downwards). Pictures
know nothing of millimetres or of the patient: their affine is the identity, a pixel is 1 mm wide.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from volseg.atomic import atomic_path
from volseg.errors import ConfigError, DataError
from volseg.geometry import Geometry
from volseg.images.label_types import IntegerTypes

LABEL_TYPES: IntegerTypes = (np.uint8, np.uint16, np.int32)

_NUM_CHANNELS = {
    "1": 1,
    "L": 1,
    "I;16": 1,
    "I;16B": 1,
    "I": 1,
    "F": 1,
    "RGB": 3,
    "LA": 1,
    "RGBA": 3,
}
_PNG_START = b"\x89PNG\r\n\x1a\n"
_TIFF_BITS_PER_SAMPLE = 258


def read(path: Path) -> tuple[NDArray[Any], Geometry]:
    """Pixels ``(C, X, Y)`` and their grid; an alpha channel is dropped if it is opaque.

    Raises:
        DataError: transparent, several pages, a palette, or colours of more than 8 bits.
    """
    with _open(path) as picture:
        num_channels = _check(picture, path)
        array = np.asarray(picture)
    if array.dtype == bool:
        array = array.astype(np.uint8)
    array = np.atleast_3d(array.astype(array.dtype.newbyteorder("="), copy=False))
    alpha = array[..., num_channels:]
    if alpha.size and alpha.min() < 255:
        raise DataError("transparent pixels; expected an opaque picture. Remove the alpha channel.")
    array = array[..., :num_channels].transpose(2, 1, 0)
    return array, Geometry(array.shape[1:], np.eye(4))


def read_header(path: Path) -> tuple[Geometry, int]:
    """The grid and the number of channels, without reading pixels."""
    with _open(path) as picture:
        return Geometry(picture.size, np.eye(4)), _check(picture, path)


def write(path: Path, array: NDArray[Any], geometry: Geometry) -> None:
    """Write one channel ``(1, X, Y)`` of unsigned bytes, or of another type as TIFF.

    Raises:
        ConfigError: a volume, several channels, a place in space, or a type PNG does not have.
    """
    if geometry.spatial_dims != 2 or not np.array_equal(geometry.affine, np.eye(4)):
        raise ConfigError(
            f"cannot write {path}: a picture holds no volume and no position in mm. Use .nii.gz."
        )
    if len(array) != 1:
        raise ConfigError(f"cannot write {len(array)} channels as {path}. Use .nrrd.")
    is_png = path.suffix.lower() == ".png"
    if array.dtype not in ((np.uint8, np.uint16) if is_png else (*LABEL_TYPES, np.float32)):
        cure = "Use .tif." if is_png else "Use .nrrd."
        raise ConfigError(f"cannot write values of type {array.dtype} as {path}. {cure}")
    picture = Pillow.fromarray(np.ascontiguousarray(array[0].T))
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG" if is_png else "TIFF")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Pillow.Image]:
    try:
        with Pillow.open(path, formats=("PNG", "TIFF")) as picture:
            yield picture
    except (OSError, SyntaxError, Pillow.DecompressionBombError) as error:
        raise DataError(f"cannot be read as a PNG or TIFF picture: {error}.") from error


def _check(picture: Pillow.Image, path: Path) -> int:
    """Number of channels of a picture that can be read without loss."""
    if getattr(picture, "n_frames", 1) > 1:
        raise DataError(
            "several pages; expected one picture. Volumes are read from .nii.gz, .nrrd or .mha."
        )
    if picture.mode not in _NUM_CHANNELS:
        raise DataError(
            f"colour mode {picture.mode}; expected greyscale or RGB without a palette. Convert it."
        )
    num_channels = _NUM_CHANNELS[picture.mode]
    # Pillow reduces such colours to 8 bits without a word.
    if "RGB" in picture.mode and _bits_per_sample(picture, path) > 8:
        raise DataError("colours of 16 bits; expected 8 bits. Convert it, or store it as .nrrd.")
    return num_channels


def _bits_per_sample(picture: Pillow.Image, path: Path) -> int:
    with open(path, "rb") as file:
        start = file.read(25)
    if start.startswith(_PNG_START):
        return start[24]
    tags = getattr(picture, "tag_v2", {})
    return int(max(tags.get(_TIFF_BITS_PER_SAMPLE, (8,))))
