"""Freed memory is used again without a visit to the system."""

from __future__ import annotations

import subprocess
import sys

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
