from __future__ import annotations

import pytest
import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch import nn
from torch.nn import functional

from volseg.errors import ConfigError
from volseg.losses import DiceCrossEntropy, MultiLevelLoss
from volseg.losses.multi_level import subsample


class FirstLogit(nn.Module):
    """Returns the first logit, so that weights can be read from the sum."""

    def forward(self, logits, target):
        return logits.flatten()[0]


def levels(*values):
    return [torch.full((1, 2, 8 >> i, 8 >> i), value) for i, value in enumerate(values)]


TARGET = torch.zeros(1, 8, 8, dtype=torch.long)


def test_halved_weights_sum_to_one():
    # 4/7, 2/7, 1/7
    loss = MultiLevelLoss(FirstLogit())
    assert loss(levels(7.0, 0.0, 0.0), TARGET).item() == pytest.approx(4)
    assert loss(levels(0.0, 7.0, 0.0), TARGET).item() == pytest.approx(2)
    assert loss(levels(0.0, 0.0, 7.0), TARGET).item() == pytest.approx(1)


def test_given_weights_are_used_as_they_are():
    loss = MultiLevelLoss(FirstLogit(), weights=[1, 10])
    assert loss(levels(2.0, 3.0), TARGET).item() == pytest.approx(32)


def test_one_tensor_and_one_level_give_the_plain_loss():
    logits = torch.randn(1, 2, 8, 8, generator=torch.manual_seed(0))
    plain = DiceCrossEntropy()(logits, TARGET)
    loss = MultiLevelLoss(DiceCrossEntropy())
    assert loss(logits, TARGET) == loss([logits], TARGET) == plain


def test_equals_monai_where_both_use_the_same_weights():
    generator = torch.manual_seed(0)
    target = torch.randint(0, 3, (2, 1, 8, 12, 4), generator=generator)
    sizes = [(8, 12, 4), (4, 6, 4), (2, 3, 2)]
    logits = [torch.randn(2, 3, *size, generator=generator) for size in sizes]
    dice_ce = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    expected = DeepSupervisionLoss(dice_ce, weight_mode="exp")(logits, target.float())
    loss = MultiLevelLoss(DiceCrossEntropy(), weights=[1, 0.5, 0.25])(logits, target)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("size", [(12, 12), (6, 4), (4, 12), (3, 2), (1, 1)])
def test_subsample_is_nearest_exact(size):
    target = torch.arange(144).reshape(1, 1, 12, 12)
    expected = functional.interpolate(target.float(), size=size, mode="nearest-exact").long()
    assert torch.equal(subsample(target, size), expected)


def test_gradient_reaches_all_levels():
    logits = [level.requires_grad_() for level in levels(0.0, 0.0, 0.0)]
    MultiLevelLoss(DiceCrossEntropy())(logits, TARGET).backward()
    assert all(level.grad.abs().max() > 0 for level in logits)


def test_level_that_does_not_divide_the_target_is_refused():
    logits = [torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 3, 4)]
    with pytest.raises(ConfigError, match=r"size \(3, 4\); expected a divisor of \(8, 8\)"):
        MultiLevelLoss(DiceCrossEntropy())(logits, TARGET)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.5, 0.25]])
def test_another_number_of_weights_is_refused(weights):
    with pytest.raises(ConfigError, match="expected one weight per level"):
        MultiLevelLoss(FirstLogit(), weights)(levels(1.0, 1.0), TARGET)


def test_no_level_is_refused():
    with pytest.raises(ConfigError, match="logits of 0 levels"):
        MultiLevelLoss(FirstLogit())([], TARGET)
