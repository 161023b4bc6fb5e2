"""Cores are those that the process may use, not those of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from makers import write_tree

from volseg.cores import count_cores, count_readers
from volseg.planning.machine import memory_gb


@pytest.fixture(autouse=True)
def _large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


def test_affinity_counts_and_not_the_machine(tmp_path: Path) -> None:
    assert count_cores(tmp_path) == 16


def test_machine_counts_where_there_is_no_affinity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert count_cores(tmp_path) == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert count_cores(tmp_path) == 1


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", 16),
        ("200000 100000", 2),
        ("250000 100000", 3),
        ("20000 100000", 1),
        ("9900000 100000", 16),
        ("", 16),
        ("100000 0", 16),
    ],
)
def test_quota_of_version_2_is_rounded_up(tmp_path: Path, quota: str, expected: int) -> None:
    root = write_tree(tmp_path, "0::/", {"sys/fs/cgroup/cpu.max": quota})
    assert count_cores(root) == expected


def test_least_quota_of_the_own_group_and_those_around_it(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/a.slice/cpu.max": "300000 100000",
        "sys/fs/cgroup/a.slice/job/cpu.max": "max 100000",
        # Of somebody else.
        "sys/fs/cgroup/b.slice/cpu.max": "100000 100000",
    }
    root = write_tree(tmp_path, "0::/a.slice/job", files)
    assert count_cores(root) == 3
    (root / "sys/fs/cgroup/a.slice/job/cpu.max").write_text("50000 25000\n")
    assert count_cores(root) == 2


@pytest.mark.parametrize(("quota", "expected"), [("-1", 16), ("350000", 4)])
def test_quota_of_version_1(tmp_path: Path, quota: str, expected: int) -> None:
    # As in a container: its group has a name outside, but is the topmost that can be seen.
    files = {
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": quota,
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        # Of controllers that are no business of the CPU's time.
        "sys/fs/cgroup/cpu.cfs_quota_us": "100000",
        "sys/fs/cgroup/cpu.cfs_period_us": "100000",
    }
    own = "5:cpuset:/docker/1f\n4:cpu,cpuacct:/docker/1f\n1:name=systemd:/docker/1f"
    assert count_cores(write_tree(tmp_path, own, files)) == expected


def test_own_group_of_version_1(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "600000",
        "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
        # That of the process for memory alone.
        "sys/fs/cgroup/cpu/large/cpu.cfs_quota_us": "100000",
        "sys/fs/cgroup/cpu/large/cpu.cfs_period_us": "100000",
    }
    own = "4:cpuacct,cpu:/job\n3:memory:/large\n0::/"
    assert count_cores(write_tree(tmp_path, own, files)) == 6


@pytest.mark.parametrize(("cores", "readers"), [(1, 1), (8, 8), (64, 8)])
def test_a_large_machine_reads_no_more_files_at_once(
    cores: int, readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("volseg.cores.count_cores", lambda: cores)
    assert count_readers() == readers


@pytest.mark.parametrize(
    ("own", "file"),
    [
        ("0::/slurm/job_7", "sys/fs/cgroup/slurm/job_7/memory.max"),
        ("0::/slurm/job_7", "sys/fs/cgroup/slurm/memory.max"),
        ("5:memory:/job_7", "sys/fs/cgroup/memory/job_7/memory.limit_in_bytes"),
    ],
)
def test_a_training_is_planned_for_the_memory_of_its_job(
    own: str, file: str, tmp_path: Path
) -> None:
    machine_gb = memory_gb(write_tree(tmp_path / "free", own, {}))
    assert memory_gb(write_tree(tmp_path / "job", own, {file: "500000000"})) == 0.5 < machine_gb
