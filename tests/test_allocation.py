"""Freed memory is used again without a visit to the system."""

from __future__ import annotations

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


TRIM = """
from volseg.allocation import give_back_freed_memory
from volseg.inference.memory import resident_bytes

pieces = [bytearray(60_000) for _ in range(2000)]
# The heap does not end with what is freed.
last = bytearray(60_000)
del pieces
before = resident_bytes()
give_back_freed_memory()
print(before - resident_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told")
def test_what_is_freed_in_pieces_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", TRIM], capture_output=True, text=True, check=True)
    # 2,000 pieces of 60 kB.
    assert float(done.stdout) > 0.9 * 1.2e8


MAPPED = """
import ctypes, mmap, os, subprocess, sys
from pathlib import Path
from volseg.allocation import give_back_mapped
from volseg.inference.memory import resident_bytes

path = Path(sys.argv[1])
with path.open("rb") as file:
    # Only what is on the disk can be taken back.
    os.fsync(file.fileno())
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
total = sum(mapped[::4096])
before = resident_bytes()
give_back_mapped(path)
print(before - resident_bytes(), total, sum(mapped[::4096]))
# Where a disk is the memory, or the kernel is older than 5.4, nothing can be taken back.
page = ctypes.c_char.from_buffer(mmap.mmap(-1, 4096))
address = ctypes.addressof(page)
files = subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True).stdout
can = not ctypes.CDLL(None).madvise(ctypes.c_void_p(address), 4096, 21)
print(int(can and files.strip() != "tmpfs"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells where files are mapped")
def test_pages_of_a_mapped_file_are_given_back_and_come_again(tmp_path: Path) -> None:
    # By another name than the system knows it by, which has what separates fields and lines.
    file, link = tmp_path / "the\nweights\x0b.bin", tmp_path / "link.bin"
    file.write_bytes(bytes([3]) * 2**25)
    link.symlink_to(file)
    done = subprocess.run(
        [sys.executable, "-c", MAPPED, str(link)], capture_output=True, text=True, check=True
    )
    given, first, again, can = map(float, done.stdout.split())
    assert given > 0.9 * 2**25 or not can
    # One byte of each of the 8,192 pages.
    assert first == again == 3 * 8192
