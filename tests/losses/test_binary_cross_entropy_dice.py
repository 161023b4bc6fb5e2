from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from volseg.errors import ConfigError
from volseg.losses import BinaryCrossEntropyDice

TARGET = torch.tensor([[[0, 0], [1, 1]]])


def transcribed_bce_dice(probabilities, reference):
    """The loss of the Keras form of UNet++, 0.5 * BCE - Dice, number by number."""
    p = probabilities.flatten().tolist()
    g = reference.flatten().tolist()
    entropy = [-(b * math.log(a) + (1 - b) * math.log(1 - a)) for a, b in zip(p, g, strict=True)]
    overlap = sum(a * b for a, b in zip(p, g, strict=True))
    dice = (2 * overlap + 1) / (sum(p) + sum(g) + 1)
    return 0.5 * sum(entropy) / len(entropy) - dice


def test_equals_a_transcription_of_the_source_but_for_the_constant_one():
    logits = torch.randn(2, 3, 4, 5, generator=torch.manual_seed(0))
    target = torch.randint(0, 2, (2, 3, 4, 5), generator=torch.manual_seed(1)).float()
    expected = transcribed_bce_dice(logits.double().sigmoid(), target) + 1
    loss = BinaryCrossEntropyDice(batch=True, smooth=1.0)(logits, target)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_dice_is_the_mean_over_samples_and_channels_unless_batch():
    # p = 1/2 in 4 pixels each, reference 4 in the first channel of the first sample alone.
    target = torch.zeros(2, 2, 2, 2)
    target[0, 0] = 1
    logits = torch.zeros(2, 2, 2, 2)
    mean = 1 - (4 / 6) / 4
    together = 1 - 4 / (8 + 4)
    assert BinaryCrossEntropyDice(0, 1)(logits, target).item() == pytest.approx(mean, abs=1e-5)
    loss = BinaryCrossEntropyDice(0, 1, batch=True)(logits, target)
    assert loss.item() == pytest.approx(together, abs=1e-5)


def test_squared_denominator_by_hand():
    # p = 1/2: sum of squares 1, reference 2, intersection 1.
    loss = BinaryCrossEntropyDice(0, 1, squared_denominator=True)(torch.zeros(1, 2, 2, 2), TARGET)
    assert loss.item() == pytest.approx(1 - 2 / 3, abs=1e-5)


def test_cross_entropy_by_hand():
    # Two channels, integer target: p = 3/4 for background and 1/4 for class 1 in every pixel.
    logits = torch.tensor([math.log(3), -math.log(3)]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    expected = (-math.log(3 / 4) - math.log(1 / 4)) / 2
    loss = BinaryCrossEntropyDice(1, 0)
    assert loss(logits, TARGET).item() == pytest.approx(expected)
    assert loss(logits[:, 1:], TARGET).item() == pytest.approx(expected)


def test_terms_are_weighted_and_added():
    logits = torch.randn(2, 3, 4, 4, generator=torch.manual_seed(0))
    target = torch.rand(2, 3, 4, 4, generator=torch.manual_seed(1))
    entropy = BinaryCrossEntropyDice(1, 0)(logits, target)
    dice = BinaryCrossEntropyDice(0, 1)(logits, target)
    torch.testing.assert_close(BinaryCrossEntropyDice()(logits, target), 0.5 * entropy + dice)
    torch.testing.assert_close(BinaryCrossEntropyDice(2, 3)(logits, target), 2 * entropy + 3 * dice)


def test_soft_target_of_zeros_and_ones_gives_the_value_of_the_classes():
    logits = torch.randn(1, 2, 2, 2, generator=torch.manual_seed(0))
    soft = functional.one_hot(TARGET, 2).movedim(-1, 1).float()
    loss = BinaryCrossEntropyDice()
    torch.testing.assert_close(loss(logits, soft), loss(logits, TARGET))


def test_half_precision_sums_do_not_overflow():
    logits = torch.zeros(1, 1, 400, 400, dtype=torch.float16)
    target = torch.ones(1, 400, 400, dtype=torch.long)
    loss = BinaryCrossEntropyDice(0, 1, batch=True)(logits, target)
    assert loss.item() == pytest.approx(1 / 3, abs=1e-5)


@pytest.mark.parametrize("batch", [False, True])
def test_gradient_is_that_of_the_value(batch):
    logits = torch.randn(2, 2, 2, 3, dtype=torch.double, generator=torch.manual_seed(0))
    target = torch.randint(0, 2, (2, 2, 3), generator=torch.manual_seed(1))
    loss = BinaryCrossEntropyDice(batch=batch)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits.requires_grad_())


def test_target_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="expected 1 or more channels, and an integer target"):
        BinaryCrossEntropyDice()(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize("weights", [(0, 0), (-1, 2), (2, -1)])
def test_weights_without_effect_or_negative_are_refused(weights):
    with pytest.raises(ConfigError, match="expected at least 0, and one of them above"):
        BinaryCrossEntropyDice(*weights)


def test_dice_of_each_channel_over_the_batch_by_hand():
    # p = 1/2 in 8 pixels of each channel, reference 4 in the first one and none in the second.
    target = torch.zeros(2, 2, 2, 2)
    target[0, 0] = 1
    expected = 1 - (4 / 8 + 0) / 2
    loss = BinaryCrossEntropyDice(0, 1, batch_dice=True)(torch.zeros(2, 2, 2, 2), target)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ConfigError, match="batch and batch_dice are both set"):
        BinaryCrossEntropyDice(batch=True, batch_dice=True)
