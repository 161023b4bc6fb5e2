from __future__ import annotations

import pytest
import torch
from torch import nn

from volseg.errors import ConfigError
from volseg.networks.layers import (
    ConvNormAct,
    InstanceNorm,
    make_activation,
    make_upsampling,
    per_axis,
)


def test_per_axis_names_the_value_and_the_number_of_axes():
    assert per_axis([1, 2, 3], 3, "stride") == (1, 2, 3)
    with pytest.raises(ConfigError, match=r"stride \(2, 2\).* 3 of them.*spatial_dims=3"):
        per_axis((2, 2), 3, "stride")
    with pytest.raises(ConfigError, match="kernel_size 0; expected a positive integer"):
        per_axis(0, 2, "kernel_size")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_instance_norm_equals_torch_in_any_memory_format(memory_format):
    torch.manual_seed(0)
    ours, theirs = InstanceNorm(4), nn.InstanceNorm3d(4, affine=True)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 8, 9, 10) + 10
    torch.testing.assert_close(
        ours(x.to(memory_format=memory_format)), theirs(x), rtol=1e-5, atol=1e-5
    )


def test_layers_run_in_the_order_of_their_name():
    torch.manual_seed(0)
    block = ConvNormAct(2, 3, 4, stride=2, norm="batch", activation="relu").train()
    reference = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()).train()
    reference[0].load_state_dict(block.conv.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(block(x), reference(x))


def test_dropout_removes_whole_channels_in_training_only():
    torch.manual_seed(0)
    block = ConvNormAct(3, 1, 64, norm="none", activation="relu", dropout=0.5)
    nn.init.zeros_(block.conv.weight)
    nn.init.ones_(block.conv.bias)
    x = torch.zeros(1, 1, 4, 4, 4)
    per_channel = block.train()(x).flatten(2).unique(dim=2)
    assert per_channel.shape == (1, 64, 1)
    assert set(per_channel.flatten().tolist()) == {0.0, 2.0}
    assert block.eval()(x).unique().tolist() == [1.0]


def test_even_kernel_is_refused():
    with pytest.raises(ConfigError, match=r"kernel_size \(3, 2\); expected odd sizes"):
        ConvNormAct(2, 1, 1, kernel_size=(3, 2))


@pytest.mark.parametrize("name", ["leaky_relu", "relu", "elu", "silu", "gelu", "prelu"])
def test_activations_keep_large_positive_values(name):
    assert make_activation(name)(torch.tensor([20.0])).item() == pytest.approx(20.0)


def test_upsampling_multiplies_each_axis_by_its_stride():
    layer = make_upsampling(3, 4, 2, (2, 1, 3))
    assert layer(torch.zeros(1, 4, 5, 5, 5)).shape == (1, 2, 10, 5, 15)
