"""What can go wrong for a user, as exceptions that carry their exit code.

Every message says what was found, the rule, and the next act:
``<what> <got>; expected <rule>. <next act>``. The command line prints it as one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import ClassVar


class VolsegError(Exception):
    """Base of every error that a user can mend; `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class ConfigError(VolsegError, ValueError):
    """Wrong usage, option or configuration value."""

    exit_code = 2


class DataError(VolsegError, ValueError):
    """An image, label or dataset that cannot be used as it is."""

    exit_code = 3


class MachineError(VolsegError, RuntimeError):
    """The machine cannot do it: no such device, out of memory, disk full."""

    exit_code = 4


class FullDiskError(MachineError):
    """The disk is full."""


def check_choice(what: str, value: object, choices: Collection[str]) -> None:
    """Refuse a name that is not known, and offer the nearest one.

    Args:
        what: what the value is called in the error.
        value: a str is right.
        choices: the names that are known.

    Raises:
        ConfigError: `value` is none of `choices`.
    """
    if not isinstance(value, str) or value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        raise ConfigError(f"{what} {value!r}; expected one of {', '.join(choices)}.{hint}")


_NO_MAIN_MEMORY = "can't allocate memory"
_NO_MEMORY = (
    "out of memory",
    _NO_MAIN_MEMORY,
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DEVICE_ALLOCATION_FAILED",
)
"""What CUDA, the CPU's allocator, cuBLAS, cuDNN and cuDNN from its version 9 on say."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, on a GPU or on a CPU."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    return said or isinstance(error, MemoryError)


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Whether it was a GPU's memory that was short."""
    is_main = isinstance(error, MemoryError) or _NO_MAIN_MEMORY in str(error)
    return is_out_of_memory(error) and not is_main


def is_dead_worker(error: BaseException) -> bool:
    """Whether torch says that a loader process died, which it does anywhere in the main thread."""
    is_torchs = isinstance(error, RuntimeError) and not isinstance(error, VolsegError)
    return is_torchs and "DataLoader worker (pid" in str(error)
