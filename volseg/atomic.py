"""Files that appear whole or not at all, whatever interrupts the writer."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from volseg.errors import FullDiskError

_TEMPORARY = re.compile(r"\..+-[0-9a-f]{8}(\.|$)")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], replaces: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it is moved onto `path`.

    The temporary name keeps every suffix (``.nii.gz``), since writers choose the format by it.

    Args:
        path: the final file. Its folder is created.
        replaces: whether a file that is there is replaced; else it stays, whoever wrote it and
            however late.

    Raises:
        FileExistsError: there is a file, which must stay.
        FullDiskError: there is no room.
    """
    path = Path(path)
    with explain_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    stem, *suffixes = path.name.split(".")
    temporary = path.with_name(".".join([f".{stem}-{uuid.uuid4().hex[:8]}", *suffixes]))
    try:
        with explain_full_disk(path):
            yield temporary
            _sync(temporary)
            if replaces:
                os.replace(temporary, path)
            else:
                _link_new(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it is renamed to `path`.

    If another process made `path` meanwhile, its folder stays and ours is dropped.

    Raises:
        FullDiskError: there is no room.
    """
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    with explain_full_disk(path):
        temporary.mkdir(parents=True)
    try:
        with explain_full_disk(path):
            yield temporary
            for file in temporary.iterdir():
                _sync(file)
            with contextlib.suppress(FileExistsError):
                _rename_new(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_temporary(path: Path) -> bool:
    """Whether a name is that of a file or folder on its way to its place."""
    return _TEMPORARY.match(path.name) is not None


def remove_temporary(folder: Path, older_than_s: float = 0.0) -> None:
    """Remove what writers that were killed have left in a folder.

    Args:
        folder: it may be missing.
        older_than_s: leave alone what was changed since; it may still be written.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if not is_temporary(path):
            continue
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= older_than_s:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _link_new(temporary: Path, path: Path) -> None:
    """Give the file its name, which fails where the name is taken: of two writers one succeeds."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        # No hard links there, as on exFAT; two writers may both succeed within microseconds.
        if path.exists():
            raise FileExistsError(path) from error
        os.replace(temporary, path)


def _rename_new(temporary: Path, path: Path) -> None:
    try:
        os.rename(temporary, path)
    except OSError as error:
        # POSIX names a filled target "not empty"; Windows names it "exists".
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(path) from error
        raise


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn the error of a full disk into one that names the file that was to be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FullDiskError(
                f"no space left while writing {path}; what was there stays. Free some space."
            ) from error
        raise


def write_text(path: str | os.PathLike[str], text: str, replaces: bool = True) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all; see `atomic_path`."""
    with atomic_path(path, replaces) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any, replaces: bool = True) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all; see `atomic_path`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", replaces)
