"""What ``dataset.json`` files and datalists declare: labels, channels and paths, each checked."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from volseg.data.cases import Classes
from volseg.data.layouts.classes import make_classes
from volseg.errors import DataError


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}. Correct the file.") from error


def read_description(folder: Path) -> dict[str, Any]:
    """Read ``dataset.json`` in `folder`; empty if there is none."""
    path = folder / "dataset.json"
    if not path.is_file():
        return {}
    description = read_json(path)
    if not isinstance(description, dict):
        raise DataError(f"{path} holds no JSON object; expected keys such as training and labels.")
    return description


def parse_labels(labels: Any, source: Path) -> Classes:
    """Classes from ``{"0": "background", "1": "liver"}``.

    Raises:
        DataError: another form.
    """
    rule = '{"0": "background", "1": "liver"}'
    if not isinstance(labels, Mapping):
        raise DataError(f"{source}: labels {labels!r}; expected names by value, as in {rule}.")
    try:
        names = {int(value): str(name) for value, name in labels.items()}
    except ValueError as error:
        raise DataError(
            f"{source}: labels have a key that is not an integer; expected {rule}. Correct it."
        ) from error
    return make_classes(names, source)


def parse_channels(channels: Any, source: Path) -> tuple[str, ...]:
    """Channel names in order from ``{"0": "T1", "1": "FLAIR"}`` or ``["T1", "FLAIR"]``.

    Raises:
        DataError: another form, or no channel.
    """
    if isinstance(channels, list):
        channels = dict(enumerate(channels))
    expected = [str(number) for number in range(len(channels or ()))]
    if (
        not isinstance(channels, Mapping)
        or not channels
        or sorted(map(str, channels)) != sorted(expected)
    ):
        raise DataError(
            f"{source}: channels {channels!r}; expected names by number from 0, "
            'as in {"0": "T1", "1": "FLAIR"}. Correct them.'
        )
    names = {str(number): str(name) for number, name in channels.items()}
    return tuple(names[number] for number in expected)


def locate_inside(root: Path, listed: Any, source: str) -> Path:
    """The file that `source` lists, which must lie in the dataset's folder.

    Args:
        root: folder of the dataset.
        listed: path relative to `root`.
        source: where it is listed, for messages.

    Raises:
        DataError: not a relative path, or one that leaves `root`.
    """
    if not isinstance(listed, str) or not listed:
        raise DataError(f"{source}: {listed!r}; expected the path of an image. Correct the list.")
    normal = posixpath.normpath(listed.replace("\\", "/"))
    # A drive or a leading slash on any system: a shared dataset.json must not reach elsewhere.
    if PureWindowsPath(normal).anchor or normal.startswith("../") or normal == "..":
        raise DataError(
            f"{source}: '{listed}' is outside the dataset; expected a path inside {root}. "
            "Correct the list."
        )
    return root / normal
