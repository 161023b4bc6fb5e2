"""How the system hands out memory to a process that needs the same large arrays again and again.

By default glibc gives every large array back to the system when it is freed, and the system clears
the next one page of 4 KB by page: up to a fifth of a training step on a CPU, and more of what a
prediction spends beside the network.
"""

from __future__ import annotations

import ctypes
import os
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


def use_huge_pages() -> None:
    """Have the system give torch's arrays of 2 MB and more in pages of 2 MB, where it has them.

    The first touch of such an array takes a quarter of the time. It holds for the whole process
    and those that it starts, and only if torch has not made an array yet. It is torch's own switch:
    whoever has set it, decides.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
