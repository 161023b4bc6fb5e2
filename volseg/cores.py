"""How many CPU cores this process may use, in a container fewer than the machine has."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

from volseg.control_groups import find_groups

_QUOTA_AND_PERIOD = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
"""Files of cgroups of version 2, and of version 1."""
_MOST_READERS = 8
"""More cost memory, and gain little from one disk."""


def count_cores(root: Path = Path("/")) -> int:
    """Cores that the process may run on, but no more than its cgroup's quota, rounded up.

    Args:
        root: of the file system that has ``proc`` and ``sys``.

    Returns:
        At least 1.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, _find_quotas(root))]))


def count_readers() -> int:
    """Threads that read files: each holds one, and one disk serves no more than a few."""
    return min(count_cores(), _MOST_READERS)


def count_beside() -> int:
    """How many processes of a training share this machine, with this one, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _find_quotas(root: Path) -> Iterator[float]:
    """Cores that the process's cgroups allow, and those around them, as far as it sees them."""
    for group in find_groups("cpu", root):
        for files in _QUOTA_AND_PERIOD:
            # A file may be missing, and "max" is no number.
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                quota, period = " ".join((group / file).read_text() for file in files).split()
                # Version 1 says -1 where there is none.
                if int(quota) > 0:
                    yield int(quota) / int(period)
