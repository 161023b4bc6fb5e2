"""A loss of the user's own, and losses by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from volseg import extensions
from volseg.errors import ConfigError
from volseg.losses import (
    BinaryCrossEntropyDice,
    DiceCrossEntropy,
    OwnLoss,
    RegionLoss,
    build_loss,
    list_losses,
)


class Recorder(nn.Module):
    def __init__(self, result=2.0):
        super().__init__()
        self.result = result

    def forward(self, logits, target):
        self.logits, self.target = logits, target
        return logits.sum() * 0 + self.result


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 1, 4, 4)])
def test_own_loss_gets_wide_logits_and_a_channel_axis(shape):
    loss = OwnLoss(Recorder())
    value = loss(torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16), torch.ones(shape, dtype=int))
    assert value == 2
    assert loss.loss.logits.dtype == torch.float32
    assert loss.loss.target.shape == (2, 1, 4, 4)


def test_own_loss_gets_shares_of_regions():
    loss = OwnLoss(Recorder())
    RegionLoss(loss, [[1, 2], [2]])(torch.zeros(1, 2, 3), torch.tensor([[0, 1, 2]]))
    assert loss.loss.target.tolist() == [[[0, 1, 1], [0, 0, 1]]]


@pytest.mark.parametrize("result", [torch.zeros(2), torch.zeros(3, 1)])
def test_anything_but_a_number_is_refused(result):
    with pytest.raises(ConfigError, match="expected one number, a tensor"):
        OwnLoss(Recorder(result))(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=int))


def test_default_loss_by_name():
    assert isinstance(build_loss("dice_ce", "softmax"), DiceCrossEntropy)
    loss = build_loss("dice_ce", "sigmoid", batch=True)
    assert isinstance(loss, BinaryCrossEntropyDice)
    assert loss.batch
    assert "dice_ce" in list_losses()


def test_unknown_name_or_option_is_refused():
    with pytest.raises(ConfigError, match=r"loss\.name 'dice'; expected one of dice_ce"):
        build_loss("dice", "softmax")
    with pytest.raises(ConfigError, match=r"'dice_wieght'; expected.*Did you mean 'dice_weight'"):
        build_loss("dice_ce", "softmax", dice_wieght=1)


def test_own_loss_by_name(monkeypatch):
    monkeypatch.setattr(extensions, "_registered", {})
    extensions.register("losses", "mine", Recorder)
    loss = build_loss("mine", "softmax", result=5.0)
    assert loss(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=int)) == 5
    with pytest.raises(ConfigError, match=r"'mine' cannot be built \(TypeError: .*'power'"):
        build_loss("mine", "softmax", power=1)
    extensions.register("losses", "mine", dict)
    with pytest.raises(ConfigError, match=r"'mine' is a dict; expected a torch\.nn\.Module"):
        build_loss("mine", "softmax")


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, logits, target):
        raise self.error


def test_own_loss_that_fails_is_named_with_what_it_was_given():
    loss = OwnLoss(Failing(TypeError("no such thing")))
    message = r"Failing .* \(1, 2, 3\) .* \(1, 1, 3\) of torch\.int64 \(TypeError: no such thing\)"
    with pytest.raises(ConfigError, match=message):
        loss(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=int))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        # As torch says it wherever the main thread is.
        RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
    ],
)
def test_what_is_no_fault_of_an_own_loss_is_not_laid_at_its_door(error):
    with pytest.raises(type(error)) as raised:
        OwnLoss(Failing(error))(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=int))
    assert raised.value is error


def test_own_loss_may_have_constants_and_nothing_to_learn(monkeypatch):
    monkeypatch.setattr(extensions, "_registered", {})
    extensions.register("losses", "weighted", lambda: nn.CrossEntropyLoss(torch.ones(2)))
    extensions.register("losses", "learning", lambda: nn.Linear(2, 1))
    assert [*build_loss("weighted", "softmax").buffers()]
    with pytest.raises(ConfigError, match="'learning' has the parameter weight"):
        build_loss("learning", "softmax")
