"""What is said of a training's speed: before it, in every round, and at its end."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from ignite.engine import Engine, Events

import volseg
from volseg.config import load_config
from volseg.training import pace as module
from volseg.training.budget import Budget
from volseg.training.checkpoints import Counters
from volseg.training.pace import Pace, Span, predict_rest


def make_learner(budget: Budget, step: int = 0, elapsed_s: float = 0.0) -> SimpleNamespace:
    counters = Counters(step=step, elapsed_s=elapsed_s)
    return SimpleNamespace(budget=budget, counters=counters, device=torch.device("cpu"))


class Clock:
    """A clock that a test moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)

    def batches(self, waits: list[float]):
        for wait in waits:
            self.now += wait
            yield wait


def run(pace: Pace, clock: Clock, waits: list[float], steps: list[float]) -> None:
    def step(engine: Engine, batch: float) -> None:
        clock.now += steps[engine.state.iteration - 1]

    def validate() -> None:
        clock.now += 100

    trainer = Engine(step)
    pace.attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, validate)
    trainer.run(clock.batches(waits), max_epochs=1, epoch_length=len(waits))


def test_waiting_and_speed_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace(make_learner(Budget(9)))
    run(pace, Clock(monkeypatch), waits=[3, 1, 0], steps=[1, 2, 1])
    row = pace.end_round()
    # Three steps in 8 seconds, 4 of them waiting; validations in between do not count.
    assert (row["steps_per_second"], row["waiting"]) == (0.375, 0.5)
    assert pace.end_round()["steps_per_second"] == 0
    assert (pace.whole.steps, pace.whole.spent_s, pace.whole.waited_s) == (3, 8, 4)
    assert str(pace).startswith("0.38 steps per second, 50% of the time waiting for data, at most ")


def test_nothing_done_is_no_division_by_zero() -> None:
    assert (Span().steps_per_second, Span().waiting) == (0, 0)


def test_prediction_is_corrected_by_the_steps_after_the_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pace = Pace(make_learner(Budget(1000), step=400))
    with caplog.at_level(logging.INFO):
        pace.announce(1.0, "predicted")
        run(pace, Clock(monkeypatch), waits=[50, 0, 0, 0, 0, 1, 9], steps=[9, 2, 2, 2, 2, 1, 9])
    # 600 steps: of 1 s each, then of (2 + 2 + 2 + 2 + 2) / 5 s. Ignite has words of its own.
    said = [record.getMessage() for record in caplog.records if record.name.startswith("volseg")]
    assert said == [
        "about 10.0 minutes, 600 steps of 1 s (predicted)",
        "about 20.0 minutes, 600 steps of 2 s (measured)",
    ]


def test_rest_of_a_training_in_minutes_and_in_steps() -> None:
    assert predict_rest(make_learner(Budget(90), step=30), 2.0) == (2.0, 60)
    by_time = make_learner(Budget(1, minutes=5), elapsed_s=180)
    assert predict_rest(by_time, 0.5) == (2.0, 240)
    assert predict_rest(make_learner(Budget(1, minutes=5), elapsed_s=400), 0.5) == (0.0, 0)


def test_memory_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(ru_maxrss=250_000)
    monkeypatch.setattr(module.resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(module.sys, "platform", "linux")
    assert Pace(make_learner(Budget(1))).peak_memory_mb() == 256
    monkeypatch.setattr(module.sys, "platform", "darwin")
    assert Pace(make_learner(Budget(1))).peak_memory_mb() == 0.25


def test_memory_on_a_gpu_is_what_the_training_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make_learner(Budget(1))
    learner.device = torch.device("cuda", 1)
    peaks = {torch.device("cuda", 1): 3_000_000}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peaks.__getitem__)
    assert Pace(learner).peak_memory_mb() == 3


def test_training_says_what_to_expect_and_what_it_was(
    balls: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(None, [*TINY, "training.steps_per_epoch=4"])
    with caplog.at_level(logging.INFO):
        volseg.train(balls, tmp_path / "run", config=config, epochs=2, device="cpu")
    said = [line for line in caplog.messages if line.startswith("about ")]
    assert re.fullmatch(r"about .* minutes, 8 steps of .* s \(predicted\)", said[0])
    assert re.fullmatch(r"about .* minutes, 3 steps of .* s \(measured\)", said[1])
    assert len(said) == 2
    first_round = next(i for i, line in enumerate(caplog.messages) if line.startswith("step "))
    assert caplog.messages.index(said[0]) < first_round
    assert re.search(
        r"8 steps in .* steps per second, \d+% of the time waiting for data, at most \d+ MB\) -> ",
        caplog.messages[-1],
    )
    rows = [json.loads(line) for line in (tmp_path / "run/fold_0/history.jsonl").open()]
    for row in rows:
        assert row["steps_per_second"] > 0
        assert 0 <= row["waiting"] <= 1
        assert row["memory_mb"] > 100
