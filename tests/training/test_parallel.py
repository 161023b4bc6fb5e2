"""Two processes train as one does with the same batches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import known_speed
import numpy as np
import pytest
import torch
from conftest import TINY
from kill_resume import find_differences
from together import meet_beside_a_gpu, run_by_two, train, train_two_heads
from torch.distributed import HashStore

import volseg
from volseg.config import load_config
from volseg.data.cases import Classes
from volseg.errors import ConfigError, MachineError
from volseg.networks.weights import load_weights
from volseg.planning import write_plan
from volseg.planning.writing import plan_run
from volseg.training import parallel
from volseg.training.history import History
from volseg.training.machine import measure_machine
from volseg.training.parallel import agree_on_name, check_batch, join, name_job
from volseg.training.setting import prepare_training
from volseg.training.validation import validate

OPTIONS = [
    *TINY,
    "plan.batch_size=2",
    "training.workers=0",
    # The sums of sixteen-bit numbers depend on how they are shared, and Muon makes whole steps of
    # what remains of a gradient that is zero.
    "training.precision=float32",
    "optimizer.name=sgd",
    "optimizer.learning_rate=0.01",
]


EPOCHS = 2
KILLING = """
import os, signal, sys

import pytest, torch
from known_speed import know_speed
from volseg.cli import main

know_speed(pytest.MonkeyPatch())
steps, update = [], torch.optim.SGD.step

def step(self, closure=None):
    steps.append(1)
    environment = [os.environ[name] for name in ("RANK", "TORCHELASTIC_RESTART_COUNT")]
    if len(steps) == 8 and environment == ["1", "0"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, closure)

torch.optim.SGD.step = step
sys.exit(main())
"""
"""The whole command, whose second process kills itself in the second epoch."""
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "1",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[1-2]",
}


@pytest.fixture(scope="module")
def two(balls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by two processes; not to be changed."""
    run = tmp_path_factory.mktemp("runs") / "two"
    assert run_by_two(train, balls, run, load_config(None, OPTIONS), EPOCHS) == [0, 0]
    return run


def read_state(run: Path) -> dict[str, Any]:
    return load_weights(run / "fold_0" / "checkpoint_last.pt")


