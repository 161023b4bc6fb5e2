"""Voxels whose class is not known, or not wholly: the loss says no more than the annotation."""

from __future__ import annotations

import math

import pytest
import torch

from volseg.errors import ConfigError
from volseg.losses import BinaryCrossEntropyDice, DiceCrossEntropy, MultiLevelLoss, RegionLoss

K, REGIONS = 3, [[1, 2], [2]]
UNKNOWN = [[0, 1, 2]]
"""Of the index K nothing is known."""


def make(channels, seed=0):
    generator = torch.manual_seed(seed)
    logits = torch.randn(2, channels, 8, 6, generator=generator)
    return logits, torch.randint(0, K, (2, 8, 6), generator=generator)


def leave_out(target, rows=5):
    """The last rows of an image say nothing."""
    target = target.clone()
    target[:, rows:] = K
    return target


def make_regions(candidates, **options):
    terms = BinaryCrossEntropyDice(ignore=bool(candidates), **options)
    return RegionLoss(terms, REGIONS, K, candidates)


LOSSES = {
    "dice and cross-entropy": (K, lambda sets: DiceCrossEntropy(candidates=sets)),
    "with squares and background": (
        K,
        lambda sets: DiceCrossEntropy(
            squared_denominator=True, include_background=True, candidates=sets
        ),
    ),
    "regions": (2, make_regions),
    "regions by batch": (2, lambda sets: make_regions(sets, batch=True)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_that_of_the_known_voxels(name):
    channels, build = LOSSES[name]
    logits, target = make(channels)
    expected = build(())(logits[:, :, :5], target[:, :5])
    torch.testing.assert_close(build(UNKNOWN)(logits, leave_out(target)), expected)
    torch.testing.assert_close(build(UNKNOWN)(logits, target), build(())(logits, target))


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_from_what_is_unknown(name):
    channels, build = LOSSES[name]
    logits, target = make(channels)
    logits.requires_grad_()
    build(UNKNOWN)(logits, leave_out(target)).backward()
    assert logits.grad[:, :, 5:].abs().max() == 0
    assert logits.grad[:, :, :5].abs().max() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_image_without_annotation_has_a_finite_loss(name):
    channels, build = LOSSES[name]
    logits, target = make(channels)
    logits.requires_grad_()
    loss = build(UNKNOWN)(logits, torch.full_like(target, K))
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad.abs().max() == 0


def test_background_that_may_be_a_class():
    # Two voxels: background or class 2; class 1. Probabilities 1/2, 1/4, 1/4 in both.
    logits = torch.tensor([0.5, 0.25, 0.25]).log().reshape(1, 3, 1, 1).expand(1, 3, 1, 2)
    target = torch.tensor([[[K, 1]]])
    loss = DiceCrossEntropy(dice_weight=0, candidates=[[0, 2]])(logits, target)
    assert loss.item() == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    loss = DiceCrossEntropy(cross_entropy_weight=0, candidates=[[0, 2]])(logits, target)
    # Class 1 sees both voxels, class 2 the second one alone.
    first, second = 2 * 0.25 / (1 + 0.25 + 0.25), 0 / (0 + 0.25)
    assert loss.item() == pytest.approx(1 - (first + second) / 2, abs=1e-4)


def test_region_is_open_where_only_some_candidates_are_in_it():
    seen = []

    class Keep(torch.nn.Module):
        def forward(self, logits, target):
            seen.append(target)
            return logits.sum()

    # Candidates: background or 2; 1 or 2.
    loss = RegionLoss(Keep(), REGIONS, K, [[0, 2], [1, 2]])
    loss(torch.zeros(1, 2, 1, 5), torch.tensor([[[0, 1, 2, 3, 4]]]))
    assert seen[0][0, :, 0].tolist() == [[0, 1, 1, -1, 1], [0, 0, 1, -1, -1]]


def test_coarser_outputs_leave_out_what_their_voxel_says():
    logits, target = make(K)
    coarse = torch.randn(2, K, 4, 3, generator=torch.manual_seed(1))
    loss = MultiLevelLoss(DiceCrossEntropy(candidates=UNKNOWN), "same")
    both = loss([logits, coarse], leave_out(target, rows=6))
    alone = DiceCrossEntropy()
    expected = alone(logits[:, :, :6], target[:, :6])
    expected = expected + alone(coarse[:, :, :3], target[:, 1:6:2, 1::2])
    torch.testing.assert_close(both, expected)


def test_shares_have_no_candidates():
    with pytest.raises(ConfigError, match="expected integer class indices"):
        DiceCrossEntropy(candidates=[[0, 1]])(
            torch.zeros(1, 2, 4, 4), torch.full((1, 2, 4, 4), 0.5)
        )


@pytest.mark.parametrize("candidates", [[[0]], [[0, 3]], [[1, 1]], [[]]])
def test_candidates_are_several_classes(candidates):
    loss = DiceCrossEntropy(candidates=candidates)
    with pytest.raises(ConfigError, match="expected two or more different classes below 3"):
        loss(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long))
