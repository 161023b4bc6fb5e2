from __future__ import annotations

import math

import numpy as np
import pytest

from volseg.errors import DataError
from volseg.evaluation.metrics import Overlap, compute_dice, compute_voxel_ml, count_overlaps
from volseg.geometry import Geometry


def draw(*rows: str) -> np.ndarray:
    """Labels from a drawing: a digit is a label, a point is background."""
    return np.array([[int(c) if c.isdigit() else 0 for c in row] for row in rows])


def test_dice_is_twice_the_shared_voxels_over_the_sum():
    prediction = draw("11..", "11..") == 1
    reference = draw(".11.", ".11.") == 1
    assert compute_dice(prediction, reference) == 2 * 2 / (4 + 4)


def test_dice_of_equal_masks_is_one():
    mask = draw("1.1", ".1.") == 1
    assert compute_dice(mask, mask) == 1.0


def test_dice_is_nan_if_both_masks_are_empty():
    empty = np.zeros((3, 3), dtype=bool)
    assert math.isnan(compute_dice(empty, empty))


def test_dice_is_zero_if_one_mask_is_empty():
    empty, mask = np.zeros((2, 2), dtype=bool), np.ones((2, 2), dtype=bool)
    assert compute_dice(empty, mask) == compute_dice(mask, empty) == 0.0


def test_dice_refuses_masks_of_different_shapes():
    with pytest.raises(DataError, match=r"\(2, 2\) and reference \(2, 1\)"):
        compute_dice(np.ones((2, 2), dtype=bool), np.ones((2, 1), dtype=bool))


def test_overlaps_are_counted_for_every_value_on_either_side():
    prediction = draw("11.2", "7...")
    reference = draw("1.22", "....")
    assert count_overlaps(prediction, reference) == {
        1: Overlap(reference_voxels=1, prediction_voxels=2, shared_voxels=1),
        2: Overlap(reference_voxels=2, prediction_voxels=1, shared_voxels=1),
        7: Overlap(reference_voxels=0, prediction_voxels=1, shared_voxels=0),
    }


def test_overlaps_leave_out_a_background_other_than_zero():
    labels = draw("99..", "95..")
    assert set(count_overlaps(labels, labels, background=9)) == {0, 5}


def test_overlaps_agree_with_dice_of_masks_for_random_labels():
    rng = np.random.default_rng(0)
    prediction, reference = rng.integers(0, 4, (2, 6, 7, 8)).astype(np.uint8)
    for value, overlap in count_overlaps(prediction, reference).items():
        assert overlap.dice == compute_dice(prediction == value, reference == value)


def test_voxel_volume_of_a_sheared_grid_is_its_determinant():
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[0, 1] = 1.0  # A shear lengthens an axis but keeps the volume: 2 * 3 * 4 mm^3.
    assert compute_voxel_ml(Geometry((5, 5, 5), affine)) == pytest.approx(0.024)


def test_a_picture_has_no_voxel_volume():
    assert compute_voxel_ml(Geometry((5, 5), np.eye(4))) is None
