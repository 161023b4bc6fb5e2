"""A side of a benchmark: a process of its own, whose memory is watched and has a limit.

The peak is the larger of two figures: memory of the process and its children, shared pages divided
among them, by samples; and the most that any of them has had, by the system's own account, looked
at so often that little can happen behind the last look. (``ru_maxrss`` of a child begins with the
peak of the process that started it.)
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOOK_S, SAMPLE_S = 0.02, 0.5
"""Between two looks at the system's account, and between two samples, each of which holds the
process up for some milliseconds."""
LONGEST_S = 2 * 3600
"""A pool whose worker was ended for want of memory may wait for ever."""
NO_MEMORY = ("MemoryError", "allocate memory", "Unable to allocate", "bad_alloc", "out of memory")


@dataclass(frozen=True)
class Measured:
    """Of one side and one round."""

    seconds: float
    peak_mb: float


class OutOfMemory(SystemExit):
    """A side takes more memory than it may."""


def run_measured(
    command: Sequence[str], result: Path, log: Path, limit_gb: float = math.inf
) -> Measured:
    """Run a side, which writes its seconds to `result`, and watch its memory.

    Args:
        command: that runs it.
        result: JSON file that it writes.
        log: file to which its output is added.
        limit_gb: most memory of all its processes.

    Raises:
        OutOfMemory: it wanted more, or the system ended it because memory was short.
        SystemExit: it failed otherwise.
    """
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(list(command), stdout=file, stderr=file, start_new_session=True)
        try:
            # Where memory is short the system ends it first.
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
            peak = _watch(process, 1e3 * limit_gb)
        finally:
            # Its children too, which may outlive it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not process.returncode and peak <= 1e3 * limit_gb:
        return Measured(json.loads(result.read_text())["seconds"], peak)
    said = log.read_bytes()[begin:].decode(errors="replace")
    is_ended = peak > 1e3 * limit_gb or process.returncode == -signal.SIGKILL
    if is_ended or any(words in said for words in NO_MEMORY):
        limit = f" of {limit_gb:.3g} GB" if math.isfinite(limit_gb) else ""
        raise OutOfMemory("out of memory" + limit)
    raise SystemExit(f"`{' '.join(command)}` ended with {process.returncode}; see {log}.")


def _watch(process: subprocess.Popen[bytes], limit_mb: float) -> float:
    """Wait for a process, and return its peak in MB; also one above the limit, while it runs.

    Raises:
        SystemExit: it takes too long.
    """
    peak, begin, sampled, family = 0.0, time.monotonic(), -math.inf, [process.pid]
    while process.poll() is None and peak <= limit_mb:
        now = time.monotonic()
        if now - begin > LONGEST_S:
            raise SystemExit(f"did not end within {LONGEST_S // 60} minutes")
        if now - sampled > SAMPLE_S:
            family, sampled = list_family(process.pid), now
            peak = max(peak, sum(map(read_pss_mb, family)))
        peak = max(peak, *map(read_peak_mb, family))
        time.sleep(LOOK_S)
    return peak


def list_family(pid: int) -> list[int]:
    """A process and all that it has started."""
    family = [pid]
    for member in family:
        for path in Path(f"/proc/{member}/task").glob("*/children"):
            try:
                family += [int(child) for child in path.read_text().split()]
            except OSError:
                continue
    return family


def read_pss_mb(pid: int) -> float:
    """Memory of a process, shared pages divided by those that share them."""
    return _read_kb(pid, "smaps_rollup", "Pss:") / 1e3


def read_peak_mb(pid: int) -> float:
    """The most memory that a process has had, shared pages counted in full."""
    return _read_kb(pid, "status", "VmHWM:") / 1e3


def _read_kb(pid: int, file: str, key: str) -> float:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(float(line.split()[1]) for line in lines if line.startswith(key))
