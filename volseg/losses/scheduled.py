"""A second term whose weight follows the progress of the training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from torch import nn

from volseg.errors import check_choice
from volseg.losses.targets import check_above_zero

Schedule = Literal["constant", "linear", "cosine"]

_SHARES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
}


class ScheduledTerm(nn.Module):
    """A loss with a weight that is constant or rises from 0.

    Terms on boundaries say little while a prediction has none yet, which is why their sources let
    them rise.

    Attributes:
        loss: of logits (B, K, *S) and a target, as `volseg.losses.MultiLevelLoss` takes one.
    """

    def __init__(self, loss: nn.Module, weight: float = 1.0, schedule: Schedule = "linear") -> None:
        """Keep a loss and its weight.

        Args:
            loss: the term.
            weight: at the end of the training; above 0.
            schedule: ``"constant"``; ``"linear"`` from 0 with the progress of the training; or
                ``"cosine"``, half a wave from 0, slow at both ends.

        Raises:
            ConfigError: an unknown schedule, or a weight that is not above 0.
        """
        super().__init__()
        check_choice("schedule", schedule, _SHARES)
        check_above_zero("weight", weight)
        self.loss, self.weight, self.schedule = loss, weight, schedule

    def weigh(self, progress: float) -> float:
        """The weight at a progress between 0 and 1.

        >>> ScheduledTerm(nn.Identity(), 3.0, "linear").weigh(0.5)
        1.5
        """
        return self.weight * _SHARES[self.schedule](progress)
