from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from volseg.errors import ConfigError
from volseg.losses.targets import check_weights, prepare, to_channels, with_channel_axis


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.long])
def test_integer_target_gets_a_channel_axis_and_keeps_its_type(dtype):
    target = torch.ones(2, 4, 5, dtype=dtype)
    _, prepared = prepare(torch.zeros(2, 3, 4, 5), target, 2)
    assert (prepared.shape, prepared.dtype) == ((2, 1, 4, 5), dtype)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_widened_and_a_soft_target_follows(given, expected):
    logits, target = prepare(torch.zeros(1, 2, 4, dtype=given), torch.zeros(1, 2, 4), 2)
    assert logits.dtype == target.dtype == expected


@pytest.mark.parametrize(
    "target",
    [
        torch.zeros(1, 4, 5, dtype=torch.long),
        torch.zeros(2, 4, 4, dtype=torch.long),
        torch.zeros(1, 2, 4, 4, dtype=torch.long),
        torch.zeros(1, 4, 4),
        torch.zeros(1, 1, 4, 4),
        torch.zeros(1, 2, 4, 5),
    ],
)
def test_shapes_that_do_not_fit_are_refused(target):
    message = r"integer target \(1, 1, 4, 4\) or a floating one \(1, 2, 4, 4\)"
    with pytest.raises(ConfigError, match=message):
        prepare(torch.zeros(1, 2, 4, 4), target, 1)


def test_too_few_channels_are_refused():
    with pytest.raises(ConfigError, match="expected 3 or more channels"):
        prepare(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), 3)


def test_only_an_integer_target_without_channel_axis_gets_one():
    integer = torch.zeros(1, 4, 4, dtype=torch.long)
    assert with_channel_axis(integer, 4).shape == (1, 1, 4, 4)
    assert with_channel_axis(integer[None], 4).shape == (1, 1, 4, 4)
    assert with_channel_axis(torch.zeros(1, 4, 4), 4).shape == (1, 4, 4)


def test_channels_are_one_hot():
    target = torch.randint(0, 4, (2, 1, 3, 4, 5), generator=torch.manual_seed(0))
    expected = functional.one_hot(target[:, 0], 4).movedim(-1, 1).double()
    assert torch.equal(to_channels(target, 4, torch.double), expected)


def test_one_channel_is_class_one():
    target = torch.tensor([[[0, 1, 2]]])
    assert to_channels(target, 1).tolist() == [[[0, 1, 0]]]


@pytest.mark.parametrize("weights", [(), (0, 0), (-1, 2), (math.nan, 1), (math.inf, 1)])
def test_weights_without_effect_or_meaning_are_refused(weights):
    with pytest.raises(ConfigError, match="a and b; expected at least 0, and one of them above"):
        check_weights("a and b", weights)
