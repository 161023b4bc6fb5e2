"""Arrays in files, mapped in microseconds; few files stay open, however many cases there are."""

from __future__ import annotations

import math
import mmap
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

OPEN_FILES = 64
"""Most that stay mapped, and open; some systems allow a process 256."""
SMALL_BYTES = 2**22
"""Larger files are let go at once: patches of them take longer, and they would add up."""


class PlaceInFile:
    """Where the array of a ``.npy`` file lies in it.

    Opening the file takes numpy longer than cutting a small patch from it, mostly to read what the
    file says of itself. That is kept here.
    """

    def __init__(self, path: Path) -> None:
        """Read what the file says of its array, which is in C order.

        Raises:
            OSError: the file cannot be opened.
            ValueError: it holds no array, or less than it says.
        """
        array: Any = np.load(path, mmap_mode="r")
        self.path, self.offset = str(path), array.offset
        self.stamp = path.stat().st_mtime_ns
        self.dtype, self.shape = array.dtype, array.shape

    def map(self) -> NDArray[Any]:
        """The array, read-only.

        Raises:
            OSError: the file cannot be opened any more.
            ValueError, TypeError: it has become shorter.
        """
        is_small = self.dtype.itemsize * math.prod(self.shape) < SMALL_BYTES
        content = (_keep_mapped if is_small else _map)(self.path, self.stamp)
        return np.ndarray(self.shape, self.dtype, content, self.offset)


def _map(path: str, stamp: int) -> mmap.mmap:
    """The file; `stamp` is its time, since another one may come to have its name."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


_keep_mapped = lru_cache(OPEN_FILES)(_map)
