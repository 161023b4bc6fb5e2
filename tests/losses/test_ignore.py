"""Voxels that were not annotated count nowhere: the loss is that of the others alone."""

from __future__ import annotations

import pytest
import torch

from volseg.errors import ConfigError
from volseg.losses import (
    BinaryCrossEntropyDice,
    DiceCrossEntropy,
    MultiLevelLoss,
    RegionLoss,
    SoftDice,
)

K, REGIONS = 3, [[1, 2], [2]]


def make(channels, seed=0):
    generator = torch.manual_seed(seed)
    logits = torch.randn(2, channels, 8, 6, generator=generator)
    return logits, torch.randint(0, K, (2, 8, 6), generator=generator)


def leave_out(target, rows=5):
    """The last rows of an image say nothing."""
    target = target.clone()
    target[:, rows:] = K
    return target


LOSSES = {
    "dice and cross-entropy": (K, lambda ignore: DiceCrossEntropy(ignore=ignore)),
    "with squares and background": (
        K,
        lambda ignore: DiceCrossEntropy(
            squared_denominator=True, include_background=True, ignore=ignore
        ),
    ),
    "dice": (K, lambda ignore: SoftDice(ignore=ignore)),
    "regions": (
        2,
        lambda ignore: RegionLoss(
            BinaryCrossEntropyDice(ignore=ignore), REGIONS, K if ignore else None
        ),
    ),
    "regions by batch": (
        2,
        lambda ignore: RegionLoss(
            BinaryCrossEntropyDice(batch=True, ignore=ignore), REGIONS, K if ignore else None
        ),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_that_of_the_annotated_voxels(name):
    channels, build = LOSSES[name]
    logits, target = make(channels)
    expected = build(False)(logits[:, :, :5], target[:, :5])
    torch.testing.assert_close(build(True)(logits, leave_out(target)), expected)
    torch.testing.assert_close(build(True)(logits, target), build(False)(logits, target))


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_from_what_is_left_out(name):
    channels, build = LOSSES[name]
    logits, target = make(channels)
    logits.requires_grad_()
    build(True)(logits, leave_out(target)).backward()
    assert logits.grad[:, :, 5:].abs().max() == 0
    assert logits.grad[:, :, :5].abs().max() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_image_without_annotation_has_a_finite_loss(name):
    channels, build = LOSSES[name]
    logits, target = make(channels)
    logits.requires_grad_()
    loss = build(True)(logits, torch.full_like(target, K))
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad.abs().max() == 0


def test_coarser_outputs_leave_out_what_their_voxel_says():
    logits, target = make(K)
    coarse = torch.randn(2, K, 4, 3, generator=torch.manual_seed(1))
    loss = MultiLevelLoss(DiceCrossEntropy(ignore=True), "same")
    both = loss([logits, coarse], leave_out(target, rows=6))
    alone = DiceCrossEntropy()
    expected = alone(logits[:, :, :6], target[:, :6])
    expected = expected + alone(coarse[:, :, :3], target[:, 1:6:2, 1::2])
    torch.testing.assert_close(both, expected)


def test_shares_cannot_be_left_out_of_a_softmax():
    with pytest.raises(ConfigError, match="expected integer class indices"):
        DiceCrossEntropy(ignore=True)(torch.zeros(1, 2, 4, 4), torch.full((1, 2, 4, 4), 0.5))
