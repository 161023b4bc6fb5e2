from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from volseg.errors import ConfigError
from volseg.losses import SoftDice

TARGET = torch.tensor([[[0, 0], [1, 1]]])


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("squared", "probabilities"), [(False, 2), (True, 1)])
def test_denominators_by_hand(activation, squared, probabilities):
    # p = 1/2 in 4 pixels: sum 2, sum of squares 1. Reference 2, intersection 1, in both channels.
    expected = 1 - (2 * 1 + 1e-5) / (probabilities + 2 + 1e-5)
    loss = SoftDice(activation, squared)(torch.zeros(1, 2, 2, 2), TARGET)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("activation", "include_background", "channels"),
    [
        ("softmax", None, [1]),
        ("softmax", True, [0, 1]),
        ("sigmoid", None, [0, 1]),
        ("sigmoid", False, [1]),
    ],
)
def test_background_counts_by_default_under_a_sigmoid_only(
    activation, include_background, channels
):
    logits = torch.randn(1, 2, 2, 2, generator=torch.manual_seed(0))
    p = logits.softmax(1) if activation == "softmax" else logits.sigmoid()
    g = functional.one_hot(TARGET, 2).movedim(-1, 1)
    dice = [2 * (p[0, k] * g[0, k]).sum() / (p[0, k].sum() + 2) for k in channels]
    expected = 1 - sum(dice) / len(dice)
    loss = SoftDice(activation, include_background=include_background)(logits, TARGET)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_smoothing_is_added_above_and_below():
    loss = SoftDice(smooth=1.0)(torch.zeros(1, 2, 2, 2), TARGET)
    assert loss.item() == pytest.approx(1 - 3 / 5)


def test_one_channel_under_a_sigmoid_is_class_one():
    # p = 3/4 in class 1 and 1/4 outside: I = 3/2, P = 2, R = 2.
    logits = torch.log(torch.tensor([1 / 3, 3.0]))[TARGET][:, None]
    loss = SoftDice("sigmoid")(logits, TARGET)
    assert loss.item() == pytest.approx(1 - 3 / 4, abs=1e-5)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_soft_target_is_met_by_equal_probabilities(activation, squared):
    logits = torch.randn(2, 3, 4, 4, dtype=torch.double, generator=torch.manual_seed(0))
    target = logits.softmax(1) if activation == "softmax" else logits.sigmoid()
    loss = SoftDice(activation, squared)
    assert loss(logits, target).item() == pytest.approx(0, abs=1e-9)
    assert loss(2 * logits, target).item() > 0.01


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_soft_target_of_zeros_and_ones_gives_the_value_of_the_classes(activation, squared):
    logits = torch.randn(2, 3, 4, 4, generator=torch.manual_seed(0))
    target = torch.randint(0, 3, (2, 4, 4), generator=torch.manual_seed(1))
    soft = functional.one_hot(target, 3).movedim(-1, 1).float()
    loss = SoftDice(activation, squared)
    torch.testing.assert_close(loss(logits, soft), loss(logits, target))


@pytest.mark.parametrize("target", [TARGET, torch.full((1, 2, 2, 2), 0.3, dtype=torch.double)])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_gradient_is_that_of_the_value(activation, squared, target):
    logits = torch.randn(1, 2, 2, 2, dtype=torch.double, generator=torch.manual_seed(0))
    loss = SoftDice(activation, squared)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits.requires_grad_())


@pytest.mark.parametrize("squared", [False, True])
def test_gradient_of_certain_probabilities_is_finite(squared):
    logits = torch.tensor([1e4, -1e4]).reshape(1, 2, 1, 1).repeat(1, 1, 2, 2).requires_grad_()
    SoftDice(squared_denominator=squared)(logits, torch.zeros_like(TARGET)).backward()
    assert torch.isfinite(logits.grad).all()


def test_half_precision_sums_do_not_overflow():
    logits = torch.zeros(1, 1, 400, 400, dtype=torch.float16)
    target = torch.ones(1, 400, 400, dtype=torch.long)
    assert SoftDice("sigmoid")(logits, target).item() == pytest.approx(1 / 3, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"activation": "sigmoid", "include_background": False}])
def test_background_alone_is_refused(options):
    with pytest.raises(ConfigError, match="expected 2 or more channels"):
        SoftDice(**options)(torch.zeros(1, 1, 2, 2), TARGET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tanh"}, "activation 'tanh'; expected softmax or sigmoid"),
        ({"smooth": 0}, "smooth 0; expected above 0"),
    ],
)
def test_wrong_option_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SoftDice(**options)
