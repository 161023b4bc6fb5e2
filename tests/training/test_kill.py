"""A training that is killed again and again ends as one that was left alone."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY

from volseg.networks.weights import load_weights

KILLS = 12
EPOCHS = 40


def start(dataset: Path, run: Path, resume: bool) -> subprocess.Popen[str]:
    settings = [word for option in TINY for word in ("--set", option)]
    how = ["--resume"] if resume else ["--epochs", str(EPOCHS), *settings]
    command = [sys.executable, "-m", "volseg", "train", str(dataset), "-o", str(run), *how]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def read_step(run: Path) -> int:
    """Of the history; every row is written at once."""
    path = run / "fold_0" / "history.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_somewhere(process: subprocess.Popen[str], run: Path, draw: random.Random) -> bool:
    """Kill the process at a random moment of its training; False if it ended before."""
    before, patience = read_step(run), draw.random()
    while process.poll() is None and read_step(run) <= before:
        time.sleep(0.01)
    # From the middle of a step to the writing of a checkpoint.
    deadline = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    if process.poll() is not None:
        return False
    process.kill()
    process.wait()
    return True


@pytest.mark.slow
def test_killed_training_ends_bit_for_bit_as_an_undisturbed_one(
    balls: Path, tmp_path: Path
) -> None:
    alone = start(balls, tmp_path / "alone", resume=False)
    assert alone.wait() == 0
    run, draw, kills = tmp_path / "killed", random.Random(0), 0
    process = start(balls, run, resume=False)
    while kills < KILLS and kill_somewhere(process, run, draw):
        kills += 1
        has_begun = (run / "fold_0" / "checkpoint_last.pt").exists()
        process = start(balls, run, resume=has_begun)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert kills >= KILLS // 2
    ours, theirs = (
        load_weights(folder / "fold_0" / "checkpoint_last.pt")
        for folder in (run, tmp_path / "alone")
    )
    for states in ((ours, theirs), (ours["training"], theirs["training"])):
        mine, other = (state["network"] for state in states)
        assert all(torch.equal(mine[name], other[name]) for name in other)
