"""Loader processes that fail or are killed, as the processes that they are."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from conftest import TINY
from makers import keep, make_dataset, make_plan

import volseg
from volseg.config import load_config
from volseg.data.augmentation import Cut
from volseg.data.cache import CachedCase, build_cache
from volseg.data.layouts import find_dataset
from volseg.data.patches import Batches, PatchDataset, make_loader
from volseg.errors import DataError, MachineError

if not hasattr(signal, "SIGALRM"):
    pytest.skip("needs the signals of POSIX", allow_module_level=True)

LIMIT_S = 60
"""What hangs fails then."""
PLAN = make_plan()


@pytest.fixture(autouse=True)
def _never_hangs() -> Iterator[None]:
    def stop(signal_number: int, frame: object) -> NoReturn:
        raise TimeoutError(f"no end after {LIMIT_S} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def cases(tmp_path: Path) -> list[CachedCase]:
    dataset = find_dataset(make_dataset(tmp_path / "data", "msd", num_cases=2))
    return build_cache(dataset, dataset.cases, PLAN, tmp_path / "cache")


class EndingAtStepOne(PatchDataset):
    """Whose second batch is the end of the process that makes it."""

    def __getitem__(self, number: int) -> Cut:
        if number == self.batch_size:
            # So long that the training is waiting for it.
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)


class ChangingNothingAtStepOne(PatchDataset):
    """Whose second batch has a patch without voxels, which no change can be made of."""

    def __getitem__(self, number: int) -> Cut:
        cut = super().__getitem__(number)
        if number < self.batch_size:
            return cut
        noisy = replace(cut.changes, noise=1.0, contrast=(2.0,))
        return cut._replace(image=cut.image[:, :0], changes=noisy)


def load(patches: type[PatchDataset], cases: list[CachedCase], workers: int) -> Batches:
    dataset = patches(cases, PLAN.patch, batch_size=2, foreground=1, augment=keep, seed=0)
    return make_loader(dataset, 0, workers, torch.device("cpu"))


DEATH = r"^a loader process ended \((?!a loader).+\); .* --set training\.workers=0"


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_loader_process_ends_the_batches(cases: list[CachedCase], workers: int) -> None:
    batches = iter(load(EndingAtStepOne, cases, workers))
    next(batches)
    with pytest.raises(MachineError, match=DEATH):
        next(batches)


def test_error_in_a_loader_process_names_the_case(cases: list[CachedCase]) -> None:
    batches = iter(load(ChangingNothingAtStepOne, cases, workers=1))
    next(batches)
    with pytest.raises(
        DataError, match=r"^case case_0[01]: its patch could not be changed [^\n]+$"
    ):
        next(batches)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), EOFError()])
def test_process_that_ends_while_it_hands_over_a_batch_is_told_once(error: Exception) -> None:
    def hear(signal_number: int, frame: object) -> NoReturn:
        raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")

    def give() -> Iterator[object]:
        # As torch hears of it, from the system and later.
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        raise error
        yield

    signal.signal(signal.SIGALRM, hear)
    with pytest.raises(MachineError, match=DEATH):
        next(iter(Batches(give(), tuple)))
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_killed_loader_process_ends_a_training_that_waits(balls: Path, tmp_path: Path) -> None:
    history = tmp_path / "run" / "fold_0" / "history.jsonl"

    def kill() -> None:
        while not (history.exists() and history.stat().st_size):
            time.sleep(0.01)
        (process,) = multiprocessing.active_children()
        # What it has prepared is soon used up.
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(1)
        process.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    config = load_config(None, [*TINY, "training.workers=1"])
    with pytest.raises(MachineError, match=DEATH):
        volseg.train(balls, tmp_path / "run", config=config, epochs=100_000, device="cpu")
    killer.join()


def test_ctrl_c_reaches_the_training_alone(cases: list[CachedCase]) -> None:
    batches = load(PatchDataset, cases, workers=1)
    iterator = iter(batches.loader)
    next(iterator)
    (worker,) = iterator._workers
    os.kill(worker.pid, signal.SIGINT)
    for _ in range(5):
        next(iterator)
    assert worker.is_alive()
