"""Parts that are too small leave the label map, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest

from volseg.data.cases import Classes
from volseg.errors import ConfigError
from volseg.inference.postprocessing import Postprocessing, plan_postprocessing

CLASSES = Classes(names=("background", "liver", "tumour"), values=(0, 5, 7))


def make_labels() -> np.ndarray:
    labels = np.zeros((20, 20, 20), np.uint8, order="F")
    labels[1:5, 1:5, 1:5] = 5  # 64 voxels
    labels[5, 5, 5] = 5  # touches the first by a corner
    labels[10:13, 10:13, 10:13] = 5  # 27
    labels[1:3, 15:17, 1:3] = 7  # 8
    labels[8, 15, 1:5] = 7  # 4
    labels[15, 15, 15] = 7  # 1
    return labels


def count(labels: np.ndarray) -> dict[int, int]:
    values, numbers = np.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), numbers.tolist(), strict=True))


def test_the_largest_part_of_a_class_is_kept() -> None:
    labels = make_labels()
    Postprocessing(largest=(5,)).apply(labels, 0, 1.0)
    assert count(labels) == {0: 8000 - 65 - 13, 5: 65, 7: 13}
    assert labels[5, 5, 5] == 5
    assert labels[11, 11, 11] == 0


def test_small_parts_of_a_class_are_dropped() -> None:
    labels = make_labels()
    # A voxel has 2 ml, so that parts of 4 voxels are just large enough.
    Postprocessing(least_ml={7: 8.0}).apply(labels, 0, 2.0)
    assert count(labels) == {0: 8000 - 92 - 12, 5: 92, 7: 12}


def test_both_rules_and_other_backgrounds() -> None:
    labels = make_labels()
    labels[labels == 0] = 3
    Postprocessing(largest=(5, 7), least_ml={7: 100.0}).apply(labels, 3, 1.0)
    assert count(labels) == {3: 8000 - 65, 5: 65}


def test_an_absent_class_and_pictures_are_fine() -> None:
    labels = np.zeros((8, 8), np.uint8)
    labels[0, 0] = labels[1, 1] = labels[5, 5] = 5
    Postprocessing(largest=(5, 7)).apply(labels, 0, 1.0)
    assert count(labels) == {0: 62, 5: 2}


def test_classes_are_taken_by_name() -> None:
    planned = plan_postprocessing(CLASSES, ["all"], {"tumour": 0.5, "all": 2.0})
    assert planned.largest == (5, 7)
    assert planned.least_ml == {5: 2.0, 7: 0.5}
    assert plan_postprocessing(CLASSES, ["liver"], {}).largest == (5,)
    with pytest.raises(ConfigError, match=r"class 'livre'; expected one of.*Did you mean 'liver'"):
        plan_postprocessing(CLASSES, ["livre"], {})
    with pytest.raises(ConfigError, match="least volume of tumour=0 ml"):
        plan_postprocessing(CLASSES, [], {"tumour": 0.0})
