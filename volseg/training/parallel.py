"""One training on several processes, which torchrun has started on one machine or on several.

Every process computes its share of each batch, and they add their gradients. The first one plans,
prepares, writes and reports; the others wait for it where they need what it makes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import ignite.distributed as idist
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from volseg.errors import ConfigError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@contextmanager
def join(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes, if torchrun has started some, and leave them at the end.

    Args:
        device: that the user asks for; of several GPUs each process takes its own.

    Yields:
        The device of this process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    idist.initialize("nccl" if device.type == "cuda" else "gloo")
    if idist.get_rank():
        logging.getLogger("volseg").setLevel(logging.ERROR)
    try:
        yield idist.device() if device.type == "cuda" else device
    finally:
        idist.finalize()


def count_processes() -> int:
    """How many take part; 1 for a training on its own."""
    return int(idist.get_world_size())


def get_rank() -> int:
    """Number of this process, from 0."""
    return int(idist.get_rank())


def is_first() -> bool:
    """Whether this process writes and reports."""
    return get_rank() == 0


def is_restart() -> bool:
    """Whether torchrun has started the processes again after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def first_then_others(make: Callable[[], Result]) -> Result:
    """Call `make` in the first process, and in the others when that is done.

    The others find what the first one has written. If it fails it ends, and torchrun ends the
    others.
    """
    if is_first():
        result = make()
        idist.barrier()
        return result
    idist.barrier()
    return make()


def agree_on(value: float) -> float:
    """The first process's value, in all of them."""
    if count_processes() == 1:
        return value
    said = torch.tensor(value, dtype=torch.float64, device=idist.device())
    return float(idist.broadcast(said, src=0))


def agree_on_mean(value: float) -> float:
    """Mean over the processes, in all of them."""
    return float(add_up(torch.tensor(value, dtype=torch.float64))) / count_processes()


def add_up(values: Tensor) -> Tensor:
    """Sum over the processes, in all of them."""
    if count_processes() == 1:
        return values
    total: Tensor = idist.all_reduce(values.to(idist.device()))
    return total.to(values.device)


def check_batch(batch_size: int) -> None:
    """Refuse a batch that the processes cannot share evenly.

    Raises:
        ConfigError: it is no multiple of their number.
    """
    if batch_size % count_processes():
        raise ConfigError(
            f"a batch of {batch_size} for {count_processes()} processes; expected a multiple of "
            "them. Edit batch_size in plan.yaml, or set plan.batch_size."
        )


def share_gradients(network: nn.Module, device: torch.device) -> Callable[[Tensor], Any]:
    """The network's forward pass, whose backward pass adds up the gradients of all processes."""
    if count_processes() == 1:
        return network
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=ids)
