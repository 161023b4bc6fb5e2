"""A file is read once; whatever may have changed is read again."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from makers import make_dataset, make_plan

from volseg.data import cache
from volseg.data.digests import Digests
from volseg.data.layouts import find_dataset
from volseg.errors import DataError, MachineError

SECOND_NS = 10**9


class Opened:
    """Counts how often files of a folder are opened, by whatever way."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.number = folder, 0
        self._open = io.open
        for module in (builtins, io):
            patch.setattr(module, "open", self)

    def __call__(self, file: Any, *arguments: Any, **named: Any) -> Any:
        is_path = isinstance(file, str | os.PathLike)
        self.number += is_path and Path(os.path.abspath(file)).is_relative_to(self.folder)
        return self._open(file, *arguments, **named)

    def count(self, function: Callable[[], object]) -> int:
        """How many are opened by a function."""
        before = self.number
        function()
        return self.number - before


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock some seconds ahead; files that are written now are so much older by it."""

    def set_clock(seconds: float) -> None:
        now_ns = time.time_ns()
        monkeypatch.setattr(time, "time_ns", lambda: now_ns + round(seconds * SECOND_NS))

    return set_clock


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "a.nii"
    path.parent.mkdir()
    path.write_bytes(b"first")
    return path


@pytest.fixture
def opened(file: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    return Opened(file.parent, monkeypatch)


def find(memory: Path, *files: Path) -> bytes:
    """Digests of files as one start finds them, which remembers."""
    digests = Digests(memory)
    found = b"".join(digests.find(path) for path in files)
    digests.save()
    return found


def digest(content: bytes) -> bytes:
    return hashlib.blake2b(content).digest()


def test_digest_is_that_of_the_content(file: Path, tmp_path: Path) -> None:
    content = bytes(range(256)) * (3 * 2**12 + 1)
    file.write_bytes(content)
    assert find(tmp_path / "m.json", file) == digest(content)


def test_unchanged_file_is_read_once(
    file: Path, opened: Opened, tmp_path: Path, later: Callable[[float], None]
) -> None:
    later(60)
    memory = tmp_path / "cache" / "m.json"
    assert opened.count(lambda: find(memory, file)) == 1
    assert opened.count(lambda: find(memory, file)) == 0
    assert find(memory, file) == digest(b"first")
    # Another start may be given the same file in another way.
    assert opened.count(lambda: find(memory, Path(os.path.relpath(file)))) == 0
    (tmp_path / "data" / "b.nii").write_bytes(b"other")
    assert opened.count(lambda: find(memory, file, tmp_path / "data" / "b.nii")) == 1
    assert opened.count(lambda: find(memory, file, tmp_path / "data" / "b.nii")) == 0


def test_changed_file_of_the_same_size_is_noticed(
    file: Path, tmp_path: Path, later: Callable[[float], None]
) -> None:
    later(60)
    memory = tmp_path / "m.json"
    find(memory, file)
    before = file.stat()
    file.write_bytes(b"other")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + SECOND_NS))
    assert find(memory, file) == digest(b"other")


def test_change_under_an_old_time_stamp_is_noticed(
    file: Path, tmp_path: Path, later: Callable[[float], None]
) -> None:
    """As ``cp -p`` and archives restore them."""
    later(60)
    memory = tmp_path / "m.json"
    find(memory, file)
    before = file.stat()
    # The system's clock of files goes in steps.
    while file.stat().st_ctime_ns == before.st_ctime_ns:
        file.write_bytes(b"other")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert find(memory, file) == digest(b"other")


def test_other_file_under_the_name_is_noticed(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size and time, as what a program writes at once may be."""

    def stat(path: Path, **named: Any) -> SimpleNamespace:
        found = os.stat(path, **named)
        kept = {name: getattr(found, name) for name in ("st_size", "st_mode", "st_ino")}
        return SimpleNamespace(**kept, st_mtime_ns=0, st_ctime_ns=0)

    monkeypatch.setattr(Path, "stat", stat)
    (tmp_path / "twin.nii").write_bytes(b"other")
    link, memory = tmp_path / "link.nii", tmp_path / "m.json"
    link.symlink_to(file)
    assert find(memory, link) == digest(b"first")
    link.unlink()
    link.symlink_to(tmp_path / "twin.nii")
    assert find(memory, link) == digest(b"other")


