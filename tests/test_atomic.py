"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Barrier

import pytest

from volseg.atomic import (
    atomic_folder,
    atomic_path,
    is_temporary,
    remove_temporary,
    write_json,
    write_text,
)
from volseg.errors import MachineError


def test_file_is_replaced_only_on_success(tmp_path: Path) -> None:
    target = tmp_path / "a.nii.gz"
    write_text(target, "old")

    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_half()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]


def test_temporary_name_keeps_every_suffix(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "case.1.nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz")
        temporary.write_text("x")


def test_file_that_must_stay_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.json"
    write_json(target, 1, replaces=False)
    with pytest.raises(FileExistsError):
        write_json(target, 2, replaces=False)
    assert target.read_text() == "1\n"
    assert [path.name for path in target.parent.iterdir()] == ["a.json"]


def test_of_many_writers_one_succeeds(tmp_path: Path) -> None:
    target, together = tmp_path / "a.txt", Barrier(8)

    def write(number: int) -> int | None:
        try:
            with atomic_path(target, replaces=False) as temporary:
                temporary.write_text(str(number))
                together.wait(timeout=20)
        except FileExistsError:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        first = [number for number in pool.map(write, range(8)) if number is not None]
    assert first == [int(target.read_text())]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_file_stays_where_there_are_no_hard_links(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: Path) -> None:
        raise OSError(code, "no hard links")

    monkeypatch.setattr("os.link", refuse)
    target = tmp_path / "a.txt"
    write_text(target, "first", replaces=False)
    with pytest.raises(FileExistsError):
        write_text(target, "second", replaces=False)
    assert target.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("writer", [atomic_path, atomic_folder])
def test_full_disk_says_so_of_the_folder_too(
    writer: Callable[[Path], AbstractContextManager[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(MachineError, match=r"no space left while writing .*a\.json"),
        writer(tmp_path / "deep" / "a.json"),
    ):
        pass


def test_full_disk_says_so(tmp_path: Path) -> None:
    with (
        pytest.raises(MachineError, match=r"no space left while writing .*a\.json"),
        atomic_path(tmp_path / "a.json"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "entry") as temporary:
        (temporary / "a").write_text("1")
        assert not (tmp_path / "entry").exists()
    assert (tmp_path / "entry" / "a").read_text() == "1"
    assert len(list(tmp_path.iterdir())) == 1


def test_folder_of_another_process_stays(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "entry") as temporary:
        (temporary / "a").write_text("ours")
        (tmp_path / "entry").mkdir()
        (tmp_path / "entry" / "a").write_text("theirs")
    assert (tmp_path / "entry" / "a").read_text() == "theirs"
    assert len(list(tmp_path.iterdir())) == 1


def test_json_is_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "a.json", {"ä": [1, 2]})
    assert '"ä"' in (tmp_path / "deep" / "a.json").read_text(encoding="utf-8")


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.nii.gz") as file, atomic_folder(tmp_path / "b") as folder:
        file.touch()
    # As if the process had ended in the middle.
    file.touch()
    folder.mkdir()
    (folder / "part").touch()
    assert is_temporary(file)
    assert is_temporary(folder)
    remove_temporary(tmp_path, older_than_s=3600)
    assert file.exists()
    assert folder.exists()
    others = {"a.nii.gz", "b", ".git", "file-0a1b2c3d.txt"}
    (tmp_path / ".git").mkdir()
    (tmp_path / "file-0a1b2c3d.txt").touch()
    remove_temporary(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == others
    remove_temporary(tmp_path / "missing")
