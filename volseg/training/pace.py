"""How fast a training goes: predicted before its first step, measured from then on."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from types import ModuleType

import torch
from ignite.engine import Engine, Events

from volseg.training.engine import Learner

resource: ModuleType | None
try:
    import resource
except ModuleNotFoundError:
    resource = None

logger = logging.getLogger(__name__)

MEASURED_STEPS = (1, 6)
"""The steps whose mean time corrects the prediction; the first one waits for what happens once."""


@dataclass
class Span:
    """Steps, with the time that they took and what of it they waited for their batches."""

    steps: int = 0
    spent_s: float = 0.0
    waited_s: float = 0.0

    def add(self, spent_s: float, waited_s: float) -> None:
        """Count a step."""
        self.steps += 1
        self.spent_s += spent_s
        self.waited_s += waited_s

    @property
    def steps_per_second(self) -> float:
        """0 without a step."""
        return self.steps / self.spent_s if self.spent_s else 0.0

    @property
    def waiting(self) -> float:
        """Share of the time, between 0 and 1."""
        return self.waited_s / self.spent_s if self.spent_s else 0.0


class Pace:
    """Clock and memory of the steps of a training; validations and checkpoints do not count.

    Of several processes each has its own; what is reported is the first one's.

    Args:
        learner: what is trained.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.whole, self._round = Span(), Span()
        self._fetching = self._computing = self._measured = 0.0

    def attach(self, trainer: Engine) -> None:
        """Follow an engine; to be attached before all else that follows its steps."""
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(Events.GET_BATCH_STARTED, self._fetch)
        trainer.add_event_handler(Events.GET_BATCH_COMPLETED, self._compute)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._count)

    def announce(self, step_seconds: float, source: str) -> None:
        """Log how long the rest of the training will take.

        Args:
            step_seconds: of one step.
            source: where that comes from, one word.
        """
        minutes, steps = predict_rest(self.learner, step_seconds)
        logger.info(
            "about %.1f minutes, %d steps of %.2g s (%s)", minutes, steps, step_seconds, source
        )

    def end_round(self) -> dict[str, float]:
        """What the steps since the last round were like, for a row of history."""
        span, self._round = self._round, Span()
        return {
            "steps_per_second": round(span.steps_per_second, 4),
            "waiting": round(span.waiting, 4),
            "memory_mb": round(self.peak_memory_mb(), 1),
        }

    def peak_memory_mb(self) -> float:
        """Most memory so far, 10^6 bytes: the training's on a GPU, the whole process's on a CPU.

        0 on a CPU under Windows, which does not count it.
        """
        if self.learner.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.learner.device) / 1e6
        if resource is None:
            return 0.0
        peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Bytes on macOS, KiB elsewhere.
        return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6

    def __str__(self) -> str:
        """The whole training in a few words, for a log."""
        return (
            f"{self.whole.steps_per_second:.2f} steps per second, {self.whole.waiting:.0%} of the "
            f"time waiting for data, at most {self.peak_memory_mb():.0f} MB"
        )

    def _start(self, engine: Engine) -> None:
        if self.learner.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.learner.device)

    def _fetch(self, engine: Engine) -> None:
        self._fetching = time.monotonic()

    def _compute(self, engine: Engine) -> None:
        self._computing = time.monotonic()

    def _count(self, engine: Engine) -> None:
        spent_s, waited_s = time.monotonic() - self._fetching, self._computing - self._fetching
        self.whole.add(spent_s, waited_s)
        self._round.add(spent_s, waited_s)
        first, last = MEASURED_STEPS
        if first < self.whole.steps <= last:
            self._measured += spent_s
        if self.whole.steps == last:
            self.announce(self._measured / (last - first), "measured")


def predict_rest(learner: Learner, step_seconds: float) -> tuple[float, int]:
    """Minutes and steps that a training still has, if each step takes so long."""
    budget, counters = learner.budget, learner.counters
    if budget.minutes is None:
        steps = budget.end - counters.step
        return steps * step_seconds / 60, steps
    left_s = max(0.0, budget.minutes * 60 - counters.elapsed_s)
    return left_s / 60, int(left_s / step_seconds)