@pytest.mark.parametrize(("age_s", "reads"), [(0, 1), (1.9, 1), (2.1, 0)])
def test_file_that_has_just_been_changed_is_read_again(
    file: Path,
    opened: Opened,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    age_s: float,
    reads: int,
) -> None:
    """Another change within the steps of a file system's clock would leave the same stamp."""
    changed_ns = max(file.stat().st_mtime_ns, file.stat().st_ctime_ns)
    monkeypatch.setattr(time, "time_ns", lambda: changed_ns + round(age_s * SECOND_NS))
    assert opened.count(lambda: find(tmp_path / "m.json", file)) == 1
    assert opened.count(lambda: find(tmp_path / "m.json", file)) == reads


def test_file_that_changes_while_it_is_read_is_read_again(
    file: Path, tmp_path: Path, later: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    later(60)

    def read_and_change(path: Path) -> bytes:
        found = digest(path.read_bytes())
        path.write_bytes(b"changed")
        return found

    with monkeypatch.context() as patch:
        patch.setattr("volseg.data.digests._hash_file", read_and_change)
        assert find(tmp_path / "m.json", file) == digest(b"first")
    assert find(tmp_path / "m.json", file) == digest(b"changed")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "\x00" * len(text),
        lambda text: "[]",
        lambda text: '{"a": 1}',
        lambda text: '{"a": [1, 2]}',
        lambda text: '{"a": []}',
        lambda text: json.dumps({key: [*row[:-1], "xyz"] for key, row in json.loads(text).items()}),
    ],
)
def test_damaged_memory_is_ignored_and_made_anew(
    file: Path,
    opened: Opened,
    tmp_path: Path,
    later: Callable[[float], None],
    damage: Callable[[str], str],
) -> None:
    later(60)
    memory = tmp_path / "m.json"
    find(memory, file)
    memory.write_text(damage(memory.read_text()))
    assert find(memory, file) == digest(b"first")
    assert opened.count(lambda: find(memory, file)) == 0


def test_memory_that_cannot_be_read_or_written_is_done_without(
    file: Path, tmp_path: Path, later: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    later(60)
    memory = tmp_path / "m.json"
    memory.mkdir()
    assert find(memory, file) == digest(b"first")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def refuse(path: Path, text: str) -> None:
        raise MachineError("no space left")

    monkeypatch.setattr("volseg.data.digests.write_text", refuse)
    assert find(tmp_path / "n.json", file) == digest(b"first")


def test_what_another_start_remembered_stays(
    file: Path, opened: Opened, tmp_path: Path, later: Callable[[float], None]
) -> None:
    other, memory = file.with_name("b.nii"), tmp_path / "m.json"
    other.write_bytes(b"other")
    later(60)
    find(memory, file)
    find(memory, other)
    assert opened.count(lambda: find(memory, file, other)) == 0


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.nii does not exist any more"):
        Digests(tmp_path / "m.json").find(tmp_path / "gone.nii")


def test_second_start_opens_no_file_of_the_dataset(
    tmp_path: Path, later: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = find_dataset(make_dataset(tmp_path / "d", "msd", num_cases=2))
    plan = make_plan()
    later(60)
    opened = Opened(tmp_path / "d", monkeypatch)

    def start() -> list[Path]:
        return [c.folder for c in cache.build_cache(dataset, dataset.cases, plan, tmp_path / "c")]

    # An image and a label of two cases.
    assert opened.count(start) >= 4
    assert opened.count(start) == 0
    first = start()
    shutil.copyfile(dataset.cases[1].images[0], dataset.cases[0].images[0])
    second = start()
    assert (first[0] != second[0], first[1] == second[1]) == (True, True)
    assert opened.count(start) == 0
    (tmp_path / "c" / "digests.json").write_text("{")
    assert opened.count(start) == 4
    assert start() == second
