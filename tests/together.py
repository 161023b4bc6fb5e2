"""Two processes on this machine, as torchrun starts them, but of a server with all imports done."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from known_speed import know_speed
from torch import distributed, nn

import volseg
from volseg import extensions
from volseg.config import Config
from volseg.training import parallel


def run_by_two(function: Callable[..., Any], *arguments: Any, **environment: str) -> list[int]:
    """Call a function of this module in two processes at once.

    Args:
        function: must be importable by another process.
        arguments: of the function.
        environment: further variables of both.

    Returns:
        Exit codes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["volseg.training", "ignite.distributed"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    processes = [
        context.Process(
            target=_run, args=(function, arguments, {**shared, "RANK": rank, "LOCAL_RANK": rank})
        )
        for rank in "01"
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        process.kill()
        process.join()
    return [int(process.exitcode or 0) for process in processes]


def _run(
    function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    know_speed(patch)
    if environment["RANK"] != "0":
        patch.setattr("volseg.training.setting.measure_machine", _refuse)
    function(*arguments)


def train(dataset: Path, run: Path, config: Config, epochs: int) -> None:
    volseg.train(dataset, run, config=config, epochs=epochs, device="cpu")


def make_two_heads(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """A network with a head that is never used."""
    return TwoHeads(in_channels, out_channels)


class TwoHeads(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv3d(in_channels, out_channels, 3, 1, 1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


def train_two_heads(dataset: Path, run: Path, config: Config) -> None:
    extensions.register("networks", config.network.name)
    train(dataset, run, config, epochs=1)


def meet_beside_a_gpu(folder: Path) -> None:
    """Processes on the CPU of a machine that has a GPU, under SLURM, with an impatient group."""
    rank = os.environ["RANK"]
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "set_device", _refuse)
    patch.setattr(torch.cuda, "current_device", _refuse)
    impatient = partial(distributed.init_process_group, timeout=timedelta(seconds=1))
    patch.setattr(distributed, "init_process_group", impatient)

    def prepare() -> str:
        if rank == "0":
            time.sleep(2)
            (folder / "prepared").write_text("by the first")
        return (folder / "prepared").read_text()

    with parallel.join(torch.device("cpu")) as device:
        assert device == torch.device("cpu")
        assert (str(parallel.get_rank()), parallel.count_processes()) == (rank, 2)
        assert parallel.first_then_others(prepare) == "by the first"
        assert parallel.agree_on(float(rank)) == 0
        values = torch.tensor([1, 10 + int(rank)])
        assert parallel.add_up(values).tolist() == [2, 21]
        assert values.tolist() == [1, 10 + int(rank)]
    assert os.environ["LOCAL_RANK"] == rank
    assert os.environ["SLURM_JOB_ID"] == "7"


def _refuse(*arguments: Any) -> None:
    raise AssertionError("not for this process")
