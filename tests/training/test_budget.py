"""Steps, progress and their corrections."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import pytest

from volseg.config import OptimizerConfig
from volseg.training.budget import Budget
from volseg.training.optimizers import learning_rate


def train(budget: Budget, seconds: Iterable[float], step: int = 0, elapsed_s: float = 0) -> int:
    """Steps that take so long each, until the budget is corrected; the step at which it was."""
    for step_s in seconds:
        step, elapsed_s = step + 1, elapsed_s + step_s
        if budget.correct(step, elapsed_s):
            return step
    return -1


def test_progress_is_the_share_of_known_steps() -> None:
    budget = Budget(200)
    assert [budget.progress(step) for step in (0, 50, 200, 300)] == [0, 0.25, 1, 1]
    budget.correct(50, elapsed_s=1e6)
    assert budget.end == 200


def test_measured_speed_replaces_the_prediction_after_some_seconds() -> None:
    budget = Budget(1000, minutes=5)
    # One step a second: 290 s are left for 290 steps, with a validation at the end that is free.
    assert train(budget, repeat(1, 20)) == 10
    assert budget.end == 300
    # As if nothing had been predicted.
    assert budget.progress(10) == pytest.approx(10 / 300)


def test_short_training_is_measured_in_a_twentieth_of_its_time() -> None:
    budget = Budget(1000, minutes=1)
    assert train(budget, repeat(0.5, 20)) == 6
    assert budget.end == 6 + 114


def test_slow_first_step_is_no_measure_of_speed() -> None:
    budget = Budget(1000, minutes=5)
    budget.leave_out(100)
    assert not budget.correct(1, elapsed_s=100)
    # Ten steps took 10 s, and 190 s are left.
    assert train(budget, repeat(1, 20), step=1, elapsed_s=100) == 11
    assert budget.end == 11 + 190
    assert budget.progress(11) == pytest.approx(11 / 201)


def test_step_that_a_busy_machine_held_up_is_no_measure_of_speed() -> None:
    budget = Budget(1000, minutes=3.5)
    budget.leave_out(1)
    assert not budget.correct(1, elapsed_s=1)
    # The second step takes 12 s of 210, and four others a second: 193 s are left.
    assert train(budget, [12, 1, 1, 1, 1, 1], step=1, elapsed_s=1) == 6
    assert budget.end == 6 + 193


def test_few_steps_are_a_measure_where_they_take_a_quarter_of_the_time() -> None:
    budget = Budget(1000, minutes=5)
    # The slower of two, 90 s after 10 s, is left out: 200 s are left.
    assert train(budget, [10, 90]) == 2
    assert budget.end == 2 + 20
    budget = Budget(1000, minutes=1)
    assert train(budget, [20]) == 1
    assert budget.end == 1 + 2


def test_first_step_of_a_resumed_process_is_left_out_too() -> None:
    budget = Budget(1000, minutes=5)
    budget.leave_out(20)
    budget.correct(1, elapsed_s=20)
    train(budget, repeat(1, 3), step=1, elapsed_s=20)
    budget.leave_out(30)
    budget.correct(5, elapsed_s=53)
    # Steps 2 to 4 and 6 to 12 took a second each, and 240 are left.
    assert train(budget, repeat(1, 20), step=5, elapsed_s=53) == 12
    assert budget.end == 12 + 240


def test_prediction_that_was_far_too_low_neither_ends_the_training_nor_uses_it_up() -> None:
    for predicted in (1, 4, 50):
        budget = Budget(predicted, minutes=10)
        budget.leave_out(1)
        budget.correct(1, elapsed_s=1)
        step = train(budget, repeat(0.1, 20), step=1, elapsed_s=1)
        assert step == 6
        assert budget.end == pytest.approx(1 + 599 / 0.1, abs=1)
        assert budget.progress(step) < 0.002


def test_training_of_any_number_of_first_steps_goes_on_until_it_is_measured() -> None:
    budget = Budget(1, minutes=10)
    # Killed after every step.
    for step in range(1, 10):
        budget.leave_out(1)
        budget.correct(step, elapsed_s=step)
        assert budget.end > step


def test_half_of_the_time_is_for_steps_however_long_the_validations_seem() -> None:
    budget = Budget(1000, minutes=5)
    budget.expect_validations(0.25, steps=100)
    # Four validations of 100 steps would take all of the 290 s.
    assert train(budget, repeat(1, 20)) == 10
    assert budget.end == 10 + 145


def test_time_is_left_for_validations_as_predicted_and_then_as_measured() -> None:
    budget = Budget(1000, minutes=10)
    # After 0.4, 0.8 and all of it.
    budget.expect_validations(0.4, steps=20)
    assert train(budget, repeat(1, 20)) == 10
    assert budget.end == 10 + 590 - 3 * 20
    # The first one took 50 s, in which no step was done.
    budget.add_validation(50)
    # Step 27 is 5 per cent of 540; 523 s are left, and two more of 50 s.
    assert train(budget, repeat(1, 50), step=10, elapsed_s=60) == 27
    assert budget.end == 27 + 600 - 77 - 2 * 50


def test_correction_bends_progress_but_never_jumps() -> None:
    budget = Budget(100, minutes=100 / 60)
    assert train(budget, repeat(1, 5)) == 5
    assert train(budget, repeat(1, 5), step=5, elapsed_s=5) == 10
    before = budget.progress(25)
    # The machine is twice as slow from step 10 on: 60 s are left, and 24 steps took 38 s.
    assert train(budget, repeat(2, 50), step=10, elapsed_s=10) == 25
    assert budget.progress(25) == pytest.approx(before)
    assert budget.end == 25 + round(60 * 24 / 38)
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
    assert train(budget, repeat(1.4, 9)) == 5
    other = Budget(7, minutes=1)
    other.load_state_dict(budget.state_dict())
    assert [other.progress(s) for s in range(300)] == [budget.progress(s) for s in range(300)]


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    config = OptimizerConfig(learning_rate=0.01, warmup=0.1, power=0.9)
    assert learning_rate(config, 0) == pytest.approx(0.01 * 0.01)
    assert learning_rate(config, 0.05) == pytest.approx(0.01 * 0.5 * 0.95**0.9)
    assert learning_rate(config, 0.5) == pytest.approx(0.01 * 0.5**0.9)
    assert learning_rate(config, 1) == 0
