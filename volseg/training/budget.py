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

FIRST_STEPS = 5
"""Fewer steps are no measure of the speed."""
FIRST_S = 10.0
FIRST_SHARE = 0.05
FIRST_PROGRESS = 0.02
"""The measured speed replaces the planner's after so many seconds of steps, so large a share of the
minutes, or so much of the training as they seem to be."""
FEW_SHARE = 0.25
"""Once so large a share of the minutes is spent, fewer steps tell more than the prediction."""
CORRECTIONS = (0.05, 0.1, 0.25)
"""Share of the steps or of the minutes at which the number of steps left is computed anew."""
SETTLING = 0.2
"""A training that ends early lowers its learning rate in so many more steps, of those so far."""


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
        """Whether the number of steps will not change any more, but by `settle`."""
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
        self._left_out_s = 0.0
        self._validations, self._validations_s = 0, 0.0
        self._forget_steps()

    def _forget_steps(self) -> None:
        self._steps, self._steps_s, self._slowest_s = 0, 0.0, 0.0

    def expect_validations(self, share: float, steps: float) -> None:
        """Leave time for validations.

        Args:
            share: of the training after which there is one each time; the last is at its end.
            steps: that take as long as one of them, as predicted; 0 if there are none.
        """
        self.validation_share, self.validation_steps = share, steps

    def add_step(self, seconds: float) -> None:
        """Count a step that is a measure of the others."""
        if not self.is_final:
            self._steps += 1
            self._steps_s += seconds
            self._slowest_s = max(self._slowest_s, seconds)

    def leave_out_step(self, seconds: float) -> None:
        """Count a step that took as long as others do not: the first one of a process."""
        if self.is_guess:
            # Behind it there must be those that are a measure.
            self.end += 1
        if not self.is_final:
            self._left_out_s += seconds

    def add_validation(self, seconds: float) -> None:
        """Count a validation, whose time is left for those to come."""
        if not self.is_final:
            self._validations += 1
            self._validations_s += seconds

    def progress(self, step: int) -> float:
        """Share of the training that is done after `step` steps, at most 1."""
        if step >= self.end:
            return 1.0
        share = (step - self._anchor_step) / (self.end - self._anchor_step)
        return self._anchor_progress + (1 - self._anchor_progress) * share

    def correct(self, step: int, elapsed_s: float) -> bool:
        """Fit the steps left to the time left, if it is due; to be asked after every step.

        The first time replaces what was predicted, as if it had never been; after that the slope
        of `progress` changes and never its value.

        Args:
            step: steps so far.
            elapsed_s: time so far.

        Returns:
            Whether the number of steps is another one, and measured.
        """
        if self.minutes is None or self.is_final:
            return False
        if self._steps < FIRST_STEPS:
            self._guess(step, elapsed_s)
            return False
        if not self._is_due(step, elapsed_s):
            return False
        if self._corrections:
            self._bend(step)
        self.end = step + max(1, self._count_left(elapsed_s))
        self._corrections = 1 + self._count_passed(step, elapsed_s)
        self._forget_steps()
        if self.is_final:
            self._left_out_s, self._validations, self._validations_s = 0.0, 0, 0.0
        return True

    def settle(self, step: int) -> None:
        """Come to the end early, by a schedule that is lowered from where it is now."""
        self._bend(step)
        self.end = min(self.end, step + max(1, round(SETTLING * (step - self._begin_step))))
        self._corrections = len(CORRECTIONS) + 1

    def _bend(self, step: int) -> None:
        """Let `progress` go on from its value at `step`, whatever becomes of the end."""
        self._anchor_progress, self._anchor_step = self.progress(step), step

    def _guess(self, step: int, elapsed_s: float) -> None:
        """What a few slow steps tell; a busy machine may have held up one of them."""
        if not self.is_guess or self._spent_share(elapsed_s) < FEW_SHARE:
            return
        if self._steps:
            self.end = step + self._count_left(elapsed_s)
        elif self._spent_share(elapsed_s) >= 1:
            self.end = step

    def _is_due(self, step: int, elapsed_s: float) -> bool:
        if self._corrections:
            passed = self._count_passed(step, elapsed_s)
            return self._corrections <= passed and step < self.end
        enough_s = min(FIRST_S, FIRST_SHARE * self._asked_s)
        return self._steps_s >= enough_s or self.progress(step) >= FIRST_PROGRESS

    @property
    def _asked_s(self) -> float:
        return (self.minutes or 0.0) * 60 - self._begin_s

    def _spent_share(self, elapsed_s: float) -> float:
        return (elapsed_s - self._begin_s) / self._asked_s

    def _count_passed(self, step: int, elapsed_s: float) -> int:
        # Steps that have become slower are noticed by the clock, faster ones by their number.
        asked_s = max(1e-3, self._asked_s - self._left_out_s)
        spent_s = elapsed_s - self._begin_s - self._left_out_s
        done = max(self.progress(step), spent_s / asked_s)
        return sum(done >= at for at in CORRECTIONS)

    def _count_left(self, elapsed_s: float) -> int:
        """Steps for which there is time, as the last ones went."""
        step_s = self._measure_step()
        left_s = max(0.0, (self.minutes or 0.0) * 60 - elapsed_s)
        # However long the validations seem to take, half of the time is for steps.
        left_s -= min(left_s / 2, self._predict_validations(step_s))
        return round(left_s / step_s)

    def _measure_step(self) -> float:
        """Seconds per step, without the slowest: a busy machine may hold one up for a minute."""
        without = self._steps_s - self._slowest_s if self._steps > 1 else self._steps_s
        # A clock may be too coarse for a step.
        return max(without, 1e-3) / max(1, self._steps - 1)

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
