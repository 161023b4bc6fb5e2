"""What a training did, one JSON line per round: ``history.jsonl``, the source of progress.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from volseg.atomic import explain_full_disk, write_text
from volseg.training.parallel import is_first


class History:
    """Rows of ``history.jsonl``; on resume, rows after the checkpoint's step are dropped.

    The first of several processes alone writes.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        self.path = path
        self.rows = [row for row in _read(path) if row["step"] <= first_step]
        if is_first():
            write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def append(self, row: dict[str, Any]) -> None:
        """Add a row, on disk at once.

        Raises:
            MachineError: the disk is full.
        """
        self.rows.append(row)
        with explain_full_disk(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_step_seconds(path: Path) -> float | None:
    """Of a training so far, its validations included; None before its first round."""
    rows = _read(path)
    return 60 * float(rows[-1]["minutes"]) / int(rows[-1]["step"]) if rows else None


def _read(path: Path) -> list[dict[str, Any]]:
    """Complete lines; a line cut by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
