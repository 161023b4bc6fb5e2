"""Read an image or a label map from any supported file, or refuse it by name.

A path comes in, an `Image` with one array and its grid goes out. Values are as stored, or scaled
as the file says; nothing is resampled or reoriented here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volseg.errors import DataError
from volseg.geometry import Geometry
from volseg.images.formats import readable_format
from volseg.images.image import Image
from volseg.images.label_types import COMMON_TYPES, smallest_type

PathLike = str | os.PathLike[str]

_GIT_LFS_START = b"version https://git-lfs"


def read_image(path: PathLike) -> Image:
    """Read intensities.

    The stored type is kept unless the file has a scaling. Scaled values are float32, or float64 if
    the stored type is wider than 16-bit integers or float32, so that nothing is rounded away.

    Args:
        path: file of any suffix in `IMAGE_SUFFIXES`, or the folder of a DICOM series.
            ``(X, Y, Z, C)`` in NIfTI is C channels, ``(X, Y, Z, 1)`` is one, ``(X, Y)`` is a
            picture.

    Raises:
        DataError: missing, truncated, damaged or unsupported file, or voxels that are not finite.
    """
    path = Path(path)
    with _named(path):
        array, geometry = _read(path)
        _check_finite(array)
    return Image(array, geometry, path)


def read_labels(path: PathLike) -> Image:
    """Read a label map: one channel of integers, ``(1, *S)``.

    The stored integer type is kept; whole numbers in a float file become the smallest type that
    holds them.

    Raises:
        DataError: as `read_image`; several channels, or a value that is not a whole number.
    """
    path = Path(path)
    with _named(path):
        array, geometry = _read(path)
        if len(array) != 1:
            raise DataError(
                f"{len(array)} channels; expected a label map of one channel with one value "
                "per class. Merge the channels."
            )
        if array.dtype.kind == "f":
            array = _to_integers(array)
    return Image(array, geometry, path)


def read_header(path: PathLike) -> tuple[Geometry, int]:
    """The grid and the number of channels of a file, without reading its voxels.

    Raises:
        DataError: missing, damaged or unsupported file.
    """
    path = Path(path)
    with _named(path):
        _check_file(path)
        return readable_format(path).read_header(path)


def from_nibabel(image: Any) -> Image:
    """Take over a nibabel image that is in memory or opened, its last axis as channels in 4D.

    Raises:
        DataError: no affine, an unsupported number of axes, or voxels that are not finite.
    """
    try:
        array = np.asanyarray(image.dataobj)
    except (OSError, EOFError) as error:
        raise DataError(f"the nibabel image cannot be read: {error}.") from error
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3, 4) or array.dtype.kind not in "iuf" or image.affine is None:
        raise DataError(
            f"nibabel image of shape {image.shape} and type {array.dtype}; expected 2 or 3 axes, "
            "or 4 with channels last, of numbers, with an affine."
        )
    array = np.moveaxis(array, -1, 0) if array.ndim == 4 else array[None]
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    _check_finite(array)
    return Image(array, _geometry_of(image, array.shape[1:]))


def from_sitk(image: Any) -> Image:
    """Take over a SimpleITK image, its components as channels.

    Raises:
        DataError: an unsupported number of axes or type, or voxels that are not finite.
    """
    from volseg.images import itk

    array, geometry = itk.from_image(image)
    _check_finite(array)
    return Image(array, geometry)


def _geometry_of(image: Any, shape: tuple[int, ...]) -> Geometry:
    import nibabel as nib

    from volseg.images.nifti import nifti_space

    header = image.header
    # A changed affine reaches the header of a nibabel image only when that is saved.
    if isinstance(header, nib.Nifti1Header) and np.array_equal(
        header.get_best_affine(), image.affine
    ):
        return Geometry(shape, image.affine, nifti_space(header))
    return Geometry(shape, image.affine)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put the file's name before whatever is wrong with it."""
    try:
        yield
    except DataError as error:
        message = str(error)
        if not message.startswith(str(path)):
            message = f"{path}: {message}"
        raise DataError(" ".join(message.splitlines())) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read(path: Path) -> tuple[NDArray[Any], Geometry]:
    _check_file(path)
    return readable_format(path).read(path)


def _check_file(path: Path) -> None:
    """Refuse what is no file with content, whatever its format."""
    if path.is_dir():
        return
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    with open(path, "rb") as file:
        start = file.read(len(_GIT_LFS_START))
    if not start:
        raise DataError(f"{path} is empty (0 bytes). Copy the file again.")
    if start == _GIT_LFS_START:
        raise DataError(f"{path} is a Git LFS pointer, not the image itself. Run `git lfs pull`.")


def _check_finite(array: NDArray[Any]) -> None:
    if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
        count = int(finite.size - np.count_nonzero(finite))
        raise DataError(
            f"{count} voxels are NaN or infinite, the first {_first(~finite)}; expected finite "
            "numbers. Replace them."
        )


def _to_integers(array: NDArray[Any]) -> NDArray[Any]:
    """Whole numbers of float type as the smallest integer type that holds them."""
    is_wrong = ~np.isfinite(array) | (np.rint(array) != array) | (np.abs(array) >= 2.0**63)
    if is_wrong.any():
        value = array[np.unravel_index(int(np.argmax(is_wrong)), array.shape)]
        raise DataError(
            f"label value {value} {_first(is_wrong)}; expected whole numbers. "
            "Resample label maps with nearest neighbours, and store them as integers."
        )
    low, high = int(array.min()), int(array.max())
    return array.astype(smallest_type(low, high, COMMON_TYPES), order="K")


def _first(is_wrong: NDArray[np.bool_]) -> str:
    channel, *index = np.unravel_index(int(np.argmax(is_wrong)), is_wrong.shape)
    place = f"at index {tuple(int(i) for i in index)}"
    return place if len(is_wrong) == 1 else f"{place} of channel {channel}"
