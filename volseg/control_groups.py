"""The control groups of this process, by which containers and the jobs of a cluster have limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def find_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Folders of the process's groups and of those around them, as far as it sees them.

    Args:
        controller: what is limited, as ``cpu`` or ``memory``. Version 2 has all of them in one
            folder, version 1 has a folder for each.
        root: of the file system that has ``proc`` and ``sys``.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = top / own.strip("/")
        yield from (path for path in (group, *group.parents) if path.is_relative_to(top))
