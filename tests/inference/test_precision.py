"""Weights that are rounded once give the logits that autocast gives by rounding them each time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from volseg.inference.members import compute_logits
from volseg.inference.precision import round_weights_
from volseg.inference.remembered import is_known
from volseg.networks import (
    SegmentationNetwork,
    SliceNetwork,
    build_network,
    build_own_network,
    list_networks,
)

HALF = torch.bfloat16


def build(name: str, dims: int) -> SegmentationNetwork:
    torch.manual_seed(0)
    facts = {"spatial_dims": dims, "in_channels": 1, "out_channels": 3}
    return build_network(name, **facts, channels=(4, 8, 16)).eval()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", list_networks())
@torch.no_grad()
def test_the_logits_are_the_same(name: str, dims: int) -> None:
    network = build(name, dims)
    windows = torch.randn(1, 1, *[32] * dims, generator=torch.Generator().manual_seed(0))
    expected = compute_logits(network, windows, HALF)
    assert is_known(network)
    round_weights_(network, HALF)
    assert torch.equal(compute_logits(network, windows, HALF), expected)
    convs = [m for m in network.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    assert {conv.weight.dtype for conv in convs} == {HALF}


@torch.no_grad()
def test_the_logits_of_slices_are_the_same() -> None:
    network = SliceNetwork(build("unet", 2), 2).eval()
    windows = torch.randn(1, 1, 64, 64, 2, generator=torch.Generator().manual_seed(0))
    expected = compute_logits(network, windows, HALF)
    assert is_known(network)
    round_weights_(network, HALF)
    assert torch.equal(compute_logits(network, windows, HALF), expected)


def test_only_convolutions_in_float32_are_rounded_and_only_to_16_bits() -> None:
    class Standardised(nn.Conv2d):
        """Does arithmetic with its weights."""

    layers = nn.Sequential(
        nn.Conv2d(1, 2, 1),
        nn.Conv2d(2, 2, 1).double(),
        Standardised(2, 2, 1),
        nn.BatchNorm2d(2),
    )
    before = [layer.weight.dtype for layer in layers]
    round_weights_(layers, torch.float32)
    assert [layer.weight.dtype for layer in layers] == before
    round_weights_(layers, HALF)
    assert [layer.weight.dtype for layer in layers] == [HALF, *before[1:]]


def test_networks_whose_code_may_read_a_weight_are_told_apart() -> None:
    facts = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    own = build_own_network(lambda **_: nn.Conv2d(1, 2, 1), **facts)
    normed = build("unet", 2)
    conv = next(m for m in normed.modules() if isinstance(m, nn.Conv2d))
    nn.utils.spectral_norm(conv)
    assert not is_known(own)
    assert not is_known(normed)
