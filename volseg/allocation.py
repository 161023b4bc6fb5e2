"""What a process keeps of memory that it needs no more, and what it gives back to the system.

By default glibc gives every large array back when it is freed, and the system clears each page of
the next one. That is up to a fifth of a training step on a CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's ``mallopt``."""
_PAGE_OUT = 21
"""Linux's ``MADV_PAGEOUT``, which is only a matter of time, unlike ``MADV_DONTNEED``."""
_LARGEST_KEPT = 32 * 2**20
"""The most that glibc takes for its second threshold."""
_MOST_KEPT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep up to 2 GB of freed memory in the process for its next arrays.

    It holds for the whole process, but for what `give_back_freed_memory` takes from it now and
    then. The results stay the same.

    Returns:
        Whether the C library could be told; only glibc can.
    """
    mallopt = _find_function("mallopt")
    if mallopt is None:
        return False
    kept = (mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT), mallopt(_TRIM_THRESHOLD, _MOST_KEPT))
    return all(kept)


def give_back_freed_memory() -> None:
    """Give the system what the process has freed, of which glibc keeps pieces by default.

    Between steps of very different work; other C libraries are left alone.
    """
    trim = _find_function("malloc_trim")
    if trim is not None:
        trim(0)


def give_back_mapped(path: Path) -> None:
    """Have the system take back the pages of a file that the process has mapped and only reads.

    Who needs one again has it from the file, and nothing is lost where something else has come to
    lie at its address meanwhile. Systems other than Linux are left alone.
    """
    advise = _find_function("madvise")
    if advise is None:
        return
    for start, end in _find_mapped(path):
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGE_OUT)


@functools.cache
def _find_function(name: str) -> Any:
    """Of the C library on Linux; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _find_mapped(path: Path) -> Iterator[tuple[int, int]]:
    """Addresses between which a file is mapped and not written."""
    name = os.fsencode(path.resolve()).replace(b"\n", rb"\012")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_bytes().split(b"\n"):
            fields = line.split(maxsplit=5)
            if fields[5:] == [name] and b"w" not in fields[1]:
                start, end = fields[0].split(b"-")
                yield int(start, 16), int(end, 16)
