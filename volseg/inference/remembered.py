"""What was measured of a network on this machine, so that it is not measured again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from volseg._version import __version__
from volseg.atomic import write_json
from volseg.errors import MachineError

logger = logging.getLogger(__name__)


def make_key(device: torch.device, *facts: object) -> str:
    """A key for what is measured on a device of this machine, by this volseg and this torch.

    Args:
        device: where the network is computed.
        facts: what else the result depends on; their `repr` tells them apart.
    """
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else f"{device} {_name_cpu()}"
    machine = (platform.node(), name, torch.get_num_threads())
    every = (machine, __version__, torch.__version__, *facts)
    return hashlib.sha256(repr(every).encode()).hexdigest()


def remember(key: str, measure: Callable[[], float]) -> float:
    """What was measured under a key on this machine, now or earlier."""
    known = recall(key)
    if known is None:
        known = measure()
        keep(key, known)
    return known


def recall(key: str) -> float | None:
    """What was kept under a key; None for nothing."""
    return _read().get(key)


def keep(key: str, value: float) -> None:
    """Keep what was measured, if there is a place for it."""
    try:
        write_json(_find_file(), {**_read(), key: value})
    except (OSError, RuntimeError, MachineError) as error:
        logger.info("the network is measured anew next time (%s)", error)


def _find_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder, "volseg", "backends.json")


def _read() -> dict[str, float]:
    try:
        found = json.loads(_find_file().read_text())
    except (OSError, RuntimeError, ValueError):  # RuntimeError: nobody's home.
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, float)}


def _name_cpu() -> str:
    """The model of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
