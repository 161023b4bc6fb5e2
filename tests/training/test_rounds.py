"""What happens every few steps, by a clock that the tests turn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from ignite.engine import Engine, Events
from torch import nn

from volseg.config import Config, TrainingConfig, load_config
from volseg.errors import MachineError
from volseg.losses import DiceCrossEntropy, MultiLevelLoss
from volseg.training import engine, history, rounds
from volseg.training.budget import Budget
from volseg.training.engine import (
    Learner,
    attach_checkpoints,
    attach_counting,
    create_trainer,
    make_learner,
)
from volseg.training.history import History
from volseg.training.pace import Pace
from volseg.training.rounds import attach_rounds, choose_validation


class Clock:
    """Time that passes by order alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(engine, "time", clock)
    monkeypatch.setattr(rounds, "draw_progress", lambda path, rows: None)
    return clock


class Checkpoints:
    """Keeps what would have been written, which takes some time."""

    averaged_network = nn.Identity()

    def __init__(self, learner: Learner, clock: Clock, save_s: float = 0.0) -> None:
        self.learner, self.clock, self.save_s = learner, clock, save_s
        self.saved: list[dict[str, Any]] = []

    def save_last(self) -> None:
        counters, budget = self.learner.counters, self.learner.budget
        self.saved.append({**vars(counters), "budget": budget.state_dict()})
        self.clock.now += self.save_s

    def save_best(self) -> None:
        pass


def make_training(
    folder: Path,
    clock: Clock,
    budget: Budget,
    dice: Callable[[], float],
    *,
    patience: int | None = None,
    num_rounds: int = 10,
    save_s: float = 0.0,
    step_s: float = 1.0,
) -> tuple[Engine, Learner, Checkpoints]:
    """A network of one weight whose steps take `step_s` and whose validations `dice` answers."""
    loss = MultiLevelLoss(DiceCrossEntropy())
    network, device = nn.Conv3d(1, 2, 1), torch.device("cpu")
    learner = make_learner(network, loss, device, budget, Config().optimizer, seed=0)
    checkpoints = Checkpoints(learner, clock, save_s)
    trainer, pace = create_trainer(learner), Pace(learner)
    pace.attach(trainer)

    def pass_time(engine: Engine) -> None:
        clock.now += step_s

    trainer.add_event_handler(Events.ITERATION_COMPLETED, pass_time)
    validator = SimpleNamespace(measure=lambda network: {"val_dice": dice()})
    log = History(folder / "history.jsonl")
    attach_rounds(trainer, learner, checkpoints, log, validator, pace, num_rounds, patience)  # type: ignore[arg-type]
    attach_counting(trainer, learner, num_rounds)
    attach_checkpoints(trainer, learner, checkpoints)  # type: ignore[arg-type]
    return trainer, learner, checkpoints


def run(trainer: Engine) -> None:
    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 4, 4, 4, dtype=torch.long)

    trainer.run(batches(), max_epochs=1, epoch_length=10**6)


def test_checkpoint_behind_a_validation_knows_its_time(tmp_path: Path, clock: Clock) -> None:
    def validate() -> float:
        clock.now += 50
        return 0.5

    trainer, learner, checkpoints = make_training(
        tmp_path, clock, Budget(100, minutes=10), validate, num_rounds=100
    )
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(event_filter=lambda _, step: step == 14),
        lambda engine: engine.terminate(),
    )
    run(trainer)
    states = [
        (state["step"], state["elapsed_s"], state["budget"]["_validations_s"])
        for state in checkpoints.saved
    ]
    # A second per step, and a validation in the round that ends with the twelfth.
    assert states[:3] == [(6, 6, 0), (12, 62, 50), (13, 63, 50)]
    assert learner.counters.elapsed_s == clock.now


def test_patience_lowers_the_rate_before_the_end(tmp_path: Path, clock: Clock) -> None:
    dice = iter([0.5, 0.6, 0.4, 0.4, *[0.3] * 9])
    trainer, learner, _ = make_training(
        tmp_path, clock, Budget(100), lambda: next(dice), patience=2
    )
    run(trainer)
    # A round is ten steps: the fourth validation, the second that is no better, is at step 40.
    assert learner.counters.step == 48
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").open()]
    rate = learner.config.learning_rate
    assert rows[3]["learning_rate"] == pytest.approx(rate * (1 - 0.39) ** 0.9)
    # The last of eight steps begins at 0.4 + 0.6 * 7 / 8.
    assert rows[-1]["learning_rate"] == pytest.approx(rate * (0.6 / 8) ** 0.9)
    assert rows[-1]["val_dice"] == 0.3


def test_settling_validates_at_its_end_alone(tmp_path: Path, clock: Clock) -> None:
    trainer, learner, _ = make_training(tmp_path, clock, Budget(100), lambda: 0.5, patience=2)
    run(trainer)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").open()]
    # The first is the best one, the third is the second that is no better; a fifth of 30 is 6.
    validated = [row["step"] for row in rows if "val_dice" in row]
    assert validated == [10, 20, 30, 36]
    assert learner.counters.validations_since_best == 3


