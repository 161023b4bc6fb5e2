"""Muon against its definition by singular values, and against torch's own where there is one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from volseg.config import OptimizerConfig
from volseg.training.muon import Muon, orthogonalise
from volseg.training.optimizers import make_optimizer


def iterate(value: float) -> float:
    """What the five steps make of one singular value."""
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    return value


@pytest.mark.parametrize("shape", [(4, 30), (30, 4), (6, 6)])
def test_singular_values_follow_the_polynomial(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    scaled = values / np.sqrt((values**2).sum())
    expected = left @ np.diag([iterate(value) for value in scaled]) @ right
    np.testing.assert_allclose(orthogonalise(matrix).numpy(), expected, atol=1e-4)


def test_nothing_comes_of_nothing() -> None:
    assert orthogonalise(torch.zeros(3, 5)).abs().sum() == 0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")
def test_matrices_move_as_by_torch() -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(8, 20, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([ours], lr=0.01, momentum=0.9, weight_decay=0.1)
    other = torch.optim.Muon(
        [theirs], lr=0.01, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        ours.grad = torch.randn(8, 20, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step()
        other.step()
    # Torch iterates in bfloat16.
    moved = (theirs - start).detach()
    torch.testing.assert_close((ours - start).detach(), moved, atol=0.03 * moved.std(), rtol=0.05)


def test_convolutions_move_as_matrices_and_vectors_as_by_adamw() -> None:
    torch.manual_seed(2)
    network = nn.Sequential(nn.Conv3d(2, 3, 3), nn.GroupNorm(3, 3))
    plain = copy.deepcopy(network)
    rate = 1e-2
    config = OptimizerConfig(name="muon", weight_decay=0.5, learning_rate=rate)
    optimizer = make_optimizer(network, config)
    # Muon's decay is for matrices alone.
    adamw = torch.optim.AdamW(plain.parameters(), rate, weight_decay=0.0)
    before = network[0].weight.detach().clone()
    for mine, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        mine.grad = torch.randn_like(mine)
        theirs.grad = mine.grad.clone()
    gradient = plain[0].weight.grad
    optimizer.step()
    adamw.step()
    assert torch.equal(network[0].weight.grad, gradient)
    assert torch.equal(network[0].bias, plain[0].bias)
    assert torch.equal(network[1].weight, plain[1].weight)
    # The first step of a lerped momentum with Nesterov is a multiple of the gradient.
    step = orthogonalise(gradient.reshape(3, 54)).reshape(before.shape)
    expected = before * (1 - rate * 0.5) - rate * 0.2 * 54**0.5 * step
    torch.testing.assert_close(network[0].weight.detach(), expected)


def test_goes_on_from_its_state() -> None:
    def make() -> tuple[nn.Module, Muon]:
        torch.manual_seed(3)
        network = nn.Conv2d(2, 4, 3)
        return network, Muon(network.parameters(), lr=0.01)

    def walk(network: nn.Module, optimizer: Muon, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    network, optimizer = make()
    walk(network, optimizer, 0)
    weights, state = copy.deepcopy(network.state_dict()), copy.deepcopy(optimizer.state_dict())
    walk(network, optimizer, 1)
    other, resumed = make()
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    walk(other, resumed, 1)
    for ours, theirs in zip(other.parameters(), network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
