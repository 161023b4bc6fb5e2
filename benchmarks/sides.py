"""A side of a benchmark: a process of its own, whose memory is watched and has a limit.

The peak is the larger of two figures: memory of the process and its children, shared pages divided
among them, by samples; and the most that the process alone has had, by the system's own account.
(``ru_maxrss`` of a child begins with the peak of the process that started it.)
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 0.5
"""Between two looks at memory, each of which holds the process up for some milliseconds."""
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
        limit_gb: memory of its own that each of its processes can get, and all of them together.

    Raises:
        OutOfMemory: it wanted more, or the system ended it because memory was short.
        SystemExit: it failed otherwise.
    """
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(list(command), stdout=file, stderr=file, start_new_session=True)
        try:
            _limit(process.pid, limit_gb)
            peak = _watch(process, 1e3 * limit_gb)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if not process.returncode:
        return Measured(json.loads(result.read_text())["seconds"], peak)
    said = log.read_bytes()[begin:].decode(errors="replace")
    if process.returncode == -signal.SIGKILL or any(words in said for words in NO_MEMORY):
        limit = f" of {limit_gb:.3g} GB" if math.isfinite(limit_gb) else ""
        raise OutOfMemory("out of memory" + limit)
    raise SystemExit(f"`{' '.join(command)}` ended with {process.returncode}; see {log}.")


def _limit(pid: int, limit_gb: float) -> None:
    """Refuse a process more memory, and let the system end it first where memory is short."""
    if math.isfinite(limit_gb):
        most = int(1e9 * limit_gb)
        resource.prlimit(pid, resource.RLIMIT_DATA, (most, most))
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def _watch(process: subprocess.Popen[bytes], limit_mb: float) -> float:
    """Wait for a process, and return its peak in MB; also one above the limit, while it runs."""
    peak = 0.0
    while process.poll() is None and peak <= limit_mb:
        together = sum(read_pss_mb(pid) for pid in list_family(process.pid))
        peak = max(peak, together, read_peak_mb(process.pid))
        time.sleep(SAMPLE_S)
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
