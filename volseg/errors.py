"""What can go wrong for a user, as exceptions that carry their exit code.

Every message says what was found, the rule, and the next act:
``<what> <got>; expected <rule>. <next act>``. The command line prints it as one line.
"""

from __future__ import annotations

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
