"""A training that is killed again and again ends as one that was left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TINY
from kill_resume import begin_alike, compare, find_differences, finish, kill_and_resume
from known_speed import QuickAttempt

KILLS = 6
EPOCHS = 20


@pytest.mark.slow
def test_killed_training_ends_bit_for_bit_as_an_undisturbed_one(
    balls: Path, tmp_path: Path
) -> None:
    alone, killed = (
        QuickAttempt(balls, tmp_path / name, EPOCHS, tuple(TINY)) for name in ("alone", "killed")
    )
    finish(alone)
    assert len(alone.read_history()) == EPOCHS
    kills = kill_and_resume(killed, KILLS, seed=0, report=lambda kill: None)
    assert len(kills) >= KILLS // 2
    assert compare(killed, alone) == []


@pytest.mark.slow
def test_training_on_minutes_ends_the_same_once_its_length_is_final(
    balls: Path, tmp_path: Path
) -> None:
    alone, killed = (
        QuickAttempt(balls, tmp_path / name, None, tuple(TINY), minutes=0.3)
        for name in ("alone", "killed")
    )
    begin_alike(killed, alone)
    finish(alone)
    kills = kill_and_resume(killed, 3, seed=0, report=lambda kill: None)
    assert kills
    assert compare(killed, alone) == []


def test_difference_in_the_last_bit_is_found_by_its_name() -> None:
    ours = {"a": [torch.tensor([1.0, 2.0]), 3], "b": {"c": 1.0, "d": None}}
    theirs = {"a": [torch.tensor([1.0, 2.0]), 3], "b": {"c": 1.0, "d": None}}
    assert list(find_differences(ours, theirs)) == []
    theirs["a"][0] = torch.nextafter(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]))
    theirs["b"] = {"c": 1.0, "d": 0}
    assert list(find_differences(ours, theirs)) == ["a[0]", "b.d"]


def test_other_lengths_keys_and_types_are_differences() -> None:
    assert list(find_differences([1], [1, 2], "x")) == ["x"]
    assert list(find_differences({"a": 1}, {"b": 1}, "x")) == ["x"]
    assert list(find_differences(torch.zeros(1), torch.zeros(1, dtype=torch.float64), "x")) == ["x"]
