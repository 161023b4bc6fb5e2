"""What was measured of a network on this machine, so that it is not measured again."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import platform
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from volseg._version import __version__
from volseg.atomic import write_json
from volseg.errors import MachineError
from volseg.networks import OwnNetwork, SegmentationNetwork

logger = logging.getLogger(__name__)

_PLAIN = (bool, int, float, str, tuple, type(None))


def make_key(device: torch.device, *facts: object) -> str:
    """A key for what is measured on a device of this machine, by this volseg and this torch.

    Args:
        device: where the network is computed.
        facts: what else the result depends on; their `repr` tells them apart.
    """
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else f"{device} {_name_cpu()}"
    driver = (torch.version.cuda, torch.backends.cudnn.version()) if is_gpu else ()  # type: ignore[no-untyped-call]
    machine = (platform.node(), name, driver, torch.get_num_threads())
    every = (machine, __version__, torch.__version__, *facts)
    return hashlib.sha256(repr(every).encode()).hexdigest()


def describe_network(network: nn.Module) -> str:
    """What tells a network from others, but for its weights: all that its modules are made of.

    What computes an own network may be changed under the same name, so that its code counts too.
    """
    try:
        codes = sorted(inspect.getsource(kind) for kind in _find_own(network))
    except (OSError, TypeError):
        # Nobody knows, so that nothing is found again.
        codes = [uuid.uuid4().hex]
    options = [
        {key: value for key, value in vars(module).items() if isinstance(value, _PLAIN)}
        for module in network.modules()
    ]
    sizes = [(name, tuple(value.shape)) for name, value in network.state_dict().items()]
    return repr((network, options, sizes, codes))


def make_network_key(network: nn.Module, *facts: object) -> str | None:
    """A key for what is made of a network with its weights, on any machine.

    Weights count by their values, volseg's networks and what follows them by their code, so that
    nothing that was made of others is ever found under it.

    Args:
        network: its values are read.
        facts: what else the result depends on; their `repr` tells them apart.

    Returns:
        None for an own network, or one that was changed by hooks: what its code depends on nobody
        knows. None also if its values cannot be read.
    """
    if _CODE is None or not is_known(network):
        return None
    digest = hashlib.sha256(repr((_CODE, __version__, torch.__version__, *facts)).encode())
    digest.update(describe_network(network).encode())
    try:
        for name, values in (*network.named_parameters(), *network.named_buffers()):
            digest.update(repr((name, values.dtype, tuple(values.shape))).encode())
            array = values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            digest.update(array.tobytes())
    except (RuntimeError, TypeError) as error:
        logger.debug("no key for the network (%s)", error)
        return None
    return digest.hexdigest()


def is_known(network: nn.Module) -> bool:
    """Whether nothing but the code of volseg and torch computes a network."""
    return not (_find_own(network) or any(map(_is_changed, network.modules())))


def _hash_code() -> str | None:
    """Of volseg's networks and what is made of them; None where the files cannot be read."""
    digest = hashlib.sha256()
    try:
        networks = sorted(Path(inspect.getfile(SegmentationNetwork)).parent.glob("[!.]*.py"))
        for path in (*networks, Path(__file__).with_name("backends.py")):
            digest.update(path.read_bytes())
    except (OSError, TypeError):
        return None
    return digest.hexdigest() if networks else None


_CODE = _hash_code()


def _is_changed(module: nn.Module) -> bool:
    """Whether something else computes than the code of its class."""
    return (
        isinstance(module, OwnNetwork)
        or "forward" in vars(module)
        or bool(module._forward_hooks or module._forward_pre_hooks)
    )


def _find_own(network: nn.Module) -> set[type[nn.Module]]:
    """Classes of modules that are neither torch's nor volseg's."""
    kinds = {type(module) for module in network.modules()}
    return {kind for kind in kinds if kind.__module__.partition(".")[0] not in ("torch", "volseg")}


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


def make_folder(key: str) -> Path | None:
    """Where files that belong to a key are kept; None if there is no place for them."""
    try:
        folder = _find_file().parent / key
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: nobody's home.
        return None
    return folder


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
