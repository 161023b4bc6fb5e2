"""What happens every few steps: validation, a row of history, a picture, a line for people."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import nn

from volseg.config import TrainingConfig
from volseg.data.cache import CachedCase
from volseg.data.cases import Classes
from volseg.evaluation.pictures import draw_progress
from volseg.planning import Plan
from volseg.progress import Update
from volseg.training.checkpoints import Checkpoints
from volseg.training.engine import Learner, TrainingEvents
from volseg.training.history import History
from volseg.training.pace import Pace
from volseg.training.parallel import is_first
from volseg.training.validation import validate

logger = logging.getLogger(__name__)

VALIDATIONS = 8
VALIDATION_SHARE = 0.05
"""Largest share of the training time that all validations together may take."""


@dataclass(frozen=True, eq=False)
class Validator:
    """The cases that validate during training; none if the split has none."""

    cases: Sequence[CachedCase]
    plan: Plan
    classes: Classes
    device: torch.device
    precision: torch.dtype = torch.float32

    def measure(self, network: nn.Module) -> dict[str, Any]:
        """Mean Dice and Dice by class or region; None where no case has it."""
        if not self.cases:
            return {}
        dice = validate(network, self.cases, self.plan, self.classes, self.device, self.precision)
        names = self.classes.output_names[0 if self.classes.regions else 1 :]
        known = [value for value in dice if math.isfinite(value)]
        by_class = {
            name: value if math.isfinite(value) else None
            for name, value in zip(names, dice, strict=True)
        }
        mean = sum(known) / len(known) if known else None
        return {"val_dice": mean, "val_dice_by_class": by_class, "val_cases": len(self.cases)}


def choose_validation(
    cases: Sequence[CachedCase],
    plan: Plan,
    step_seconds: float,
    training: TrainingConfig,
    num_rounds: int,
    keep_all: bool = False,
) -> tuple[list[CachedCase], int]:
    """Cases that validate, evenly spread, and every how many rounds they do.

    As many as `VALIDATION_SHARE` of the time allows `VALIDATIONS` times. Where that is less than
    two, or where all are kept that are given, they validate less often, and at the end of the
    training at least; a single one does where two are too dear even once. A patience asks for
    more: five times as many validations as it waits for, and twice as many whatever they cost.
    """
    if not cases:
        # Nothing validates, and the picture is drawn as often as if it did.
        return [], math.ceil(num_rounds / VALIDATIONS)
    steps = (training.epochs or 0) * training.steps_per_epoch
    total_s = training.minutes * 60 if training.minutes else steps * step_seconds
    case_s = predict_steps(cases, plan) / len(cases) * step_seconds
    affordable = VALIDATION_SHARE * total_s / case_s
    patience = training.patience or 0
    # The best one, as many as are waited for, and the last one, which comes in any case.
    needed = max(2 * patience, patience + 2) if patience else 1
    wanted = min(num_rounds, max(VALIDATIONS, 5 * patience))
    fewest = 2 if affordable >= 2 else 1
    number = len(cases) if keep_all else min(len(cases), max(fewest, int(affordable / wanted)))
    times = min(wanted, max(needed, int(affordable / number)))
    if times * number * case_s > total_s / 2:
        logger.warning(
            "validations will take about %.1f of %.1f minutes; a longer training or a lower "
            "patience leaves a larger share for steps",
            times * number * case_s / 60,
            total_s / 60,
        )
    every = num_rounds // times if patience else math.ceil(num_rounds / times)
    return [cases[i * len(cases) // number] for i in range(number)], every


def predict_steps(cases: Sequence[CachedCase], plan: Plan) -> float:
    """Training steps that take as long as a validation of `cases`."""
    windows = sum(_count_windows(case.label.shape, plan.patch) for case in cases)
    # Forward is about a third of a training step, which takes a whole batch.
    return windows / plan.batch_size / 3


def _count_windows(shape: Sequence[int], window: Sequence[int]) -> int:
    """Windows that overlap by half; single slices do not."""
    return math.prod(
        n if w == 1 else max(1, math.ceil(2 * n / w) - 1)
        for n, w in zip(shape, window, strict=True)
    )


def attach_rounds(
    trainer: Engine,
    learner: Learner,
    checkpoints: Checkpoints,
    history: History,
    validator: Validator,
    pace: Pace,
    num_rounds: int,
    patience: int | None = None,
) -> None:
    """Each round: a row of history; every few rounds and at the end: validation, and a picture.

    The checkpoint with the best validation Dice so far is kept. After `patience` validations
    without a better one the training comes to its end, at a learning rate that is lowered first.
    """
    counters, budget = learner.counters, learner.budget
    validate_every = counters.validate_every

    def finish_round(engine: Engine) -> None:
        progress = budget.progress(counters.step)
        row: dict[str, Any] = {
            "step": counters.step,
            **({"extension": counters.extensions} if counters.extensions else {}),
            "minutes": round(counters.elapsed_s / 60, 3),
            "progress": round(progress, 4),
            "loss": counters.round_loss / counters.round_steps if counters.round_steps else None,
            "learning_rate": learner.optimizer.param_groups[0]["lr"],
            **pace.end_round(),
        }
        counters.round_steps, counters.round_loss = 0, 0.0
        number = math.floor(progress * num_rounds + 1e-6)
        # What settles comes through its rounds five times as fast, or more.
        is_due = progress >= 1 or (number % validate_every == 0 and not counters.is_settling)
        if is_due:
            learner.look_at_clock()
            row |= validator.measure(checkpoints.averaged_network)
        if is_first():
            history.append(row)
            _log_row(row, budget.end)
        if is_due:
            _draw(history)
            _follow(row.get("val_dice"), learner, checkpoints, patience)
            budget.add_validation(learner.look_at_clock())

    trainer.add_event_handler(TrainingEvents.ROUND_COMPLETED, finish_round)
    trainer.add_event_handler(Events.INTERRUPT, lambda: _draw(history))


def _follow(
    dice: float | None, learner: Learner, checkpoints: Checkpoints, patience: int | None
) -> None:
    """Keep the best weights, and let a training settle that gets no better."""
    counters = learner.counters
    if dice is None:
        return
    if dice > counters.best_dice:
        counters.best_dice = dice
        if is_first():
            checkpoints.save_best()
    if dice > counters.best_since_begin:
        counters.best_since_begin, counters.validations_since_best = dice, 0
        return
    counters.validations_since_best += 1
    is_over = patience is not None and counters.validations_since_best >= patience
    if is_over and not counters.is_settling and not learner.is_complete:
        counters.is_settling = True
        learner.budget.settle(counters.step)
        logger.info(
            "no better validation %d times in a row: the training ends at step %d",
            patience,
            learner.budget.end,
        )


def _draw(history: History) -> None:
    """Not every round, since it takes as long as many steps of a small training."""
    if not is_first() or not history.rows:
        return
    path = history.path.with_name("progress.png")
    try:
        draw_progress(path, history.rows)
    except Exception as error:
        # A picture is not worth a training.
        logger.warning("%s could not be drawn (%s); the training goes on", path, error)


def _log_row(row: dict[str, Any], total_steps: int) -> None:
    loss, dice = row["loss"], row.get("val_dice")
    logger.info(
        "step %d of %d, %.1f minutes: loss %s%s",
        row["step"],
        total_steps,
        row["minutes"],
        "not finite" if loss is None else f"{loss:.3f}",
        "" if dice is None else f", validation Dice {dice:.3f}",
    )


def attach_bar(trainer: Engine, learner: Learner, history: History, update: Update) -> None:
    """The progress bar: steps, time left, smoothed loss and the last validation's Dice."""
    smoothed: list[float] = []

    def show(engine: Engine) -> None:
        loss = engine.state.output
        last = smoothed.pop() if smoothed else loss
        smoothed.append(last + 0.05 * (loss - last) if math.isfinite(last) else loss)
        dice = [row["val_dice"] for row in history.rows if row.get("val_dice") is not None]
        note = f"loss {smoothed[0]:.3f}" + (f" Dice {dice[-1]:.3f}" if dice else "")
        update(learner.counters.step, learner.budget.end, note)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, show)
