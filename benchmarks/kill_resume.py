"""A training that is killed again and again must end as one that was left alone, bit for bit.

``python benchmarks/kill_resume.py OUTPUT --kills 30``

Trains on a small generated dataset, once undisturbed and once under SIGKILL at random moments,
resumed after each. Prints a line per kill and the verdict; exit code 0 if all that a training is
made of is equal: weights, averaged weights, the optimiser's moments, counters and history.

With ``--minutes`` both are the same training up to where its number of steps is final, since the
time until then is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from machine import describe_machine

from volseg.config import load_config, with_length
from volseg.networks.weights import load_weights
from volseg.run_folder import LAST
from volseg.training import train
from volseg.training.budget import Budget

SETTINGS = (
    "plan.width=4",
    "plan.patch=[16, 16, 16]",
    "plan.num_levels=3",
    "training.steps_per_epoch=6",
)
"""A training that runs in seconds."""
MEASURED = ("minutes", "steps_per_second", "waiting", "memory_mb")
"""Of a row of history: what differs from one run to the next."""
EARLY = 0.25
"""Share of the kills that strike at any moment from the start of the process on; the others wait
until it has trained an epoch, since a training killed at its start alone would never end."""


@dataclass(frozen=True)
class Attempt:
    """How a training is begun, resumed, and found again."""

    dataset: Path
    run: Path
    epochs: int | None
    settings: tuple[str, ...] = SETTINGS
    minutes: float | None = None
    device: str = "cpu"

    @property
    def fold(self) -> Path:
        return self.run / "fold_0"

    @property
    def has_begun(self) -> bool:
        return (self.fold / LAST).exists()

    @property
    def is_final(self) -> bool:
        """Whether no time changes the number of steps any more."""
        budget = Budget(1, self.minutes)
        if self.has_begun:
            budget.load_state_dict(load_weights(self.fold / LAST)["training"]["budget"])
        return budget.is_final

    def start(self) -> BaseProcess:
        """Begin, or resume if there is a checkpoint."""
        # Its server has torch imported: a process that is killed at once costs little.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", "volseg.training"])
        process = context.Process(target=self.train)
        process.start()
        return process

    def train(self) -> None:
        """What its process does."""
        if self.has_begun:
            train(self.dataset, self.run, resume=True, device=self.device)
        else:
            config = with_length(load_config(None, self.settings), self.minutes, self.epochs)
            train(self.dataset, self.run, config=config, device=self.device)

    def count_epochs(self) -> int:
        """In the history, where every row is written at once."""
        path = self.fold / "history.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def read_history(self) -> list[dict[str, Any]]:
        """Every row but for what was measured of the machine."""
        lines = (self.fold / "history.jsonl").read_text().splitlines()
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return [{key: row[key] for key in row if key not in MEASURED} for row in rows]

    def read_state(self) -> dict[str, Any]:
        """The last checkpoint but for its time."""
        state = load_weights(self.fold / LAST)
        del state["counters"]["elapsed_s"]
        return state


@dataclass(frozen=True)
class Kill:
    """`seconds` after the start of the process; `epochs` were in the history then."""

    number: int
    is_early: bool
    seconds: float
    epochs: int

    def __str__(self) -> str:
        when = "at any moment" if self.is_early else "after an epoch"
        return f"kill {self.number:3}, {when}: {self.seconds:6.2f} s, epoch {self.epochs}"


def begin_alike(attempt: Attempt, other: Attempt) -> None:
    """Kill a training once its number of steps is final, and copy what that leaves."""
    process = attempt.start()
    while process.exitcode is None and not attempt.is_final:
        time.sleep(0.05)
    process.kill()
    process.join()
    shutil.copytree(attempt.run, other.run)


def finish(attempt: Attempt) -> None:
    """Start the training and leave it alone."""
    _wait_for_end(attempt.start())


def kill_and_resume(
    attempt: Attempt, kills: int, seed: int, report: Callable[[Kill], None]
) -> list[Kill]:
    """Train under so many kills, fewer if the training ends before; then leave it alone."""
    draw, made = random.Random(seed), []
    startup_s = 0.0
    while True:
        process, start = attempt.start(), time.monotonic()
        if len(made) == kills:
            break
        # How long a start takes is known after the first one.
        is_early = startup_s > 0 and draw.random() < EARLY
        if is_early:
            _wait(process, draw.uniform(0, startup_s))
        else:
            _wait_for_epoch(process, attempt)
            startup_s = max(startup_s, time.monotonic() - start)
            # From the middle of a step to the writing of a checkpoint.
            _wait(process, draw.random())
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        seconds = time.monotonic() - start
        made.append(Kill(len(made) + 1, is_early, seconds, attempt.count_epochs()))
        report(made[-1])
    _wait_for_end(process)
    return made


def _wait_for_epoch(process: BaseProcess, attempt: Attempt) -> None:
    before = attempt.count_epochs()
    while process.exitcode is None and attempt.count_epochs() <= before:
        time.sleep(0.01)


def _wait(process: BaseProcess, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.002)


def _wait_for_end(process: BaseProcess) -> None:
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the training ended with code {process.exitcode}")


def find_differences(ours: Any, theirs: Any, name: str = "") -> Iterator[str]:
    """Names of all values that are not the same, bit for bit, in two nested structures."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        for key in ours:
            yield from find_differences(ours[key], theirs[key], f"{name}.{key}".lstrip("."))
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from find_differences(mine, other, f"{name}[{index}]")
    elif isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
            yield name
    elif type(ours) is not type(theirs) or ours != theirs:
        yield name


