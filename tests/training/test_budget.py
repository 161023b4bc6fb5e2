"""Steps, progress and their corrections."""

from __future__ import annotations

import pytest

from volseg.config import OptimizerConfig
from volseg.training.budget import Budget
from volseg.training.engine import learning_rate


def test_progress_is_the_share_of_known_steps() -> None:
    budget = Budget(200)
    assert [budget.progress(step) for step in (0, 50, 200, 300)] == [0, 0.25, 1, 1]
    budget.correct(50, elapsed_s=1e6)
    assert budget.end == 200


def test_measured_speed_replaces_the_prediction() -> None:
    budget = Budget(1000, minutes=1)
    budget.correct(5, elapsed_s=5)
    # One step a second: 55 s are left for 55 steps.
    assert budget.end == 60


def test_correction_bends_progress_but_never_jumps() -> None:
    budget = Budget(100, minutes=100 / 60)
    budget.correct(5, elapsed_s=5)
    before = budget.progress(50)
    # The machine was twice as slow: 100 s are over at step 50, so the end is near.
    budget.correct(50, elapsed_s=90)
    assert budget.progress(50) == pytest.approx(before)
    assert budget.end == 50 + round(10 * 50 / 90)
    assert budget.progress(budget.end) == 1


def test_each_correction_happens_once() -> None:
    budget = Budget(1000, minutes=10)
    budget.correct(5, elapsed_s=3)
    end = budget.end
    budget.correct(6, elapsed_s=100)
    assert budget.end == end


def test_state_goes_on_elsewhere() -> None:
    budget = Budget(1000, minutes=2)
    budget.correct(5, elapsed_s=2)
    other = Budget(7, minutes=1)
    other.load_state_dict(budget.state_dict())
    assert [other.progress(s) for s in range(300)] == [budget.progress(s) for s in range(300)]


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    config = OptimizerConfig(learning_rate=0.01, warmup=0.1, power=0.9)
    assert learning_rate(config, 0) == pytest.approx(0.01 * 0.01)
    assert learning_rate(config, 0.05) == pytest.approx(0.01 * 0.5 * 0.95**0.9)
    assert learning_rate(config, 0.5) == pytest.approx(0.01 * 0.5**0.9)
    assert learning_rate(config, 1) == 0
