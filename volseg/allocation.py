"""How the C library hands out memory to a process that needs the same large arrays again and again.

By default glibc gives every large array back to the system when it is freed, and the system clears
each page of the next one: up to a fifth of a training step on a CPU.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's ``mallopt``."""
_LARGEST_KEPT = 32 * 2**20
"""The most that glibc takes for its second threshold."""
_MOST_KEPT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep up to 2 GB of freed memory in the process for its next arrays.

    It holds for the whole process and to its end. The results stay the same.

    Returns:
        Whether the C library could be told; only glibc can.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    kept = (mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT), mallopt(_TRIM_THRESHOLD, _MOST_KEPT))
    return all(kept)


def give_back_freed_memory() -> None:
    """Give the system what the process has freed, of which glibc keeps pieces by default.

    Between steps of very different work; other C libraries are left alone.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