def test_corrected_length_is_written_however_dear(tmp_path: Path, clock: Clock) -> None:
    budget = Budget(100, minutes=100 / 60)
    trainer, learner, checkpoints = make_training(
        tmp_path, clock, budget, lambda: 0.5, num_rounds=25, save_s=0.9
    )
    finals: list[int] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda engine: finals.append(learner.counters.step) if budget.is_final else None,
    )
    run(trainer)
    first = next(state for state in checkpoints.saved if state["budget"]["_corrections"] == 4)
    assert first["step"] == finals[0]


@pytest.mark.parametrize("is_late", [False, True])
def test_wish_to_stop_is_never_lost(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    trainer, learner, _ = make_training(tmp_path, clock, Budget(5), lambda: 0.5, num_rounds=1)
    add_up = engine.add_up

    def interrupted(values: torch.Tensor) -> torch.Tensor:
        # While the others are waited for, in the third step or in the last one.
        total = add_up(values)
        learner.wants_stop |= learner.counters.step >= (4 if is_late else 2)
        return total

    monkeypatch.setattr(engine, "add_up", interrupted)
    run(trainer)
    assert learner.counters.step == (5 if is_late else 4)
    assert learner.agree_to_stop()


def test_extension_has_a_patience_of_its_own(tmp_path: Path, clock: Clock) -> None:
    dice = iter([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.86])
    trainer, learner, _ = make_training(
        tmp_path, clock, Budget(100), lambda: next(dice), patience=2
    )
    # Of the training before.
    learner.counters.best_dice = 0.9
    run(trainer)
    assert learner.counters.step == 100
    assert learner.counters.best_dice == 0.9


def test_rounds_that_write_for_long_write_less_often(tmp_path: Path, clock: Clock) -> None:
    for save_s, expected in ((0.1, 10), (3.0, 3)):
        trainer, _, checkpoints = make_training(
            tmp_path, clock, Budget(100), lambda: 0.5, save_s=save_s
        )
        run(trainer)
        steps = [state["step"] for state in checkpoints.saved]
        # 3 s are less than a twentieth of what comes after 60 s alone.
        assert len(steps) == expected, steps
        assert steps[0] == 10
        assert steps[-1] == 100


def test_round_without_a_finite_loss_says_so(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    trainer, learner, _ = make_training(tmp_path, clock, Budget(20), lambda: 0.5)
    end_step = learner.end_step
    # The second of ten rounds, of two steps each.
    learner.end_step = lambda loss: end_step(  # type: ignore[method-assign]
        math.inf if learner.counters.step in (2, 3) else loss
    )
    run(trainer)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").open()]
    assert [row["loss"] is None for row in rows] == [number == 1 for number in range(10)]
    assert "step 4 of 20, 0.1 minutes: loss not finite, validation" in caplog.text


def test_picture_that_cannot_be_drawn_ends_no_training(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: Path, rows: object) -> None:
        raise ValueError("no font")

    monkeypatch.setattr(rounds, "draw_progress", fail)
    trainer, learner, _ = make_training(tmp_path, clock, Budget(20), lambda: 0.5)
    run(trainer)
    assert learner.is_complete
    assert "progress.png could not be drawn (no font)" in caplog.text


def test_full_disk_names_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = History(tmp_path / "history.jsonl")

    def fail(row: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(history, "json", SimpleNamespace(dumps=fail))
    with pytest.raises(MachineError, match=r"no space left while writing .*history\.jsonl"):
        log.append({"step": 1})


def configure(*settings: str) -> TrainingConfig:
    return load_config(None, [*TINY, *(f"training.{setting}" for setting in settings)]).training


def cases_of(number: int) -> list[Any]:
    return [SimpleNamespace(label=np.zeros((64, 64, 64)))] * number


PLAN: Any = SimpleNamespace(patch=(16, 16, 16), batch_size=2)


@pytest.mark.parametrize("epochs", range(3, 9))
@pytest.mark.parametrize("step_seconds", [1e-6, 1e3])
def test_patience_of_few_epochs_can_come_to_its_end(epochs: int, step_seconds: float) -> None:
    for patience in range(1, epochs - 1):
        training = configure(f"patience={patience}", f"epochs={epochs}")
        _, every = choose_validation(cases_of(3), PLAN, step_seconds, training, epochs)
        # The best one, and as many that are no better, before the end.
        assert len(range(every, epochs, every)) >= patience + 1


def test_one_case_validates_where_two_are_too_dear(caplog: pytest.LogCaptureFixture) -> None:
    training = configure("minutes=1")
    # A case has 7 x 7 x 7 windows of half a batch, a third of a step each: 57.2 steps.
    steps = 7**3 / 2 / 3
    for share, number in ((0.02, 2), (0.03, 1)):
        cases, every = choose_validation(cases_of(5), PLAN, share * 60 / steps, training, 25)
        assert (len(cases), every) == (number, 25)
    assert not caplog.text
    choose_validation(cases_of(5), PLAN, 0.6 * 60 / steps, training, 25)
    assert "validations will take about 0.6 of 1.0 minutes" in caplog.text
