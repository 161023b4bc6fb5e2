"""Digests of files, remembered by size and time stamps, so that a file is read once.

The memory spares reading and no more: without it, or where it is damaged, files are read again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path

from volseg.atomic import write_text
from volseg.errors import DataError, MachineError

_RACY_NS = 2_000_000_000
"""The coarsest time stamps (FAT's) go in steps of it: another change may leave the same one."""
_BLOCK_BYTES = 2**20

logger = logging.getLogger(__name__)

_Stamp = tuple[int, ...]
"""Size, time of the last change of content and of anything at all, inode."""


class Digests:
    """Digests by path; several threads may ask at once, and several processes keep one memory.

    Whichever process saves last is remembered.
    """

    def __init__(self, memory: Path) -> None:
        """Take up what is remembered.

        Args:
            memory: a JSON file, which may be missing.
        """
        self.memory = memory
        self._known = _read_memory(memory)
        self._has_news = False

    def find(self, path: Path) -> bytes:
        """blake2b of the content of a file, which is read if it may have changed.

        Raises:
            DataError: there is no such file.
        """
        name = os.path.abspath(path)
        try:
            stamp, now_ns = _read_stamp(path), time.time_ns()
            remembered, digest = self._known.get(name, ((), b""))
            if remembered == stamp:
                return digest
            digest = _hash_file(path)
        except FileNotFoundError:
            raise DataError(f"{path} does not exist any more; the dataset changed.") from None
        # Any later change, even while the file was read, then leaves another stamp.
        if now_ns - max(stamp[1:3]) >= _RACY_NS:
            self._known[name] = stamp, digest
            self._has_news = True
        return digest

    def save(self) -> None:
        """Remember them for the next start, if the disk allows."""
        if not self._has_news:
            return
        rows = {name: [*stamp, digest.hex()] for name, (stamp, digest) in self._known.items()}
        try:
            write_text(self.memory, json.dumps(rows, indent=0, ensure_ascii=False) + "\n")
        except (OSError, MachineError) as error:
            logger.info("the dataset's files are read again next time (%s)", error)
        self._has_news = False


def _read_memory(path: Path) -> dict[str, tuple[_Stamp, bytes]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: (tuple(stamp), bytes.fromhex(digest)) for name, (*stamp, digest) in rows.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        # Missing, damaged, or another program's.
        return {}


def _read_stamp(path: Path) -> _Stamp:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _hash_file(path: Path) -> bytes:
    digest = hashlib.blake2b()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.digest()
