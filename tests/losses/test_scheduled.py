from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from volseg.errors import ConfigError
from volseg.losses import MultiLevelLoss, ScheduledTerm


class Mean(nn.Module):
    """The mean of the logits, and which ones it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, logits, target):
        self.seen.append((tuple(logits.shape), tuple(target.shape)))
        return logits.mean()


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [
        ("constant", [2, 2, 2, 2]),
        ("linear", [0, 0.5, 1, 2]),
        ("cosine", [0, 1 - math.sqrt(0.5), 1, 2]),
    ],
)
def test_weight_over_the_training(schedule, weights):
    term = ScheduledTerm(Mean(), 2.0, schedule)
    assert [term.weigh(progress) for progress in (0, 0.25, 0.5, 1)] == pytest.approx(weights)


def test_term_is_added_on_the_main_output_alone():
    term = Mean()
    loss = MultiLevelLoss(Mean(), [1, 10], boundary=ScheduledTerm(term, 4.0, "linear"))
    logits = [torch.full((1, 2, 4, 4), 3.0), torch.full((1, 2, 2, 2), 5.0)]
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    loss.progress = 0.5
    assert loss(logits, target).item() == pytest.approx(3 + 50 + 2 * 3)
    assert term.seen == [((1, 2, 4, 4), (1, 4, 4))]
    assert loss(logits[0], target).item() == pytest.approx(3 + 2 * 3)


def test_term_is_not_computed_while_it_weighs_nothing():
    term = Mean()
    loss = MultiLevelLoss(Mean(), boundary=ScheduledTerm(term, 4.0, "cosine"))
    logits, target = torch.ones(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    assert loss(logits, target).item() == 1
    assert term.seen == []
    loss.progress = 1.0
    assert loss(logits, target).item() == pytest.approx(5)


@pytest.mark.parametrize(
    ("weight", "schedule"), [(0, "linear"), (-1, "linear"), (float("nan"), "linear"), (1, "step")]
)
def test_wrong_option_is_refused(weight, schedule):
    with pytest.raises(ConfigError, match="expected"):
        ScheduledTerm(Mean(), weight, schedule)
