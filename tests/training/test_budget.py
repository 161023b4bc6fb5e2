"""Steps, progress and their corrections."""

from __future__ import annotations

import pytest

from volseg.config import OptimizerConfig
from volseg.training.budget import Budget
from volseg.training.optimizers import learning_rate


def test_progress_is_the_share_of_known_steps() -> None:
    budget = Budget(200)
    assert [budget.progress(step) for step in (0, 50, 200, 300)] == [0, 0.25, 1, 1]
    budget.correct(50, elapsed_s=1e6)
    assert budget.end == 200


def test_measured_speed_replaces_the_prediction_after_some_seconds() -> None:
    budget = Budget(1000, minutes=5)
    assert not budget.correct(9, elapsed_s=9)
    # One step a second: 290 s are left for 290 steps, with a validation at the end that is free.
    assert budget.correct(10, elapsed_s=10)
    assert budget.end == 300
    # As if nothing had been predicted.
    assert budget.progress(10) == pytest.approx(10 / 300)


def test_short_training_is_measured_in_a_twentieth_of_its_time() -> None:
    budget = Budget(1000, minutes=1)
    assert not budget.correct(5, elapsed_s=2.9)
    assert budget.correct(6, elapsed_s=3)
    assert budget.end == 6 + 114


def test_slow_first_step_is_no_measure_of_speed() -> None:
    budget = Budget(1000, minutes=5)
    budget.leave_out(100)
    assert not budget.correct(1, elapsed_s=100)
    assert not budget.correct(2, elapsed_s=101)
    # Ten steps took 10 s, and 190 s are left.
    assert budget.correct(11, elapsed_s=110)
    assert budget.end == 11 + 190
    assert budget.progress(11) == pytest.approx(11 / 201)


def test_first_step_of_a_resumed_process_is_left_out_too() -> None:
    budget = Budget(1000, minutes=5)
    budget.leave_out(20)
    budget.correct(4, elapsed_s=23)
    budget.leave_out(30)
    # Steps 2 to 4 and 6 to 12 took a second each.
    assert budget.correct(12, elapsed_s=60)
    assert budget.end == 12 + 240


def test_prediction_that_was_far_too_low_neither_ends_the_training_nor_uses_it_up() -> None:
    for predicted in (1, 4, 50):
        budget = Budget(predicted, minutes=10)
        budget.leave_out(1)
        step = next(s for s in range(2, 20) if budget.correct(s, elapsed_s=1 + 0.1 * (s - 1)))
        assert step <= 6
        assert budget.end == pytest.approx(1 + 599 / 0.1, abs=1)
        assert budget.progress(step) < 0.002


def test_time_is_left_for_validations_as_predicted_and_then_as_measured() -> None:
    budget = Budget(1000, minutes=10)
    # After 0.4, 0.8 and all of it.
    budget.expect_validations(0.4, steps=20)
    budget.correct(10, elapsed_s=10)
    assert budget.end == 10 + 590 - 3 * 20
    # The first one took 50 s, in which no step was done.
    budget.add_validation(50)
    budget.correct(300, elapsed_s=350)
    assert budget.end == 300 + 250 - 2 * 50


def test_correction_bends_progress_but_never_jumps() -> None:
    budget = Budget(100, minutes=100 / 60)
    budget.correct(5, elapsed_s=5)
    before = budget.progress(25)
    # The machine is twice as slow from step 5 on: 55 s are left, at 45 s for 25 steps.
    assert budget.correct(25, elapsed_s=45)
    assert budget.progress(25) == pytest.approx(before)
    assert budget.end == 25 + round(55 * 25 / 45)
    assert budget.progress(budget.end) == 1


def test_nothing_is_corrected_after_the_first_quarter() -> None:
    budget = Budget(100, minutes=100 / 60)
    due = [step for step in range(1, 100) if budget.correct(step, elapsed_s=step)]
    assert due == [5, 10, 25]
    end = budget.end
    assert not budget.correct(60, elapsed_s=1000)
    assert budget.end == end


def test_state_goes_on_elsewhere() -> None:
    budget = Budget(1000, minutes=2)
    assert budget.correct(5, elapsed_s=7)
    other = Budget(7, minutes=1)
    other.load_state_dict(budget.state_dict())
    assert [other.progress(s) for s in range(300)] == [budget.progress(s) for s in range(300)]


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    config = OptimizerConfig(learning_rate=0.01, warmup=0.1, power=0.9)
    assert learning_rate(config, 0) == pytest.approx(0.01 * 0.01)
    assert learning_rate(config, 0.05) == pytest.approx(0.01 * 0.5 * 0.95**0.9)
    assert learning_rate(config, 0.5) == pytest.approx(0.01 * 0.5**0.9)
    assert learning_rate(config, 1) == 0
