"""Networks and losses of the user's own, by name; no file that names one makes volseg import it.

A name is looked up in two places: the entry points of installed packages (groups
``volseg.networks`` and ``volseg.losses``), and what `register` was given in this process. A name of
the form ``module:function`` is imported by `register` alone, which the command line calls with what
the user has typed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from volseg.errors import ConfigError, check_choice

Kind = Literal["networks", "losses"]
Make = Callable[..., Any]

OPTIONS: dict[Kind, str] = {"networks": "--network", "losses": "--loss"}
"""Where the command line takes a name."""

_registered: dict[tuple[Kind, str], Make] = {}


def register(kind: Kind, name: str, make: Make | None = None) -> None:
    """Make a network or a loss of your own known to this process.

    Args:
        kind: ``"networks"`` or ``"losses"``.
        name: what plans and configurations call it.
        make: builds it; by default what `name` says, ``module:function``, is imported.

    Raises:
        ConfigError: there is no such module or function, or it fails when it is imported.
    """
    _registered[kind, name] = _import(kind, name) if make is None else make


def list_own(kind: Kind) -> list[str]:
    """Names that are installed or registered; nothing is imported."""
    registered = [name for known, name in _registered if known == kind]
    return list(dict.fromkeys([*registered, *find_installed(kind)]))


def find_installed(kind: Kind) -> dict[str, EntryPoint]:
    """Entry points of installed packages, by name."""
    return {entry.name: entry for entry in entry_points(group=f"volseg.{kind}")}


def check_name(kind: Kind, what: str, name: str, builtin: Collection[str]) -> None:
    """Refuse a name that stands for nothing, or for code that the user has not spoken for.

    Args:
        kind: ``"networks"`` or ``"losses"``.
        what: what the value is called in the error.
        name: to check.
        builtin: names of volseg's own.

    Raises:
        ConfigError: no such name, or ``module:function`` that is not registered.
    """
    if name in builtin:
        return
    own = list_own(kind)
    if name in own:
        return
    if isinstance(name, str) and ":" in name:
        raise ConfigError(
            f"{what} '{name}' is code of your own, which is never imported because a file names "
            f"it; expected your word. Give it on the command line: {OPTIONS[kind]} {name}"
        )
    check_choice(what, name, [*builtin, *own])


def find(kind: Kind, name: str) -> Make:
    """The function or class that a name stands for, imported if its package is installed.

    Args:
        kind: ``"networks"`` or ``"losses"``.
        name: one of `list_own`.

    Raises:
        ConfigError: it fails when it is imported.
    """
    if (kind, name) in _registered:
        return _registered[kind, name]
    entry = find_installed(kind)[name]
    try:
        make: Make = entry.load()
    except Exception as error:  # Code of others fails in its own ways.
        raise ConfigError(
            f"'{name}' of the installed package {describe(entry)} cannot be imported "
            f"({type(error).__name__}: {error}). Mend or remove that package."
        ) from error
    return make


def is_registered(kind: Kind, name: str) -> bool:
    """Whether the user has spoken for a name in this process."""
    return (kind, name) in _registered


def describe(entry: EntryPoint) -> str:
    """Name and version of the package that an entry point belongs to."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def _import(kind: Kind, name: str) -> Make:
    place, colon, attribute = name.partition(":")
    if not colon or not place or not attribute:
        raise ConfigError(f"{OPTIONS[kind]} {name}; expected module:function, as in my_code:make.")
    try:
        make: Make | None = getattr(importlib.import_module(place), attribute, None)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{OPTIONS[kind]} {name}: Python finds no module '{error.name}'. Install it, or name "
            "its folder: PYTHONPATH=FOLDER volseg ..."
        ) from error
    except Exception as error:  # Code of others fails in its own ways.
        raise ConfigError(
            f"{OPTIONS[kind]} {name} cannot be imported ({type(error).__name__}: {error}). Mend "
            "it; --debug shows where."
        ) from error
    if not callable(make):
        raise ConfigError(
            f"{OPTIONS[kind]} {name}: module '{place}' has no function or class '{attribute}'."
        )
    return make
