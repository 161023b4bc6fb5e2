"""Spares trainings of tests the measuring of the machine, most of the time of a short one."""

from __future__ import annotations

import pytest
import torch
from kill_resume import Attempt

from volseg.planning import Machine


def say_speed(
    device: torch.device, spatial_dims: int, precision: torch.dtype = torch.float32
) -> Machine:
    """What `measure_machine` finds on one core, about."""
    return Machine(
        device=str(device),
        name="a machine of tests",
        memory_gb=16,
        seconds_per_gflop=0.01,
        seconds_per_mvoxel=0.02,
        is_measured=True,
    )


def know_speed(patch: pytest.MonkeyPatch) -> None:
    """Let the trainings of this process use `say_speed`."""
    patch.setattr("volseg.training.setting.measure_machine", say_speed)


class QuickAttempt(Attempt):
    """One whose processes know the machine."""

    def train(self) -> None:
        know_speed(pytest.MonkeyPatch())
        super().train()
