"""Entropy and disagreement by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from volseg.inference.members import Members
from volseg.inference.uncertainty import disagreement, entropy


def test_entropy_is_the_share_of_the_largest() -> None:
    scores = torch.tensor([[0.0, 50.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert entropy(scores, overlapping=False).tolist() == pytest.approx([1, 0])
    scores = torch.log(torch.tensor([[0.5], [0.25], [0.25]]))
    bits = 0.5 * 1 + 0.25 * 2 + 0.25 * 2
    assert float(entropy(scores, overlapping=False)) == pytest.approx(bits / math.log2(3))


def test_entropy_of_regions_is_their_mean() -> None:
    scores = torch.tensor([[0.0, 100.0], [math.log(3), -100.0]])
    quarter = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    found = entropy(scores, overlapping=True).tolist()
    assert found == pytest.approx([(1 + quarter) / 2, 0], abs=1e-6)


def test_members_that_are_sure_of_different_classes_disagree() -> None:
    sure, other, unsure = [40.0, 0.0], [0.0, 40.0], [0.0, 0.0]
    members = torch.tensor([[sure, sure, unsure], [sure, other, unsure]]).transpose(1, 2)[:, None]
    mean = members.softmax(2).mean(0).log()
    # (M, B, K, W): agreeing, opposed, unsure together.
    each = entropy(members, overlapping=False, dim=2).mean(0)
    found = disagreement(mean, each, overlapping=False)
    assert found[0].tolist() == pytest.approx([0, 1, 0], abs=1e-6)


class _Constant(nn.Module):
    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        shape = (len(windows), len(self.logits), *windows.shape[2:])
        return self.logits.view(1, -1, 1, 1).expand(shape)


def test_disagreement_is_one_more_channel() -> None:
    networks = [_Constant([40.0, 0.0]), _Constant([0.0, 40.0])]
    members = Members(networks, torch.device("cpu"), shows_disagreement=True)
    scores = members(torch.zeros(2, 1, 3, 3))
    assert scores.shape == (2, 3, 3, 3)
    assert scores[:, 2].numpy() == pytest.approx(1, abs=1e-6)
    assert scores[:, :2].softmax(1).numpy() == pytest.approx(0.5, abs=1e-6)
