"""One training on several processes, which torchrun has started on one machine or on several.

Every process computes its share of each batch, and they add their gradients. The first one plans,
prepares, writes and reports; the others wait for it where they need what it makes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import ignite.distributed as idist
import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # but documented
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from volseg.errors import ConfigError, MachineError
from volseg.networks import OwnNetwork, SegmentationNetwork, inside_slices

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PATIENCE = timedelta(days=30)
"""How long processes wait for what another one makes: caching may take hours."""


@contextmanager
def join(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes, if torchrun has started some, and leave them at the end.

    A process that fails must end: then torchrun ends the others. It cannot join them again.

    Args:
        device: that the user asks for; of several GPUs each process takes its own.

    Yields:
        The device of this process.

    Raises:
        MachineError: more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    is_gpu = device.type == "cuda"
    own = _take_gpu() if is_gpu else device
    store, rank, number = next(rendezvous("env://"))
    store = PrefixStore(agree_on_name(store, rank, number), store)
    # ignite's own start takes a GPU for CPU processes too, and SLURM's numbers before torchrun's.
    distributed.init_process_group(
        "nccl" if is_gpu else "gloo", store=store, rank=rank, world_size=number
    )
    with _hidden("SLURM_JOB_ID"):
        idist.sync()
    if idist.get_rank():
        logging.getLogger("volseg").setLevel(logging.ERROR)
    yield own
    # Not after an error: the others may wait for this process, and NCCL would wait for them.
    idist.finalize()


def agree_on_name(store: Store, rank: int, number: int) -> str:
    """A name for this meeting of the processes, which no earlier one has had.

    torchrun keeps its store when it starts the processes again, with the addresses of those that
    are gone (pytorch issue 135712). So each process asks under a name of its own, and the first one
    answers whatever was asked until all have heard of its own name.

    Args:
        store: that all of them see.
        rank: of this process.
        number: of processes.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"question/{rank}", name)
        answer = store.get(f"answer/{name}").decode()
        store.set(f"{answer}/{rank}", "heard")
        return str(answer)
    waiting = set(range(1, number))
    while waiting:
        for other in waiting:
            if store.check([f"question/{other}"]):
                question = store.get(f"question/{other}").decode()
                store.set(f"answer/{question}", name)
        waiting = {other for other in waiting if not store.check([f"{name}/{other}"])}
        time.sleep(0.02)
    return name


def _take_gpu() -> torch.device:
    number, present = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= present:
        raise MachineError(
            f"process {number + 1} of this machine, which has {present} CUDA devices; expected one "
            "for each. Lower --nproc-per-node, or use --device cpu."
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Leave a variable out of the environment for a while."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


def count_processes() -> int:
    """How many take part; 1 for a training on its own."""
    return int(idist.get_world_size())


def get_rank() -> int:
    """Number of this process, from 0."""
    return int(idist.get_rank())


def is_first() -> bool:
    """Whether this process writes and reports."""
    return get_rank() == 0


def name_job(*request: object) -> str:
    """What is the same whenever torchrun starts the processes of a command again, and only then.

    torchrun's count of restarts does not tell: it stays where machines come or go.

    Args:
        request: what the command asks for, since people may give two commands one id.

    Returns:
        A hash; empty without torchrun.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if name == "none":
        # Its default on machines that are told their number, where torchrun itself stays.
        name = f"{socket.gethostname()} {os.getppid()}"
    return hashlib.sha256(repr((name, request)).encode()).hexdigest() if name else ""


def first_then_others(make: Callable[[], Result]) -> Result:
    """Call `make` in the first process, and in the others when that is done.

    The others find what the first one has written, however long it takes, and it waits for them. If
    it fails it ends, and torchrun ends the others.
    """
    with open_meeting() as meet:
        if is_first():
            result = make()
            meet()
        else:
            meet()
            result = make()
        meet()
        return result


@contextmanager
def open_meeting() -> Iterator[Callable[[], Any]]:
    """Give what waits until all processes have called it, however long some of them take.

    Collectives of a training wait minutes.
    """
    if count_processes() == 1:
        yield lambda: None
        return
    # A group on the CPU, since waiting on a GPU keeps it busy.
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield partial(distributed.barrier, group)
    finally:
        distributed.destroy_process_group(group)


def agree_on(value: float) -> float:
    """The first process's value, in all of them."""
    if count_processes() == 1:
        return value
    said = torch.tensor(value, dtype=torch.float64, device=_meeting_place())
    distributed.broadcast(said, src=0)
    return float(said)


def add_up(values: Tensor) -> Tensor:
    """Sum over the processes, in all of them."""
    if count_processes() == 1:
        return values
    # A copy, since it is added to in place.
    total = values.to(_meeting_place(), copy=True)
    distributed.all_reduce(total)
    return total.to(values.device)


def _meeting_place() -> torch.device:
    """Where tensors of several processes come together: NCCL knows GPUs alone."""
    if distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def check_batch(batch_size: int) -> None:
    """Refuse a batch that the processes cannot share evenly.

    Raises:
        ConfigError: it is no multiple of their number.
    """
    if batch_size % count_processes():
        raise ConfigError(
            f"a batch of {batch_size} for {count_processes()} processes; expected a multiple of "
            "them. Set plan.batch_size, or edit batch_size in the plan.yaml that is there."
        )


def share_gradients(network: SegmentationNetwork, device: torch.device) -> Callable[[Tensor], Any]:
    """The network's forward pass, whose backward pass adds up the gradients of all processes."""
    if count_processes() == 1:
        return network
    ids = [device.index] if device.type == "cuda" else None
    # Volseg's networks use all their weights in every step.
    is_own = isinstance(inside_slices(network), OwnNetwork)
    return DistributedDataParallel(network, device_ids=ids, find_unused_parameters=is_own)
