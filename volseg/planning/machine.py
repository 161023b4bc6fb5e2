"""What the machine can do, in the two numbers that the time of a training step depends on."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from volseg.config import Record
from volseg.control_groups import find_groups
from volseg.cores import count_cores

# A convolution's forward and backward reach about this share of the matrix-product rate, and a
# voxel of a feature map costs about this many memory passes through norm and activation, on the
# CPUs we measured. Only the estimate of `volseg plan` uses them; a training measures itself.
_CONVOLUTION_SHARE = 0.35
_PASSES_PER_VOXEL = 24
_SHARE_TO_HOLD, _MOST_HOLDERS = 0.5, 1000


class Machine(Record):
    """Speed and memory of the device that trains.

    A step that does ``f`` GFLOP of forward convolutions on ``v`` million feature-map voxels
    takes about ``f * seconds_per_gflop + v * seconds_per_mvoxel`` with its backward pass.
    """

    device: str
    name: str
    memory_gb: float
    seconds_per_gflop: float
    seconds_per_mvoxel: float
    is_measured: bool
    """Whether training steps were timed, or only matrix products and memory passes."""


def memory_gb(root: Path = Path("/")) -> float:
    """Main memory of this machine that a process may use, in GB, by the limits of its cgroups.

    Args:
        root: of the file system that has ``proc`` and ``sys``.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    for group in find_groups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            # A file may be missing, and "max" is no number.
            with contextlib.suppress(OSError, ValueError):
                total = min(total, int((group / name).read_text()) / 1e9)
    return total


def count_holders(bytes_each: float) -> int:
    """How many threads may hold so much at a time in half of the main memory; at least 1."""
    if not hasattr(os, "sysconf"):
        return _MOST_HOLDERS  # Windows does not tell.
    holders = _SHARE_TO_HOLD * 1e9 * memory_gb() / max(1.0, bytes_each)
    return int(min(_MOST_HOLDERS, max(1.0, holders)))


def describe_cpu() -> Machine:
    """Estimate this CPU from a matrix product and a memory pass, in a tenth of a second."""
    matrix = np.random.default_rng(0).standard_normal((768, 768), dtype=np.float32)
    product_s = _best_time(lambda: matrix @ matrix)
    vector = np.zeros(4_000_000, dtype=np.float32)
    pass_s = _best_time(lambda: np.add(vector, 1, out=vector))
    forward_and_backward = 3
    return Machine(
        device="cpu",
        name=f"{count_cores()} CPU cores",
        memory_gb=memory_gb(),
        seconds_per_gflop=forward_and_backward * product_s / (2 * 0.768**3) / _CONVOLUTION_SHARE,
        seconds_per_mvoxel=_PASSES_PER_VOXEL * pass_s / 4,
        is_measured=False,
    )


def _best_time(run: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
