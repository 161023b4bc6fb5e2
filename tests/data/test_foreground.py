"""Small parts and rare classes are centred on as often as the rule says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from makers import keep

from volseg.data.cache import CachedCase
from volseg.data.foreground import FOREGROUND_VOXELS, choose_shares, draw_parts, draw_voxels
from volseg.data.patches import PatchDataset


@pytest.mark.parametrize("dims", [2, 3])
def test_half_of_the_positions_are_shared_by_the_parts(dims: int) -> None:
    mask = np.zeros((40,) * dims, bool)
    mask[(slice(2, 30),) * dims] = True
    small = (slice(34, 36),) * dims
    mask[small] = True
    positions = draw_parts(np.random.default_rng(0), mask)
    assert mask[tuple(positions.T)].all()
    assert positions.dtype == np.int32
    volume = 28**dims + 2**dims
    assert len(positions) == 2 * min(volume, FOREGROUND_VOXELS // 2)
    is_small = (positions >= 34).all(1)
    # A quarter by parts, and its share of the voxels in the other half.
    assert is_small.mean() == pytest.approx(0.25 + 0.5 * 2**dims / volume, abs=0.03)
    assert len(np.unique(positions[is_small], axis=0)) == 2**dims


@pytest.mark.parametrize("size", [1, 2])
def test_the_smallest_parts_are_all_there(size: int) -> None:
    mask = np.zeros((60, 60), bool)
    mask[::6, :size] = True
    for seed in range(20):
        positions = draw_parts(np.random.default_rng(seed), mask)
        assert len(np.unique(positions, axis=0)) == mask.sum()
    # Beside one that fills the places alone.
    mask = np.zeros((200, 200), bool)
    mask[:, 20:] = True
    mask[::6, :size] = True
    positions = draw_parts(np.random.default_rng(0), mask)
    assert set(range(0, 200, 6)) == set(positions[positions[:, 1] < size, 0].tolist())


def test_one_part_is_drawn_evenly_and_once() -> None:
    mask = np.zeros((50, 60), bool)
    mask[10:30, 5:25] = True
    # Touching by a corner is touching.
    mask[30, 25] = True
    positions = draw_parts(np.random.default_rng(0), mask)
    assert len(np.unique(positions, axis=0)) == len(positions) == mask.sum()
    nothing = draw_parts(np.random.default_rng(0), np.zeros((4, 5, 6), bool))
    assert nothing.shape == (0, 3)


def test_large_masks_are_thinned() -> None:
    positions = draw_voxels(np.random.default_rng(0), np.ones((200, 100), bool))
    assert len(np.unique(positions, axis=0)) == FOREGROUND_VOXELS
    assert positions.mean(0) == pytest.approx([99.5, 49.5], abs=2)


def test_shares_of_classes_by_hand() -> None:
    assert choose_shares([[0, 1, 2], [0, 1, 2]], 3) == pytest.approx([0.5, 0.5])
    # Square roots of 1 and 1 / 4.
    assert choose_shares([[0, 1, 2, 3], [2]], 4) == pytest.approx([2 / 3, 1 / 3])


def test_classes_that_no_output_shows_have_no_centre() -> None:
    cases = make_cases([(5, 5, 5), (5, 0, 5)])
    patches = PatchDataset(
        cases, (4, 4), batch_size=2, foreground=1, augment=keep, seed=0, classes=(2, 3)
    )
    assert patches.holders == [(2, [0]), (3, [0, 1])]


def make_cases(counts: list[tuple[int, ...]]) -> list[CachedCase]:
    return [CachedCase(Path(str(i)), str(i), row) for i, row in enumerate(counts)]


def test_a_class_of_one_case_is_centred_on_that_case() -> None:
    cases = make_cases([(5, 0), (5, 0), (5, 9), (5, 0), (0, 0)])
    patches = PatchDataset(cases, (4, 4), batch_size=2, foreground=1, augment=keep, seed=0)
    rng = np.random.default_rng(0)
    chosen = [patches._choose(number, rng, True) for number in range(4000)]
    rare = [case for case, index in chosen if index == 2]
    assert set(rare) == {2}
    # Square roots of 4 / 5 and 1 / 5.
    assert len(rare) / len(chosen) == pytest.approx(1 / 3, abs=0.03)
    common = [case for case, index in chosen if index == 1]
    assert set(common) == {0, 1, 2, 3}
    # Four turns of five are those of cases that have the class; the fifth is shared by them.
    assert np.bincount(common) / len(common) == pytest.approx([0.25] * 4, abs=0.03)


def test_every_case_keeps_its_turn_where_all_have_every_class() -> None:
    patches = PatchDataset(
        make_cases([(5, 5)] * 7), (4, 4), batch_size=2, foreground=1, augment=keep, seed=0
    )
    rng = np.random.default_rng(0)
    cases = [patches._choose(number, rng, True)[0] for number in range(70)]
    assert np.bincount(cases).tolist() == [10] * 7


def test_cases_without_foreground_train_as_they_are() -> None:
    patches = PatchDataset(
        make_cases([(0,), (0,)]), (4, 4), batch_size=2, foreground=1, augment=keep, seed=0
    )
    assert patches._choose(0, np.random.default_rng(0), True)[1] is None
