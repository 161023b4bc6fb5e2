"""How long a training is, in steps, and how far it has come.

Learning rate and moving average are functions of `progress`, which runs from 0 to 1. Under
``--epochs`` the number of steps is known. Under ``--minutes`` it follows from the speed of the
first steps and is corrected in the first quarter alone, so that from then on `progress` is a
function of the step, and a training that was killed ends at the step at which it would have ended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

FIRST_S = 10.0
FIRST_SHARE = 0.05
"""The measured speed replaces the planner's after so many seconds of steps, or so large a share of
the minutes where that is less."""
FIRST_STEPS = 5
FIRST_PROGRESS = 0.02
"""But not before so many steps, and after them at once where they already seem to be so much of the
training."""
FEW_SHARE = 0.25
"""Fewer steps must do as a measure once so large a share of the minutes is spent."""
CORRECTIONS = (0.05, 0.1, 0.25)
"""Progress at which the number of steps left is computed anew from the time left."""


class Budget:
    """Steps of a training; `minutes` None means that `num_steps` is final.

    Args:
        num_steps: known or predicted.
        minutes: wall-clock time for all steps and validations, of those before an extension too.
    """

    def __init__(self, num_steps: int, minutes: float | None = None) -> None:
        self.validation_share, self.validation_steps = 1.0, 0.0
        self._begin(0, 0.0, num_steps, minutes)

    @property
    def num_steps(self) -> int:
        """Steps of the training, or of its last extension."""
        return self.end - self._begin_step

    @property
    def is_guess(self) -> bool:
        """Whether no speed was measured yet, so that `progress` may fall back."""
        return self.minutes is not None and not self._corrections

    @property
    def is_final(self) -> bool:
        """Whether the number of steps will not change any more."""
        return self.minutes is None or self._corrections > len(CORRECTIONS)

    def extend(
        self, step: int, elapsed_s: float, num_steps: int, minutes: float | None = None
    ) -> None:
        """Begin anew behind a finished training.

        Args:
            step: steps so far.
            elapsed_s: time so far.
            num_steps: to add, known or predicted.
            minutes: to add; None means that `num_steps` is final.
        """
        self._begin(step, elapsed_s, num_steps, minutes)

    def _begin(self, step: int, elapsed_s: float, num_steps: int, minutes: float | None) -> None:
        self.minutes = None if minutes is None else elapsed_s / 60 + minutes
        self.end = step + max(1 if minutes is None else FIRST_STEPS, num_steps)
        self._begin_step, self._begin_s = step, elapsed_s
        self._anchor_step, self._anchor_progress = step, 0.0
        self._corrections = 0
        self._slow_steps, self._slow_s = 0, 0.0
        self._spent_s, self._slowest_s = 0.0, 0.0
        self._validations, self._validations_s = 0, 0.0

    def expect_validations(self, share: float, steps: float) -> None:
        """Leave time for validations.

        Args:
            share: of the training after which there is one each time; the last is at its end.
            steps: that take as long as one of them, as predicted; 0 if there are none.
        """
        self.validation_share, self.validation_steps = share, steps

    def leave_out(self, seconds: float) -> None:
        """Count a step that took as long as others do not: the first one of a process."""
        if self.is_guess:
            # Behind it there must be those that are a measure.
            self.end += 1
        if not self.is_final:
            self._slow_steps += 1
            self._slow_s += seconds

    def add_validation(self, seconds: float) -> None:
        """Count a validation, which is no measure of the steps' speed."""
        if not self.is_final:
            self._validations += 1
            self._validations_s += seconds

    def progress(self, step: int) -> float:
        """Share of the training that is done after `step` steps, at most 1."""
        share = (step - self._anchor_step) / max(1, self.end - self._anchor_step)
        return min(1.0, self._anchor_progress + (1 - self._anchor_progress) * share)

    def correct(self, step: int, elapsed_s: float) -> bool:
        """Fit the steps left to the time left, if it is due; to be asked after every step.

        The first time replaces what was predicted, as if it had never been; after that the slope
        of `progress` changes and never its value.

        Args:
            step: steps so far.
            elapsed_s: time so far.

        Returns:
            Whether it was due.
        """
        if self.minutes is None or self.is_final:
            return False
        steps = step - self._begin_step - self._slow_steps
        spent_s = elapsed_s - self._begin_s - self._slow_s - self._validations_s
        self._slowest_s = max(self._slowest_s, spent_s - self._spent_s)
        self._spent_s = spent_s
        if steps < 1 or not self._is_due(step, steps):
            return False
        step_s = self._measure_step(steps)
        if self._corrections:
            self._anchor_progress, self._anchor_step = self.progress(step), step
        left_s = self.minutes * 60 - elapsed_s
        # However long the validations seem to take, half of the time is for steps.
        left_s -= min(left_s / 2, self._predict_validations(step_s))
        self.end = step + max(1, round(left_s / step_s))
        self._corrections = 1 + self._count_passed(step)
        return True

    def _is_due(self, step: int, steps: int) -> bool:
        if self._corrections:
            return self._corrections <= self._count_passed(step) and step < self.end
        asked_s = (self.minutes or 0) * 60 - self._begin_s
        if steps < FIRST_STEPS:
            return self._spent_s >= FEW_SHARE * asked_s or step >= self.end
        is_measured = self._spent_s >= min(FIRST_S, FIRST_SHARE * asked_s)
        return is_measured or self.progress(step) >= FIRST_PROGRESS

    def _measure_step(self, steps: int) -> float:
        """Seconds per step, without the slowest: a busy machine may hold one up for a minute."""
        if steps == 1:
            return max(self._spent_s, 1e-3)
        # A clock may be too coarse for a step.
        return max(self._spent_s - self._slowest_s, 1e-3) / (steps - 1)

    def _count_passed(self, step: int) -> int:
        return sum(self.progress(step) >= at for at in CORRECTIONS)

    def _predict_validations(self, step_s: float) -> float:
        """Seconds of the validations to come: as those before, or as predicted."""
        # The end comes after the last whole share, and validates too.
        left = max(1, math.ceil(1 / self.validation_share - 1e-6) - self._validations)
        if self._validations:
            return left * self._validations_s / self._validations
        return left * self.validation_steps * step_s

    def state_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as `state_dict` was."""
        vars(self).update(state)
