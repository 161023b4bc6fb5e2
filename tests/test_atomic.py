"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

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
