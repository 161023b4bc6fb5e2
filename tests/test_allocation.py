"""Memory is used again without a visit to the system, and comes in large pages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = """
import resource, sys
import numpy as np
from volseg.allocation import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
np.ones(2**22, np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(2**22, np.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_faults(how: str) -> int:
    result = subprocess.run(
        [sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=False
    )
    if result.returncode == 3:
        pytest.skip("the C library is not glibc")
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told")
def test_large_arrays_take_the_same_pages_again() -> None:
    # 20 arrays of 16 MB are 4,096 pages each, unless the first one's pages serve them all.
    assert count_faults("keep") < 4096


HUGE = """
import torch
from volseg.errors import VolsegError
from volseg.inference import Predictor

try:
    Predictor.load("there is no such model")
except VolsegError:
    pass
array = torch.ones(2**24)
rows = open("/proc/self/smaps_rollup").read().splitlines()
print(next(row.split()[1] for row in rows if row.startswith("AnonHugePages:")))
"""
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def count_huge_kb(**variables: str) -> int:
    found = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"} | variables
    command = [sys.executable, "-c", HUGE]
    return int(subprocess.run(command, env=found, capture_output=True, check=True).stdout)


@pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(),
    reason="the system gives huge pages to all or to none",
)
def test_large_tensors_lie_in_huge_pages_unless_the_user_says_no() -> None:
    # An array of 64 MB, of which the system may have had small pages alone for a part.
    assert count_huge_kb() > 32 * 1024
    assert count_huge_kb(THP_MEM_ALLOC_ENABLE="0") < 32 * 1024
