"""Arrays in files, mapped anew at each use in microseconds, so that no file stays open."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray


class MappedArray:
    """Where an array lies in its file.

    Opening a ``.npy`` file takes numpy longer than cutting a small patch from it, mostly to read
    what the file says of itself. That is kept here.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        """Take the place from an array that numpy has mapped, in C order, or from rows of one."""
        whole: Any = array
        while isinstance(whole.base, np.memmap):
            whole = whole.base
        self.path = str(whole.filename)
        # A part of an array still says the offset of the whole.
        self.offset = whole.offset + array.ctypes.data - whole.ctypes.data
        self.dtype, self.shape = array.dtype, array.shape

    def open(self) -> NDArray[Any]:
        """The array, read-only; its file is let go with it.

        Raises:
            OSError: the file cannot be opened any more.
            ValueError, TypeError: it has become shorter.
        """
        with open(self.path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.ndarray(self.shape, self.dtype, content, self.offset)
