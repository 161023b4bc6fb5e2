"""How long a training is, in steps, and how far it has come.

Learning rate and moving average are functions of `progress`, which runs from 0 to 1. Under
``--epochs`` the number of steps is known; under ``--minutes`` it follows from the measured speed,
corrected a few times, most of them early. Corrections change the slope of `progress`, never its
value, and are kept in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CORRECTIONS = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
"""Progress at which the number of steps left is computed anew from the time left."""
FIRST_STEPS = 5
"""Steps after which the planner's prediction gives way to the measured speed."""


class Budget:
    """Steps of a training; `minutes` None means that `num_steps` is final.

    Args:
        num_steps: known or predicted.
        minutes: wall-clock time for all steps and validations, of those before an extension too.
    """

    def __init__(self, num_steps: int, minutes: float | None = None) -> None:
        self.minutes = minutes
        self.end = max(1, num_steps)
        self._begin_step, self._begin_s = 0, 0.0
        self._anchor_step, self._anchor_progress = 0, 0.0
        self._corrections = 0

    @property
    def num_steps(self) -> int:
        """Steps of the training, or of its last extension."""
        return self.end - self._begin_step

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
        self._begin_step, self._begin_s = step, elapsed_s
        self.end = step + max(1, num_steps)
        self.minutes = None if minutes is None else elapsed_s / 60 + minutes
        self._anchor_step, self._anchor_progress = step, 0.0
        self._corrections = 0

    def progress(self, step: int) -> float:
        """Share of the training that is done after `step` steps, at most 1."""
        share = (step - self._anchor_step) / max(1, self.end - self._anchor_step)
        return min(1.0, self._anchor_progress + (1 - self._anchor_progress) * share)

    def correct(self, step: int, elapsed_s: float) -> None:
        """After `step` steps in `elapsed_s`, fit the steps left to the time left, if it is due."""
        done, spent_s = step - self._begin_step, elapsed_s - self._begin_s
        if self.minutes is None or done < FIRST_STEPS or step >= self.end:
            return
        due = sum(self.progress(step) >= at for at in CORRECTIONS) + 1
        if due <= self._corrections:
            return
        self._anchor_progress, self._anchor_step = self.progress(step), step
        left_s = self.minutes * 60 - elapsed_s
        self.end = step + max(1, round(left_s * done / spent_s))
        self._corrections = due

    def state_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as `state_dict` was."""
        vars(self).update(state)
