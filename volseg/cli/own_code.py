"""What ``--network`` and ``--loss`` do: code of the user's own is imported because it was typed."""

from __future__ import annotations

from pathlib import Path

from volseg.config import Config, as_override
from volseg.errors import ConfigError
from volseg.extensions import OPTIONS, Kind, register
from volseg.run_folder import RunFolder


def take_code(network: str | None, loss: str | None = None) -> list[str]:
    """Import what was typed as ``module:function``; any other name needs no import.

    Returns:
        The settings of a new training that they stand for.

    Raises:
        ConfigError: there is no such module or function, or it fails when it is imported.
    """
    _allow("networks", network)
    _allow("losses", loss)
    settings = {"network.name": network, "loss.name": loss}
    return [as_override(key, name) for key, name in settings.items() if name is not None]


def take_code_of(model: Path, network: str | None, loss: str | None = None) -> None:
    """Import what a model or a run says it has, now that the user says so too.

    Raises:
        ConfigError: it has another network or loss.
    """
    # Imports torch, which `take_code` alone does not need.
    from volseg.inference.model import read_facts

    if network is not None:
        _check_same("networks", network, read_facts(model).plan.network.name, model)
    for path in RunFolder(model).in_folds("config.yaml") if loss is not None else ():
        _check_same("losses", str(loss), Config.read_yaml(path).loss.name, path)
    _allow("networks", network)
    _allow("losses", loss)


def _allow(kind: Kind, name: str | None) -> None:
    if name is not None and ":" in name:
        register(kind, name)


def _check_same(kind: Kind, typed: str, name: str, path: Path) -> None:
    if typed != name:
        raise ConfigError(
            f"{OPTIONS[kind]} {typed}; {path} says '{name}'. Say that one, or leave it out."
        )
