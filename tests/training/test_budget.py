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
        budget.add_step(step_s)
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
    budget.leave_out_step(100)
    assert not budget.correct(1, elapsed_s=100)
    # Five steps took 5 s, and 195 s are left.
    assert train(budget, repeat(1, 20), step=1, elapsed_s=100) == 6
    assert budget.end == 6 + 195
    assert budget.progress(6) == pytest.approx(6 / 201)


def test_slow_first_step_brings_no_correction_forward() -> None:
    budget = Budget(1000, minutes=5)
    # Compiling took a third of the minutes; of the 200 s behind it, 10 are a twentieth.
    budget.leave_out_step(100)
    step, elapsed_s, due = 1, 100.0, []
    while step < budget.end:
        step, elapsed_s = step + 1, elapsed_s + 1
        budget.add_step(1)
        if budget.correct(step, elapsed_s):
            due.append(elapsed_s)
    # A quarter of 200 s at last.
    assert due == [105, 110, 120, 150]
    assert elapsed_s == 300


def test_step_that_a_busy_machine_held_up_is_no_measure_of_speed() -> None:
    budget = Budget(1000, minutes=3.5)
    budget.leave_out_step(1)
    assert not budget.correct(1, elapsed_s=1)
    # The second step takes 12 s of 210, and four others a second: 193 s are left.
    assert train(budget, [12, 1, 1, 1, 1, 1], step=1, elapsed_s=1) == 6
    assert budget.end == 6 + 193


def test_few_slow_steps_are_a_guess_that_others_replace() -> None:
    budget = Budget(1000, minutes=5)
    # The slower of two, 90 s after 10 s, is left out: 200 s are left for steps of 10 s.
    assert train(budget, [10, 90]) == -1
    assert budget.is_guess
    assert budget.end == 2 + 20
    # The others take a second each: 197 s are left after the third of them.
    assert train(budget, [1, 1, 1], step=2, elapsed_s=100) == 5
    # Without the slowest, 13 s for four steps.
    assert budget.end == 5 + round(197 / (13 / 4))
    assert not budget.is_guess


def test_training_of_few_slow_steps_ends_with_its_time() -> None:
    budget = Budget(1000, minutes=1)
    budget.leave_out_step(20)
    budget.correct(1, elapsed_s=20)
    assert budget.end > 6
    # 20 s are left for one more step, and none behind that.
    assert train(budget, [20], step=1, elapsed_s=20) == -1
    assert budget.end == 3
    assert train(budget, [20], step=2, elapsed_s=40) == -1
    assert budget.end == 3
    assert budget.progress(3) == 1


def test_first_steps_alone_end_with_their_time_too() -> None:
    budget = Budget(1000, minutes=1)
    budget.leave_out_step(70)
    assert not budget.correct(1, elapsed_s=70)
    assert budget.end == 1


def test_first_step_of_a_resumed_process_is_left_out_too() -> None:
    budget = Budget(1000, minutes=5)
    budget.leave_out_step(20)
    budget.correct(1, elapsed_s=20)
    train(budget, repeat(1, 3), step=1, elapsed_s=20)
    budget.leave_out_step(30)
    budget.correct(5, elapsed_s=53)
    # Steps 2 to 4 and 6 to 12 took a second each, and 240 are left.
    assert train(budget, repeat(1, 20), step=5, elapsed_s=53) == 12
    assert budget.end == 12 + 240


def test_prediction_that_was_far_too_low_neither_ends_the_training_nor_uses_it_up() -> None:
    for predicted in (1, 4, 50):
        budget = Budget(predicted, minutes=10)
        budget.leave_out_step(1)
        budget.correct(1, elapsed_s=1)
        step = train(budget, repeat(0.1, 20), step=1, elapsed_s=1)
        assert step == 6
        assert budget.end == pytest.approx(1 + 599 / 0.1, abs=1)
        assert budget.progress(step) < 0.002


def test_training_of_any_number_of_first_steps_goes_on_until_it_is_measured() -> None:
    budget = Budget(1, minutes=10)
    # Killed after every step.
    for step in range(1, 10):
        budget.leave_out_step(1)
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
    # 60 s are a tenth of 600; 535 s are left behind five steps more, and two validations of 50 s.
    assert train(budget, repeat(1, 50), step=10, elapsed_s=60) == 15
    assert budget.end == 15 + 600 - 65 - 2 * 50


def test_correction_bends_progress_but_never_jumps() -> None:
    budget = Budget(100, minutes=100 / 60)
    assert train(budget, repeat(1, 5)) == 5
    assert train(budget, repeat(1, 5), step=5, elapsed_s=5) == 10
    before = budget.progress(18)
    # The machine is twice as slow from step 10 on: the clock says a quarter at step 18, 74 s are
    # left, and the last steps alone say how long one takes.
    assert train(budget, repeat(2, 50), step=10, elapsed_s=10) == 18
    assert budget.progress(18) == pytest.approx(before)
    assert budget.end == 18 + 37
    assert budget.progress(budget.end) == 1


def test_first_steps_that_were_too_fast_are_noticed_by_the_clock() -> None:
    budget = Budget(1000, minutes=10)
    # 20 steps in two seconds promise 6,000, of which five per cent would take 280 s from there.
    assert train(budget, repeat(0.1, 200)) == 20
    assert budget.end == 6000
    # 30 s, five per cent of the minutes, come first.
    assert train(budget, repeat(1, 300), step=20, elapsed_s=2) == 48
    assert budget.end == 48 + 570


def test_nothing_is_corrected_or_counted_after_the_first_quarter() -> None:
    budget = Budget(100, minutes=100 / 60)
    due = []
    for step in range(1, 100):
        budget.add_step(1)
        if budget.correct(step, elapsed_s=step):
            due.append(step)
    assert due == [5, 10, 25]
    state = budget.state_dict()
    assert not budget.correct(60, elapsed_s=1000)
    budget.add_step(7)
    budget.add_validation(9)
    assert budget.state_dict() == state


def test_training_that_settles_ends_in_a_fifth_of_its_steps_more() -> None:
    for budget in (Budget(1000), Budget(1000, minutes=1000 / 60)):
        budget.settle(100)
        assert budget.end == 120
        assert budget.is_final
        assert budget.progress(100) == pytest.approx(0.1)
        assert budget.progress(110) == pytest.approx(0.1 + 0.9 / 2)
        assert budget.progress(120) == 1


def test_settling_never_makes_a_training_longer_and_counts_its_own_steps_alone() -> None:
    budget = Budget(1000)
    budget.settle(990)
    assert budget.end == 1000
    budget.extend(1000, elapsed_s=60, num_steps=500)
    budget.settle(1100)
    assert budget.end == 1120


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
