from __future__ import annotations

import pytest
import torch
from monai.losses import DiceLoss
from torch import nn
from torch.nn import functional

from volseg.errors import ConfigError
from volseg.losses import (
    BinaryCrossEntropyDice,
    DiceCrossEntropy,
    MultiLevelLoss,
    RegionLoss,
    SoftDice,
)

BRATS = [[1, 2, 3], [1, 3], [3]]
"""Whole tumour, tumour core, enhancing tumour."""


class Recorder(nn.Module):
    """Keeps every target it is given."""

    def __init__(self):
        super().__init__()
        self.targets = []

    def forward(self, logits, target):
        self.targets.append(target)
        return logits.sum()


def regions_seen(regions, target):
    recorder = Recorder()
    RegionLoss(recorder, regions)(torch.zeros(1, len(regions), 2, 2), target)
    return recorder.targets[0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.long])
def test_integer_target_becomes_regions(dtype):
    target = torch.tensor([[[0, 1], [2, 3]]], dtype=dtype)
    expected = [[[0, 1], [1, 1]], [[0, 1], [0, 1]], [[0, 0], [0, 1]]]
    for integer in (target, target[:, None]):
        seen = regions_seen(BRATS, integer)
        assert seen.tolist() == [expected]
        assert seen.dtype == torch.float32


def test_class_in_no_region_is_outside_all():
    target = torch.tensor([[[0, 1], [2, 9]]])
    assert regions_seen([[2]], target).tolist() == [[[[0, 0], [1, 0]]]]


def test_shares_of_the_classes_of_a_region_are_added():
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4]).reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
    seen = regions_seen(BRATS, shares)[0, :, 0, 0]
    torch.testing.assert_close(seen, torch.tensor([0.9, 0.6, 0.4]))


def test_value_is_that_of_the_loss_on_the_regions():
    logits = torch.randn(2, 3, 4, 4, 4, generator=torch.manual_seed(0))
    target = torch.randint(0, 4, (2, 4, 4, 4), generator=torch.manual_seed(1))
    regions = torch.stack([target > 0, (target == 1) | (target == 3), target == 3], 1).float()
    for loss in (BinaryCrossEntropyDice(), SoftDice("sigmoid", squared_denominator=True)):
        assert RegionLoss(loss, BRATS)(logits, target) == loss(logits, regions)


def region_pyramid(reduce):
    """Targets at strides 1, 2 and 4 that the loss sees, and the integer one they come from."""
    generator = torch.manual_seed(0)
    target = torch.randint(0, 4, (2, 1, 8, 8), generator=generator)
    target *= torch.rand(target.shape, generator=generator) < 0.3
    recorder = Recorder()
    loss = MultiLevelLoss(RegionLoss(recorder, BRATS), target=reduce)
    loss([torch.zeros(2, 3, 8 >> level, 8 >> level) for level in range(3)], target[:, 0])
    return recorder.targets, target


def as_regions(target):
    parts = [target > 0, (target == 1) | (target == 3), target == 3]
    return torch.cat(parts, 1).float()


def test_levels_of_nearest_targets():
    seen, target = region_pyramid("nearest-exact")
    for level, stride in enumerate((1, 2, 4)):
        assert torch.equal(
            seen[level], as_regions(target[:, :, stride // 2 :: stride, stride // 2 :: stride])
        )


def test_levels_of_area_targets_are_shares_of_the_regions():
    seen, target = region_pyramid("area")
    for level, stride in enumerate((1, 2, 4)):
        expected = functional.avg_pool2d(as_regions(target), stride)
        torch.testing.assert_close(seen[level], expected)


def test_levels_of_max_targets_keep_any_foreground():
    seen, target = region_pyramid("max")
    for level, stride in enumerate((1, 2, 4)):
        whole, core, enhancing = seen[level].unbind(1)
        assert torch.equal(whole, functional.max_pool2d(as_regions(target)[:, 0], stride))
        assert (enhancing <= core).all()
        assert (core <= whole).all()


def test_max_takes_the_class_and_not_the_region():
    # Class 2 fills two voxels of the block, classes 1 and 3 one each: whole tumour, not its core.
    recorder = Recorder()
    loss = MultiLevelLoss(RegionLoss(recorder, BRATS), [0, 1], target="max")
    loss([torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 1, 1)], torch.tensor([[[1, 2], [2, 3]]]))
    assert recorder.targets[1].flatten().tolist() == [1, 0, 0]


@pytest.mark.parametrize("target", ["nearest-exact", "area", "max"])
def test_gradient_reaches_all_levels(target):
    logits = [torch.zeros(1, 3, 8 >> i, 8 >> i, requires_grad=True) for i in range(3)]
    labels = torch.randint(0, 4, (1, 8, 8), generator=torch.manual_seed(0))
    loss = MultiLevelLoss(RegionLoss(BinaryCrossEntropyDice(), BRATS), target=target)
    loss(logits, labels).backward()
    assert all(level.grad.abs().max() > 0 for level in logits)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([], "no regions"),
        ([[1], []], r"region \[\]; expected one or more different classes"),
        ([[0, 1]], r"region \[0, 1\]; expected"),
        ([[1, 1]], r"region \[1, 1\]; expected"),
        ([[1, 2], 3], "region 3; expected .* as a list"),
        ([[1.5]], r"region \[1\.5\]; expected"),
    ],
)
def test_wrong_regions_are_refused(regions, message):
    with pytest.raises(ConfigError, match=message):
        RegionLoss(BinaryCrossEntropyDice(), regions)


@pytest.mark.parametrize("loss", [DiceCrossEntropy(), SoftDice(), DiceLoss(softmax=True)])
def test_classes_that_exclude_each_other_are_no_regions(loss):
    with pytest.raises(ConfigError, match=f"{type(loss).__name__} with softmax"):
        RegionLoss(loss, BRATS)
    RegionLoss(SoftDice("sigmoid"), BRATS)
    RegionLoss(DiceLoss(sigmoid=True), BRATS)
    with pytest.raises(ConfigError, match="regions 3; expected a list of lists"):
        RegionLoss(SoftDice("sigmoid"), 3)


@pytest.mark.parametrize(
    ("channels", "target"),
    [
        (2, torch.zeros(1, 4, 4, dtype=torch.long)),
        (3, torch.zeros(1, 3, 4, 4)),
        (3, torch.zeros(1, 4, 4, 4, dtype=torch.long)),
    ],
)
def test_logits_and_target_that_do_not_fit_are_refused(channels, target):
    with pytest.raises(ConfigError, match="one channel of logits for each of 3 regions"):
        RegionLoss(BinaryCrossEntropyDice(), BRATS)(torch.zeros(1, channels, 4, 4), target)
