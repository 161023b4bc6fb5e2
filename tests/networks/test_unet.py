from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from volseg.networks import UNet
from volseg.networks.encoder import ResidualBlock


def test_parameter_count_by_hand():
    network = UNet(3, 1, 2, channels=(4, 8, 16), deep_supervision=False)

    def conv(a, b):  # k3, bias, scale and shift
        return 27 * a * b + b + 2 * b

    encoder = conv(1, 4) + conv(4, 4) + conv(4, 8) + conv(8, 8) + conv(8, 16) + conv(16, 16)
    upsampling = (8 * 16 * 8 + 8) + (8 * 8 * 4 + 4)
    decoder = conv(16, 8) + conv(8, 8) + conv(8, 4) + conv(4, 4)
    head = 4 * 2 + 2
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == encoder + upsampling + decoder + head


def test_divisor_is_the_product_of_strides_per_axis():
    network = UNet(3, 1, 2, channels=(4, 4, 4), strides=(1, (2, 2, 1), (3, 2, 2)))
    assert network.divisor == network.total_stride == (6, 4, 2)


def test_all_decoder_levels_but_the_coarsest_are_supervised():
    network = UNet(2, 1, 2, channels=(4, 4, 4, 4, 4), deep_supervision=True)
    assert network.supervision_strides == ((1, 1), (2, 2), (4, 4))


def test_supervision_does_not_change_the_main_output():
    network = UNet(2, 1, 2, channels=(4, 4, 4, 4), deep_supervision=True)
    image = torch.randn(1, 1, 16, 16)
    assert torch.equal(network.train()(image)[0], network.eval()(image))


def test_weights_are_drawn_as_he_for_leaky_relu_and_biases_are_zero():
    torch.manual_seed(0)
    network = UNet(3, 1, 2, channels=(16, 32))
    conv = network.encoder.levels[1][1].conv
    expected = math.sqrt(2 / (1 + 0.01**2) / (32 * 27))
    assert conv.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert conv.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("encoder", "options", "encoder_counts", "decoder_counts"),
    [
        ("plain", {}, [2, 2, 2, 2, 2], [2, 2, 2, 2]),
        ("residual", {}, [1, 3, 4, 6, 6], [1, 1, 1, 1]),
        ("plain", {"num_convs": 1, "num_decoder_convs": 3}, [1, 1, 1, 1, 1], [3, 3, 3, 3]),
        ("residual", {"num_decoder_convs": (1, 2, 3, 4)}, [1, 3, 4, 6, 6], [4, 3, 2, 1]),
    ],
)
def test_number_of_convolutions_per_level(encoder, options, encoder_counts, decoder_counts):
    network = UNet(2, 1, 2, channels=(4,) * 5, encoder=encoder, **options)
    assert [len(level) for level in network.encoder.levels] == encoder_counts
    # The decoder runs from the coarsest level to the finest.
    assert [len(level.convs) for level in network.decoder] == decoder_counts


@pytest.mark.parametrize(("stride", "width", "parts"), [(2, 6, 2), (2, 4, 1), (1, 6, 1), (1, 4, 0)])
def test_shortcut_is_averaged_where_size_falls_and_projected_where_width_changes(
    stride, width, parts
):
    network = UNet(2, 1, 2, channels=(4, width), strides=(1, stride), encoder="residual")
    assert len(network.encoder.levels[1][0].shortcut) == parts


def test_dropout_of_the_unet_acts_in_training_only():
    torch.manual_seed(0)
    network = UNet(2, 1, 2, channels=(4, 4), dropout=0.5)
    image = torch.randn(1, 1, 8, 8)
    assert not torch.equal(network.train()(image), network(image))
    assert torch.equal(network.eval()(image), network(image))


def test_residual_blocks_begin_as_their_shortcut():
    network = UNet(2, 1, 2, channels=(4, 8, 8), encoder="residual")
    blocks = [module for module in network.modules() if isinstance(module, ResidualBlock)]
    assert len(blocks) == 1 + 3 + 4
    for block in blocks:
        x = torch.randn(1, block.conv1.conv.in_channels, 8, 8)
        expected = functional.leaky_relu(block.shortcut(x), 0.01)
        torch.testing.assert_close(block(x), expected)
