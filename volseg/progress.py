"""Progress of long work: a bar when a person watches, nothing when the output is a file."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

Update = Callable[..., None]


@contextlib.contextmanager
def show_progress(title: str) -> Iterator[Update]:
    """Yield ``update(done, total, note="")``, which draws the bar on standard error."""
    # torchrun's processes share the terminal; the first one reports.
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield lambda done, total, note="": None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, note="")
        yield lambda done, total, note="": bar.update(task, completed=done, total=total, note=note)