def compare(killed: Attempt, alone: Attempt) -> list[str]:
    """What differs between two complete trainings, their times left out."""
    return [
        *find_differences(killed.read_state(), alone.read_state(), "checkpoint"),
        *find_differences(killed.read_history(), alone.read_history(), "history"),
    ]


def make_dataset(folder: Path, num_cases: int = 5) -> Path:
    """Bright balls in noise as pairs of NIfTI files."""
    shape = (20, 18, 14)
    for number in range(num_cases):
        random_numbers = np.random.default_rng(number)
        centre = random_numbers.uniform(6, np.array(shape) - 6)[:, None, None, None]
        label = (((np.indices(shape) - centre) ** 2).sum(0) < 16).astype(np.uint8)
        image = random_numbers.normal(size=shape).astype(np.float32) + 3 * label
        for kind, array in (("images", image), ("labels", label)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            file = nibabel.Nifti1Image(array, np.eye(4))
            nibabel.save(file, folder / kind / f"case_{number}.nii.gz")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="new folder")
    parser.add_argument("--kills", type=int, default=30)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="by default 8 per kill")
    length.add_argument("--minutes", type=float, help="instead of epochs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--device", default="cpu", help="of the trainings")
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists; choose a new folder")
    machine = describe_machine(torch.device(arguments.device).type)
    print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n")
    dataset = make_dataset(arguments.output / "dataset")
    epochs = None if arguments.minutes else arguments.epochs or 8 * arguments.kills
    alone, killed = (
        Attempt(
            dataset,
            arguments.output / name,
            epochs,
            minutes=arguments.minutes,
            device=arguments.device,
        )
        for name in ("alone", "killed")
    )
    if arguments.minutes:
        begin_alike(killed, alone)
    finish(alone)
    print(f"undisturbed: {alone.count_epochs()} rows of history", flush=True)
    made = kill_and_resume(
        killed, arguments.kills, arguments.seed, lambda kill: print(kill, flush=True)
    )
    different = compare(killed, alone)
    left_over = [path for path in killed.run.rglob(".*") if path.is_file()]
    print(f"unfinished files that were left lying: {len(left_over)}")
    print(f"{len(made)} kills of {arguments.kills}; different: {', '.join(different) or 'nothing'}")
    if different or len(made) < arguments.kills:
        raise SystemExit("verdict: FAILED")
    print("verdict: the same, bit for bit")


if __name__ == "__main__":
    main()
