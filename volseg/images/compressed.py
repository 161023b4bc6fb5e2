"""Bytes of voxels in plain or gzipped files: complete and verified, or refused.

Used by the formats whose voxels lie behind a header in file axis order (NIfTI, MGH). gzip goes
through ISA-L where its package is installed, several times faster than the standard library.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from volseg.errors import DataError

GzipFile: Any
InflateError: Any
try:
    from isal import igzip, isal_zlib
except ImportError:  # ISA-L has no build for this machine
    GzipFile, InflateError = gzip.GzipFile, zlib.error
else:
    GzipFile, InflateError = igzip.IGzipFile, isal_zlib.error

GZIP_MAGIC = b"\x1f\x8b"

_COMPRESSION_LEVEL = 3
_MAX_EXPANSION = 1032
"""Deflate codes at most 258 bytes in 2 bits, so no gzip file holds more than this per byte."""
_CHUNK = 1 << 24


def is_gzipped(path: Path) -> bool:
    """Whether the content is gzip, whatever the name says."""
    with open(path, "rb") as file:
        return file.read(2) == GZIP_MAGIC


@contextmanager
def open_inflated(path: Path) -> Iterator[IO[bytes]]:
    """Open for reading, inflated if the content is gzip.

    Raises:
        DataError: the gzip stream is damaged or ends too early.
    """
    opener = GzipFile if is_gzipped(path) else open
    try:
        with opener(path, "rb") as stream:
            yield cast(IO[bytes], stream)
    except EOFError as error:
        raise DataError(
            "the gzip stream ends too early: truncated. Copy the file again."
        ) from error
    except (InflateError, OSError) as error:
        if opener is open:
            raise
        raise DataError(f"the gzip stream is damaged ({error}). Copy the file again.") from error


@contextmanager
def create_gzip(path: Path) -> Iterator[IO[bytes]]:
    """Create a gzip file; equal content gives equal bytes (no name, no time in its header)."""
    with (
        open(path, "wb") as file,
        GzipFile("", "wb", compresslevel=_COMPRESSION_LEVEL, fileobj=file, mtime=0) as stream,
    ):
        yield cast(IO[bytes], stream)


def read_voxels(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Read an array that is stored first axis fastest, and verify the checksum of gzip files.

    Args:
        path: plain or gzipped file.
        offset: bytes before the array, after inflation.
        shape: of the array.
        dtype: as stored, of any byte order.

    Returns:
        Writable array in native byte order, first axis fastest.

    Raises:
        DataError: the file holds fewer bytes, or is damaged.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    expansion = _MAX_EXPANSION if is_gzipped(path) else 1
    available = max(path.stat().st_size * expansion - offset, 0)
    # Before memory is taken: a damaged header may declare terabytes.
    if num_bytes > available:
        found = f"{available} bytes" if expansion == 1 else f"at most {available} bytes"
        raise _truncated(num_bytes, found)
    buffer = np.empty(num_bytes, np.uint8)
    with open_inflated(path) as stream:
        stream.seek(offset)
        _fill(stream, buffer)
    array = buffer.view(dtype).reshape(shape, order="F")
    if dtype.isnative:
        return array
    return array.byteswap(inplace=True).view(dtype.newbyteorder("="))


def _fill(stream: IO[bytes], buffer: NDArray[np.uint8]) -> None:
    view = buffer.data
    filled = 0
    try:
        while filled < len(buffer):
            chunk = stream.read(min(_CHUNK, len(buffer) - filled))
            if not chunk:
                break
            view[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        while filled == len(buffer) and stream.read(_CHUNK):
            pass  # gzip verifies its checksum when the end is reached
    except EOFError:
        if filled == len(buffer):
            raise
    if filled < len(buffer):
        raise _truncated(len(buffer), f"{filled} bytes")


def _truncated(expected: int, found: str) -> DataError:
    return DataError(
        f"truncated: {found} of voxels; expected {expected} by the header. Copy the file again."
    )
