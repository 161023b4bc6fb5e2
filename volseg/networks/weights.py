"""Checkpoints as plain data: tensors, numbers and text in, a file and its sha256 beside it out.

Nothing in a checkpoint is executed, and a damaged one is refused: torch alone loads a flipped bit
without a word. What a checkpoint holds is left to training and inference.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from volseg.atomic import atomic_path, write_text
from volseg.errors import DataError

_DIGEST_LENGTH = 16


def save_weights(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path` and its sha256 to ``<path>.sha256``.

    The sidecar is written first and names the new file and the one it replaces: whenever the
    writer is killed, the checkpoint that is left is accepted.

    Args:
        path: the checkpoint.
        state: dicts, lists and tuples of tensors, numbers and text.

    Raises:
        TypeError: `state` holds anything else; the checkpoint that was there stays.
        MachineError: the disk is full.
    """
    # Through memory, since torch hides the reason when it cannot write to a disk.
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    hashes = [hashlib.sha256(buffer.getbuffer()).hexdigest()]
    if path.exists() and (previous := hash_file(path)) in _read_hashes(path):
        hashes.append(previous)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        try:
            torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise TypeError(f"{path}: state holds more than tensors, numbers and text.") from error
        write_text(_sidecar(path), "".join(f"{line}\n" for line in hashes))


def load_weights(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read what `save_weights` wrote, onto the CPU.

    Args:
        path: the checkpoint, with its sidecar beside it.
        mapped: leave them in the file until they are used. They must not be kept, since Windows
            replaces no file that is mapped.

    Raises:
        DataError: missing or damaged file, or one that holds more than plain data.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; expected a checkpoint.")
    if hash_file(path) not in _read_hashes(path):
        raise DataError(
            f"{path} does not match {_sidecar(path).name} beside it: one of them is missing or "
            "damaged. Copy both again from their source, or use another checkpoint."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds more than plain data; expected tensors, numbers and text. "
            "It is not loaded: use a checkpoint that volseg wrote."
        ) from error
    except Exception as error:  # What torch raises on a strange file depends on its first bytes.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{path} cannot be loaded: {reason}") from error
    if not isinstance(state, dict):
        raise DataError(f"{path} holds a {type(state).__name__}; expected a checkpoint of volseg.")
    return state


def digest_weights(paths: Sequence[Path]) -> str:
    """A short text that tells these files from any others."""
    hashes = " ".join(hash_file(path) for path in paths)
    return hashlib.sha256(hashes.encode()).hexdigest()[:_DIGEST_LENGTH]


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _read_hashes(path: Path) -> list[str]:
    try:
        return _sidecar(path).read_text(encoding="utf-8", errors="replace").split()
    except FileNotFoundError:
        return []


def hash_file(path: Path) -> str:
    """The sha256 of a file, which is read block by block."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
