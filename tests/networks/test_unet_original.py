from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from volseg.errors import ConfigError
from volseg.networks import OriginalUNet, build_network

SMALL = {"channels": (4, 6, 8)}


def test_paper_sizes():
    # Figure 1: 572 x 572 in, 388 x 388 out.
    options = {"channels": (1, 1, 1, 1, 1), "align": "crop", "padding": "valid"}
    network = OriginalUNet(2, 1, 2, **options).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 1, 572, 572)).shape == (1, 2, 388, 388)


@pytest.mark.parametrize(
    ("align", "expected"), [("pad", (23, 30, 17)), ("crop", (20, 28, 16)), ("none", None)]
)
def test_sizes_that_strides_do_not_divide(align, expected):
    network = OriginalUNet(3, 1, 2, **SMALL, align=align).eval()
    image = torch.zeros(1, 1, 23, 30, 17)
    if expected is None:
        with pytest.raises(ConfigError, match=r"multiples of \[4, 4, 4\]. Pad to \[24, 32, 20\]"):
            network(image)
    else:
        assert network(image).shape == (1, 2, *expected)


def test_alignment_changes_nothing_where_sizes_fit():
    torch.manual_seed(0)
    image = torch.randn(1, 1, 16, 24)
    network = OriginalUNet(2, 1, 2, **SMALL).eval()
    for align in ("crop", "none"):
        other = OriginalUNet(2, 1, 2, **SMALL, align=align).eval()
        other.load_state_dict(network.state_dict())
        assert torch.equal(other(image), network(image))


def test_weights_are_drawn_as_he_for_relu():
    torch.manual_seed(0)
    network = OriginalUNet(2, 1, 2, channels=(32, 64))
    conv = network.encoder.levels[1][1][1].conv
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)
    assert conv.bias.abs().max() == 0


def test_keras_form_drops_values_at_the_two_deepest_levels_in_training():
    torch.manual_seed(0)
    network = build_network("unet_keras", spatial_dims=2, in_channels=1, out_channels=2, **SMALL)
    dropped = [isinstance(level[-1], nn.Dropout) for level in network.encoder.levels]
    assert dropped == [False, True, True]
    image = torch.randn(1, 1, 8, 8)
    assert not torch.equal(network.train()(image), network(image))
    assert torch.equal(network.eval()(image), network(image))


def test_penultimate_convolution_is_narrow_and_activated():
    network = OriginalUNet(2, 1, 5, **SMALL, penultimate=2)
    unit, head = network.head
    assert (unit.conv.out_channels, head.in_channels, head.out_channels) == (2, 2, 5)
    assert "activation" in dict(unit.named_children())
    assert len(OriginalUNet(2, 1, 5, **SMALL).head) == 1
