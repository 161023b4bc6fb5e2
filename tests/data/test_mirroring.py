from __future__ import annotations

import numpy as np
import pytest
import torch

from volseg.data.cases import Classes
from volseg.data.mirroring import are_numbered, find_sides, plan_mirroring

KIDNEYS = Classes(names=("background", "kidney_right", "kidney_left", "spine"), values=(0, 5, 6, 7))


@pytest.mark.parametrize(
    ("names", "pairs", "single"),
    [
        (("Left Hippocampus", "Right Hippocampus"), [(0, 1)], []),
        (("lung_upper_lobe_left", "lung_lower_lobe_left"), [], [0, 1]),
        (("lung.upper.R", "lung.upper.L", "lung.lower.L"), [(1, 0)], []),
        (("ctx-lh-cuneus", "ctx-rh-cuneus"), [(0, 1)], []),
        (("atrium left", "ventricle right"), [], [0, 1]),
        (("l", "vertebra L", "heart"), [], []),
        (("tumour", "oedema"), [], []),
        (("kidney (left)", "kidney (right)"), [(0, 1)], []),
        (("RightKidney", "LeftKidney", "LVentricle", "RVentricle"), [(1, 0), (2, 3)], []),
        (("left lung L", "right lung R"), [(0, 1)], []),
        (("left to right shunt", "heart"), [], [0]),
        (("left lung", "right lung", "lung left"), [(0, 1)], [2]),
        (("печень left", "почка right"), [], [0, 1]),
        (("почка left", "почка right"), [(0, 1)], []),
    ],
)
def test_sides_follow_from_the_names(names, pairs, single):
    assert find_sides(names) == (pairs, single)


def test_paired_classes_change_places_when_left_becomes_right():
    mirroring = plan_mirroring(KIDNEYS, 3)
    assert mirroring.axes == (0, 1, 2)
    label = torch.tensor([[1, 0, 3], [0, 0, 2]])[..., None]
    image = torch.arange(6.0).reshape(1, 2, 3, 1)
    mirrored, swapped = mirroring.apply(image, label, (0,))
    assert mirrored[0, :, :, 0].tolist() == [[3, 4, 5], [0, 1, 2]]
    # The right kidney (1) lay where the left one (2) lies now, and carries its name.
    assert swapped[:, :, 0].tolist() == [[0, 0, 1], [2, 0, 3]]


def test_other_axes_leave_the_names():
    label = torch.tensor([[1, 0, 2]])[..., None]
    mirroring = plan_mirroring(KIDNEYS, 3)
    assert mirroring.apply(label[None], label, (1,))[1][0, :, 0].tolist() == [2, 0, 1]
    image, same = mirroring.apply(label[None], label, ())
    assert same is label
    assert torch.equal(image[0], label)


def test_side_without_counterpart_rules_the_axis_out():
    classes = Classes(names=("background", "left atrium", "spine"), values=(0, 1, 2))
    assert plan_mirroring(classes, 3).axes == (1, 2)


def test_ignored_voxels_stay_ignored():
    classes = KIDNEYS.model_copy(update={"ignore": 255})
    mirroring = plan_mirroring(classes, 2)
    label = torch.tensor([[1], [4]])
    assert mirroring.apply(label[None], label, (0,))[1].tolist() == [[4], [2]]


def test_partly_annotated_sides_are_not_mirrored():
    # Where only the right kidney was annotated, the background may be the left one.
    classes = KIDNEYS.model_copy(update={"unsure": ((0, 2),)})
    assert plan_mirroring(classes, 3).axes == (1, 2)


def test_axes_are_drawn_with_the_probability():
    mirroring = plan_mirroring(KIDNEYS, 3)
    drawn = [mirroring.draw((0.25,) * 3, np.random.default_rng(seed)) for seed in range(2000)]
    for axis in range(3):
        share = sum(axis in axes for axes in drawn) / len(drawn)
        assert share == pytest.approx(0.25, abs=0.04)
    assert mirroring.draw((0, 0, 0), np.random.default_rng(3)) == ()


def test_a_single_sagittal_slice_keeps_its_side():
    label = torch.tensor([[[1, 0, 2]]])
    image = torch.arange(3.0).reshape(1, 1, 1, 3)
    mirrored, kept = plan_mirroring(KIDNEYS, 3).apply(image, label, (0, 2))
    assert mirrored.flatten().tolist() == [2, 1, 0]
    assert kept.flatten().tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("names", "regions", "axes"),
    [
        # Of classes without a side nobody knows which is the counterpart of which.
        (("a", "b", "c", "d"), {"left lung": (1, 2), "right lung": (3, 4)}, (1, 2)),
        (
            ("left lung", "left nodule", "right lung", "right nodule"),
            {"left side": (1, 2), "right side": (3, 4), "lungs": (1, 2, 3, 4)},
            (0, 1, 2),
        ),
        (("left lung", "x", "right lung", "y"), {"left": (1, 2), "right": (3, 4)}, (1, 2)),
        (("left lung", "right lung", "x", "y"), {"lung": (1,), "rest": (2, 3, 4)}, (1, 2)),
        (("oedema", "core", "x", "y"), {"whole": (1, 2, 3), "core": (2,)}, (0, 1, 2)),
    ],
)
def test_regions_with_a_side_are_mirrored_only_where_they_become_each_other(names, regions, axes):
    classes = Classes(
        names=("background", *names),
        values=(0, 1, 2, 3, 4),
        regions=[{"name": name, "values": values} for name, values in regions.items()],
    )
    assert plan_mirroring(classes, 3).axes == axes


def test_mirroring_says_what_it_does():
    assert plan_mirroring(KIDNEYS, 3).describe(KIDNEYS.names) == (
        "right-left, posterior-anterior, inferior-superior; kidney_right and kidney_left change "
        "places with left and right"
    )
    single = Classes(names=("background", "left atrium"), values=(0, 1))
    assert plan_mirroring(single, 3).describe(single.names) == (
        "posterior-anterior, inferior-superior; left and right stay"
    )


def test_classes_without_names_are_known_as_such():
    assert are_numbered(["label_1", "label_2"])
    assert not are_numbered(["label_1"])
    assert not are_numbered(["label_1", "left kidney"])