def read_rows(run: Path) -> list[dict[str, object]]:
    lines = (run / "fold_0" / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(balls: Path, two: Path, tmp_path: Path) -> None:
    config = load_config(None, OPTIONS)
    one = volseg.train(balls, tmp_path / "one", config=config, epochs=EPOCHS, device="cpu")
    ours, theirs = read_state(two), read_state(one)
    for name, tensor in theirs["network"].items():
        torch.testing.assert_close(ours["network"][name], tensor, atol=2e-4, rtol=1e-3)
    assert ours["counters"]["step"] == theirs["counters"]["step"]
    rows = [read_rows(run) for run in (two, one)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for our, their in zip(*rows, strict=True):
        assert our["loss"] == pytest.approx(their["loss"], rel=1e-2)
        assert our.get("val_dice", 0) == pytest.approx(their.get("val_dice", 0), abs=0.02)


@pytest.mark.slow
def test_killed_process_is_started_again_and_ends_as_if_it_never_was(
    balls: Path, two: Path, tmp_path: Path
) -> None:
    (tmp_path / "killing.py").write_text(KILLING)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
        *("--max-restarts=1", "--monitor-interval=0.1", str(tmp_path / "killing.py")),
        *("train", str(balls), "-o", str(tmp_path / "run"), "--device", "cpu"),
        *("--epochs", str(EPOCHS)),
        *(word for option in OPTIONS for word in ("--set", option)),
    ]
    path = os.pathsep.join([str(Path(known_speed.__file__).parent), *sys.path])
    environment = {**os.environ, **SLURM, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "resuming fold 0 at step 6" in result.stderr
    ours, theirs = read_state(tmp_path / "run"), read_state(two)
    assert list(find_differences(ours["network"], theirs["network"])) == []
    assert list(find_differences(ours["training"], theirs["training"])) == []


@pytest.mark.slow
def test_error_of_the_first_process_ends_all(tmp_path: Path) -> None:
    nothing = (tmp_path / "nothing", tmp_path / "run", load_config(None, OPTIONS), EPOCHS)
    assert run_by_two(train, *nothing) == [1, 1]


def test_others_wait_on_the_cpu_for_as_long_as_the_first_takes(tmp_path: Path) -> None:
    assert run_by_two(meet_beside_a_gpu, tmp_path, **SLURM) == [0, 0]


def test_network_with_an_idle_head_trains(balls: Path, tmp_path: Path) -> None:
    name = "together:make_two_heads"
    own = [option for option in OPTIONS if "width" not in option]
    config = load_config(None, [*own, f"network.name={name}"])
    assert run_by_two(train_two_heads, balls, tmp_path / "run", config) == [0, 0]


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(MachineError, match="process 2 of this machine, which has 1 CUDA devices"),
        join(torch.device("cuda")),
    ):
        pass


def test_each_meeting_has_a_name_of_its_own_in_a_store_that_is_kept() -> None:
    store = HashStore()
    store.set("question/2", "of a process that is gone")
    names = []
    for number in (3, 3, 2):
        with ThreadPoolExecutor(number) as pool:
            # The others may well be there before the first one.
            said = [
                pool.submit(agree_on_name, store, rank, number) for rank in reversed(range(number))
            ]
            names.append({one.result(timeout=20) for one in said})
    assert [len(same) for same in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3


def test_history_is_written_by_the_first_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr("volseg.training.history.is_first", lambda: False)
    assert History(path, first_step=1).rows == [{"step": 1}]
    assert path.read_text().count("\n") == 2
    monkeypatch.undo()
    History(path, first_step=1)
    assert path.read_text().count("\n") == 1


def test_job_is_the_same_after_a_restart_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert name_job(1) == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    first = name_job(1, None)
    assert name_job(1, None) == first
    assert name_job(2, None) != first
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b")
    assert name_job(1, None) != first
    # What torchrun says if nobody gives an id: its own number tells two of them apart.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    nameless = name_job(1, None)
    monkeypatch.setattr(os, "getppid", lambda: -1)
    assert name_job(1, None) != nameless


def test_batch_is_shared_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("volseg.training.parallel.count_processes", lambda: 2)
    check_batch(4)
    with pytest.raises(ConfigError, match="a batch of 3 for 2 processes; expected a multiple"):
        check_batch(3)


def test_a_process_is_planned_with_its_share_of_the_batch(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")
    odd = load_config(None, [*OPTIONS, "plan.batch_size=3"])
    other = plan_run(balls, tmp_path / "odd", odd, partial(measure_machine, device))
    assert other.plan.batch_size == 3
    for module in ("parallel", "setting"):
        monkeypatch.setattr(f"volseg.training.{module}.count_processes", lambda: 2)
    planned = []

    def write(*arguments: Any) -> Any:
        planned.append(arguments[2].plan.batch_size)
        return write_plan(*arguments)

    monkeypatch.setattr("volseg.training.setting.write_plan", write)
    even = load_config(None, [*OPTIONS, "plan.batch_size=6"])
    assert prepare_training(balls, tmp_path / "even", even, device).plan.batch_size == 6
    free = load_config(None, [*OPTIONS, "plan.batch_size=null"])
    assert prepare_training(balls, tmp_path / "free", free, device).plan.batch_size % 2 == 0
    assert planned == [3, None]
    # Neither a batch of one's own nor another model's is written if it cannot be shared.
    shutil.copy(tmp_path / "even" / "dataset.json", tmp_path / "odd")
    following = load_config(None, [f"training.start_from={tmp_path / 'odd'}"])
    for name, config in (("own", odd), ("following", following)):
        with pytest.raises(ConfigError, match="a batch of 3 for 2 processes"):
            prepare_training(balls, tmp_path / name, config, device)
        assert not (tmp_path / name / "plan.yaml").exists()


def test_processes_wait_for_a_long_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    @contextmanager
    def meeting() -> Iterator[Callable[[], None]]:
        done.append("open")
        yield lambda: done.append("meet")

    monkeypatch.setattr("volseg.training.validation.open_meeting", meeting)
    monkeypatch.setattr("volseg.training.validation.add_up", lambda x: done.append("sum") or x)
    monkeypatch.setattr(
        "volseg.training.validation._case_dice", lambda *_: done.append("case") or np.ones(1)
    )
    classes = Classes(names=("background", "a"), values=(0, 1))
    validate(torch.nn.Identity(), [None, None], None, classes, torch.device("cpu"))
    assert done == ["open", "case", "case", "meet", "sum"]


def test_a_process_that_fails_does_not_wait_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(parallel, "rendezvous", lambda _: iter([(HashStore(), 0, 1)]))
    ended: list[int] = []
    monkeypatch.setattr(parallel.idist, "finalize", lambda: ended.append(1))
    try:
        with pytest.raises(ValueError, match="alone"), join(torch.device("cpu")):
            raise ValueError("alone")
        assert not ended
    finally:
        monkeypatch.undo()
        parallel.idist.finalize()
