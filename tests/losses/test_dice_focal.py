from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.losses import FocalLoss
from torch.nn import functional

from volseg.errors import ConfigError
from volseg.losses import DiceFocal, RegionLoss, SoftDice

SHAPES = [(2, 3, 5, 4), (2, 3, 4, 3, 5)]


def draw(shape, seed=0):
    generator = torch.manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randint(0, shape[1], (shape[0], 1, *shape[2:]), generator=generator)
    return logits, target


def one_hot(target, channels):
    return np.stack([target.numpy()[:, 0] == c for c in range(channels)], 1).astype(float)


def softmax(logits):
    e = np.exp(logits.numpy())
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma", [0, 1, 2.0, 3.5])
def test_focal_term_of_classes_by_numpy(shape, gamma):
    logits, target = draw(shape)
    p = softmax(logits)
    picked = (p * one_hot(target, shape[1])).sum(1)
    expected = np.mean(-((1 - picked) ** gamma) * np.log(picked))
    loss = DiceFocal(dice_weight=0, focal_weight=2, gamma=gamma)
    assert loss(logits, target).item() == pytest.approx(2 * expected, rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma", [0, 1, 2.0])
def test_focal_term_of_channels_by_numpy(shape, gamma):
    logits, target = draw(shape)
    p = 1 / (1 + np.exp(-logits.numpy()))
    shares = one_hot(target, shape[1])
    p_true = np.where(shares == 1, p, 1 - p)
    expected = np.mean(-((1 - p_true) ** gamma) * np.log(p_true))
    loss = DiceFocal("sigmoid", dice_weight=0, gamma=gamma)
    assert loss(logits, torch.from_numpy(shares)).item() == pytest.approx(expected, rel=1e-9)


def test_terms_are_those_of_monai_up_to_its_mean_over_classes():
    logits, target = (
        tensor.float() if tensor.is_floating_point() else tensor for tensor in draw(SHAPES[1])
    )
    monai = FocalLoss(to_onehot_y=True, use_softmax=True)(logits, target) * logits.shape[1]
    dice = SoftDice()(logits, target)
    assert DiceFocal()(logits, target).item() == pytest.approx((dice + monai).item(), rel=1e-5)
    shares = torch.from_numpy(one_hot(target, 3)).float()
    monai = FocalLoss()(logits, shares)
    dice = SoftDice("sigmoid")(logits, shares)
    ours = DiceFocal("sigmoid")(logits, shares).item()
    assert ours == pytest.approx((dice + monai).item(), rel=1e-5)


def test_gamma_zero_is_cross_entropy_of_shares_too():
    logits, _ = draw((2, 3, 4, 4))
    shares = torch.rand((2, 3, 4, 4), dtype=torch.float64).softmax(1)
    loss = DiceFocal(dice_weight=0, gamma=0)
    assert loss(logits, shares).item() == pytest.approx(
        functional.cross_entropy(logits, shares).item()
    )
    loss = DiceFocal("sigmoid", dice_weight=0, gamma=0)
    expected = functional.binary_cross_entropy_with_logits(logits, shares)
    assert loss(logits, shares).item() == pytest.approx(expected.item())


def test_half_a_share_by_hand():
    # One channel, p = 3/4, share 1/2, gamma 1: half of 1/4 * -log 3/4, half of 3/4 * -log 1/4.
    logits = torch.tensor([[[math.log(3)]]])
    expected = -0.5 * (0.25 * math.log(0.75) + 0.75 * math.log(0.25))
    loss = DiceFocal("sigmoid", dice_weight=0, gamma=1)(logits, torch.tensor([[[0.5]]]))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("size", [0.0, 1.0, 200.0])
@pytest.mark.parametrize("gamma", [0, 1, 2])
def test_gradient_is_finite_for_absent_classes_and_certain_predictions(activation, size, gamma):
    logits = torch.full((1, 3, 4, 4), -size)
    logits[:, 0] = size
    logits.requires_grad_()
    target = torch.zeros(1, 1, 4, 4, dtype=torch.long)
    loss = DiceFocal(activation, gamma=gamma)(logits, target)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_regions_are_compared_by_sigmoid():
    logits, target = draw((1, 2, 4, 4))
    regions = RegionLoss(DiceFocal("sigmoid"), [[1, 2], [2]], 3)
    shares = torch.cat([(target >= 1), (target == 2)], 1).double()
    assert regions(logits, target) == DiceFocal("sigmoid")(logits, shares)
    with pytest.raises(ConfigError, match="with softmax"):
        RegionLoss(DiceFocal(), [[1]])


@pytest.mark.parametrize(
    "options",
    [{"gamma": 0.5}, {"gamma": -1}, {"gamma": "2"}, {"focal_weight": -1}, {"activation": "tanh"}],
)
def test_wrong_option_is_refused(options):
    with pytest.raises(ConfigError, match="expected"):
        DiceFocal(**options)
