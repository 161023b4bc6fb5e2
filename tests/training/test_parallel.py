"""Two processes train as one does with the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

import volseg
from volseg.config import load_config
from volseg.errors import ConfigError
from volseg.networks.weights import load_weights
from volseg.training.parallel import check_batch

OPTIONS = [
    *TINY,
    "plan.batch_size=2",
    "training.workers=0",
    # The sums of sixteen-bit numbers depend on how they are shared, and AdamW makes whole steps of
    # what remains of a gradient that is zero.
    "training.precision=float32",
    "optimizer.name=sgd",
    "optimizer.learning_rate=0.01",
]


def train_by_two(dataset: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    settings = [word for option in OPTIONS for word in ("--set", option)]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"),
        *("-m", "volseg", "train", str(dataset), "-o", str(output), "--device", "cpu"),
        *settings,
        *more,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def read_rows(run: Path) -> list[dict[str, object]]:
    lines = (run / "fold_0" / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(balls: Path, tmp_path: Path) -> None:
    config = load_config(None, OPTIONS)
    one = volseg.train(balls, tmp_path / "one", config=config, epochs=3, device="cpu")
    result = train_by_two(balls, tmp_path / "two", "--epochs", "3")
    assert result.returncode == 0, result.stderr[-2000:]
    two = tmp_path / "two"
    ours, theirs = (load_weights(run / "fold_0" / "checkpoint_last.pt") for run in (two, one))
    for name, tensor in theirs["network"].items():
        torch.testing.assert_close(ours["network"][name], tensor, atol=2e-4, rtol=1e-3)
    assert ours["counters"]["step"] == theirs["counters"]["step"]
    rows = [read_rows(run) for run in (two, one)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for our, their in zip(*rows, strict=True):
        assert our["loss"] == pytest.approx(their["loss"], rel=1e-2)
        assert our.get("val_dice", 0) == pytest.approx(their.get("val_dice", 0), abs=0.02)


@pytest.mark.slow
def test_error_of_the_first_process_ends_all(balls: Path, tmp_path: Path) -> None:
    result = train_by_two(balls, tmp_path / "run", "--epochs", "1", "--fold", "9")
    assert result.returncode != 0
    assert "fold 9; expected 0 to 4" in result.stderr


def test_batch_is_shared_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("volseg.training.parallel.count_processes", lambda: 2)
    check_batch(4)
    with pytest.raises(ConfigError, match="a batch of 3 for 2 processes; expected a multiple"):
        check_batch(3)
