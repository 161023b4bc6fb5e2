from __future__ import annotations

import math

import pytest
import torch
from monai.losses import DiceCELoss
from torch.nn import functional

from volseg.errors import ConfigError
from volseg.losses import DiceCrossEntropy

TARGET = torch.tensor([[[0, 0], [1, 1]]])


def even_logits(num_classes):
    """Every class equally likely in each of 2 x 2 pixels."""
    return torch.zeros(1, num_classes, 2, 2)


def test_dice_by_hand():
    # p = 1/2: intersection 2 * 1/2 = 1, probabilities 4 * 1/2 = 2, reference 2.
    expected = 1 - (2 * 1 + 1e-5) / (2 + 2 + 1e-5)
    loss = DiceCrossEntropy(1, 0)(even_logits(2), TARGET)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_cross_entropy_by_hand():
    assert DiceCrossEntropy(0, 1)(even_logits(3), TARGET).item() == pytest.approx(math.log(3))


def test_terms_are_weighted_and_added():
    logits = torch.randn(2, 3, 4, 4, generator=torch.manual_seed(0))
    target = torch.randint(0, 3, (2, 4, 4), generator=torch.manual_seed(1))
    dice = DiceCrossEntropy(1, 0)(logits, target)
    cross_entropy = DiceCrossEntropy(0, 1)(logits, target)
    combined = DiceCrossEntropy(0.3, 2)(logits, target)
    torch.testing.assert_close(combined, 0.3 * dice + 2 * cross_entropy)


def test_dice_is_averaged_over_samples_and_foreground_classes():
    # p = 1/3. Class 1: I = 2/3, P = 4/3, R = 2. Class 2 is absent: I = 0, P = 4/3, R = 0.
    # The second sample is background alone: I = 0 for both classes.
    target = torch.cat([TARGET, torch.zeros_like(TARGET)])
    present = (2 * 2 / 3 + 1e-5) / (4 / 3 + 2 + 1e-5)
    absent = 1e-5 / (4 / 3 + 1e-5)
    expected = 1 - (present + 3 * absent) / 4
    loss = DiceCrossEntropy(1, 0)(even_logits(3).expand(2, 3, 2, 2), target)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_class_that_is_absent_and_not_predicted_costs_nothing():
    logits = torch.tensor([100.0, -100.0]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    assert DiceCrossEntropy()(logits, torch.zeros_like(TARGET)).item() == pytest.approx(0, abs=1e-6)


def test_target_may_have_a_channel_axis_and_any_integer_type():
    logits = torch.randn(1, 2, 2, 2, generator=torch.manual_seed(0))
    expected = DiceCrossEntropy()(logits, TARGET)
    for target in (TARGET[:, None], TARGET.to(torch.uint8), TARGET.to(torch.int16)):
        assert DiceCrossEntropy()(logits, target) == expected


def test_half_precision_sums_do_not_overflow():
    logits = torch.zeros(1, 2, 400, 400, dtype=torch.float16)
    target = torch.ones(1, 400, 400, dtype=torch.long)
    # Intersection 80000, which float16 cannot hold; Dice 160000 / 240000.
    assert DiceCrossEntropy(1, 0)(logits, target).item() == pytest.approx(1 / 3, abs=1e-5)


def test_gradient_is_that_of_the_value():
    logits = torch.randn(2, 3, 2, 3, 2, dtype=torch.double, generator=torch.manual_seed(0))
    target = torch.randint(0, 3, (2, 2, 3, 2), generator=torch.manual_seed(1))
    assert torch.autograd.gradcheck(
        lambda x: DiceCrossEntropy()(x, target), logits.requires_grad_()
    )


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_equals_monai(squared, background):
    logits = torch.randn(2, 3, 4, 4, generator=torch.manual_seed(0))
    target = torch.randint(0, 3, (2, 1, 4, 4), generator=torch.manual_seed(1))
    expected = DiceCELoss(
        include_background=background, to_onehot_y=True, softmax=True, squared_pred=squared
    )
    loss = DiceCrossEntropy(squared_denominator=squared, include_background=background)
    torch.testing.assert_close(loss(logits, target), expected(logits, target), rtol=0, atol=0)


def test_soft_target_by_hand():
    # p = 1/2, g = 1/4: 2 min(p, g) = 1/2 over p + g = 3/4; the entropy is that of the logits.
    target = torch.tensor([0.75, 0.25]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    assert DiceCrossEntropy(1, 0)(even_logits(2), target).item() == pytest.approx(1 / 3, abs=1e-5)
    logits = torch.tensor([0.0, 2.0]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    p = 1 / (1 + math.exp(-2))
    expected = -0.75 * math.log(1 - p) - 0.25 * math.log(p)
    assert DiceCrossEntropy(0, 1)(logits, target).item() == pytest.approx(expected)


def test_soft_target_of_zeros_and_ones_gives_the_value_of_the_classes():
    logits = torch.randn(1, 2, 2, 2, generator=torch.manual_seed(0))
    soft = functional.one_hot(TARGET, 2).movedim(-1, 1).double()
    torch.testing.assert_close(DiceCrossEntropy()(logits, soft), DiceCrossEntropy()(logits, TARGET))


@pytest.mark.parametrize(
    "target",
    [torch.zeros(1, 4, 5, dtype=torch.long), torch.zeros(1, 1, 4, 4), torch.zeros(1, 3, 4, 4)],
)
def test_logits_and_target_that_do_not_fit_are_refused(target):
    with pytest.raises(ConfigError, match="expected 2 or more channels, and an integer target"):
        DiceCrossEntropy()(torch.zeros(1, 2, 4, 4), target)


def test_one_channel_is_refused():
    with pytest.raises(ConfigError, match="expected 2 or more channels"):
        DiceCrossEntropy()(torch.zeros(1, 1, 2, 2), TARGET)


@pytest.mark.parametrize("weights", [(0, 0), (-1, 2)])
def test_weights_without_effect_or_negative_are_refused(weights):
    with pytest.raises(ConfigError, match="expected at least 0, and one of them above"):
        DiceCrossEntropy(*weights)


def test_dice_of_a_whole_batch_by_hand():
    # The samples of the test above as one. Class 1: I = 2/3, P = 8/3, R = 2. Class 2 is absent.
    target = torch.cat([TARGET, torch.zeros_like(TARGET)])
    present = (2 * 2 / 3 + 1e-5) / (8 / 3 + 2 + 1e-5)
    absent = 1e-5 / (8 / 3 + 1e-5)
    expected = 1 - (present + absent) / 2
    logits = even_logits(3).expand(2, 3, 2, 2)
    assert DiceCrossEntropy(1, 0, batch_dice=True)(logits, target).item() == pytest.approx(expected)
    # Where voxels may be of unknown class, the same.
    loss = DiceCrossEntropy(1, 0, batch_dice=True, candidates=[(0, 1, 2)])
    assert loss(logits, target).item() == pytest.approx(expected)
