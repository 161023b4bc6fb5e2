from __future__ import annotations

import pytest
import torch
from torch import nn

from volseg.errors import ConfigError
from volseg.networks.layers import (
    ConvStack,
    InstanceNorm,
    Style,
    Unit,
    initialise_he_,
    make_activation,
    make_conv,
    make_deconv,
    make_nearest,
    make_norm,
    make_pooling,
    per_axis,
    prefer_speed_,
)


def test_per_axis_names_the_value_and_the_number_of_axes():
    assert per_axis([1, 2, 3], 3, "stride") == (1, 2, 3)
    with pytest.raises(ConfigError, match=r"stride \(2, 2\).* 3 of them.*spatial_dims=3"):
        per_axis((2, 2), 3, "stride")
    with pytest.raises(ConfigError, match="kernel_size 0; expected a positive integer"):
        per_axis(0, 2, "kernel_size")


@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_instance_norm_equals_torch_in_any_memory_format(memory_format, is_fast):
    torch.manual_seed(0)
    ours, theirs = InstanceNorm(4), nn.InstanceNorm3d(4, affine=True)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    if is_fast:
        prefer_speed_(nn.Sequential(ours))
        assert ours.prefers_speed
    x = torch.randn(2, 4, 8, 9, 10) + 10
    torch.testing.assert_close(
        ours(x.to(memory_format=memory_format)), theirs(x), rtol=1e-5, atol=1e-5
    )


def test_options_of_a_norm_reach_it():
    norm = make_norm(["batch", {"eps": 0.5, "momentum": 0.25, "affine": False}], 3, 7)
    assert isinstance(norm, nn.BatchNorm3d)
    assert (norm.num_features, norm.eps, norm.momentum, norm.affine) == (7, 0.5, 0.25, False)
    plain = make_norm(("instance", {"eps": 3.0, "affine": False}), 2, 1)
    # Mean 0 and variance 1; 1 / sqrt(1 + 3) is a half.
    assert plain(torch.tensor([[[[-1.0, 1.0]]]])).flatten().tolist() == [-0.5, 0.5]
    assert [*plain.parameters()] == []


LAYERS = {
    "C": lambda: nn.Conv2d(4, 4, 3, 2, 1),
    "N": lambda: nn.BatchNorm2d(4),
    "A": nn.ReLU,
}


@pytest.mark.parametrize("order", ["CNA", "NAC", "CAN", "CA", "C", "NA"])
def test_layers_run_in_the_given_order(order):
    torch.manual_seed(0)
    unit = Unit(Style(2, "batch", "relu", order=order), 4, 4, stride=2).train()
    reference = nn.Sequential(*(LAYERS[letter]() for letter in order)).train()
    for theirs, ours in zip(reference, unit, strict=True):
        theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(unit(x), reference(x))


@pytest.mark.parametrize("order", ["NAC", "AC"])
def test_a_unit_leaves_its_input_alone(order):
    x = torch.randn(2, 4, 8, 8)
    before = x.clone()
    Unit(Style(2, "none", "relu", order=order), 4, 4)(x)
    assert torch.equal(x, before)


def test_the_first_convolution_of_a_stack_takes_the_stride():
    stack = ConvStack(Style(3), 2, (4, 6), stride=(2, 1, 2))
    assert [unit.conv.stride for unit in stack] == [(2, 1, 2), (1, 1, 1)]
    assert stack(torch.zeros(1, 2, 4, 4, 4)).shape == (1, 6, 2, 4, 2)


def test_dropout_removes_whole_channels_in_training_only():
    torch.manual_seed(0)
    unit = Unit(Style(3, "none", "relu", dropout=0.5), 1, 64)
    nn.init.zeros_(unit.conv.weight)
    nn.init.ones_(unit.conv.bias)
    x = torch.zeros(1, 1, 4, 4, 4)
    per_channel = unit.train()(x).flatten(2).unique(dim=2)
    assert per_channel.shape == (1, 64, 1)
    assert set(per_channel.flatten().tolist()) == {0.0, 2.0}
    assert unit.eval()(x).unique().tolist() == [1.0]


def test_even_kernel_is_padded_behind():
    conv = make_conv(2, 1, 1, (1, 2), bias=False)
    next(conv.parameters()).data = torch.tensor([[[[1.0, 10.0]]]])
    assert conv(torch.tensor([[[[1.0, 2.0, 3.0]]]])).flatten().tolist() == [21.0, 32.0, 3.0]


def test_even_kernel_with_a_stride_is_refused():
    with pytest.raises(ConfigError, match=r"kernel_size \(3, 2\) with stride \(2, 2\).*odd sizes"):
        make_conv(2, 1, 1, (3, 2), 2)


def test_he_initialisation_by_hand():
    torch.manual_seed(0)
    convs = nn.Sequential(nn.Conv3d(64, 32, 3), nn.ConvTranspose3d(32, 64, 3), nn.Conv2d(64, 64, 5))
    initialise_he_(convs, slope=0.5)
    for conv, inputs in zip(convs, (64 * 27, 64 * 27, 64 * 25), strict=True):
        expected = (2 / (1 + 0.5**2) / inputs) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert conv.bias.abs().max() == 0


@pytest.mark.parametrize("name", ["leaky_relu", "relu", "elu", "silu", "gelu", "prelu"])
def test_activations_keep_large_positive_values(name):
    assert make_activation(name)(torch.tensor([20.0])).item() == pytest.approx(20.0)


@pytest.mark.parametrize("kernel_size", [None, 3, 4, 5])
@pytest.mark.parametrize("stride", [2, (2, 1, 3), (1, 1, 2)])
def test_deconvolution_multiplies_each_axis_by_its_stride(stride, kernel_size):
    layer = make_deconv(3, 4, 2, stride, kernel_size)
    steps = per_axis(stride, 3, "stride")
    assert layer(torch.zeros(1, 4, 5, 4, 3)).shape == (
        1,
        2,
        5 * steps[0],
        4 * steps[1],
        3 * steps[2],
    )


def test_deconvolution_with_a_kernel_below_its_stride_is_refused():
    with pytest.raises(ConfigError, match=r"kernel_size 2; expected at least the stride \(3, 3\)"):
        make_deconv(2, 1, 1, 3, 2)


def test_nearest_repeats_and_pooling_takes_the_largest():
    x = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    assert make_nearest((1, 2), 2)(x).flatten().tolist() == [1, 1, 2, 2, 3, 3]
    assert make_pooling((1, 2), 2)(x).flatten().tolist() == [2]  # The third has no partner.


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        ("layer", "norm 'layer'; expected one of instance, batch, group, none"),
        ("instanc", "Did you mean 'instance'"),
        (("batch", {"epsilon": 1}), "option of norm 'batch' 'epsilon'.*Did you mean 'eps'"),
        (("instance", {"momentum": 0.1}), "option of norm 'instance' 'momentum'"),
        (("batch", 1e-3), "expected a name, or a name and a dict of options"),
    ],
)
def test_wrong_norm_is_refused(norm, message):
    with pytest.raises(ConfigError, match=message):
        make_norm(norm, 2, 4)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_dropout_out_of_range_is_refused(dropout):
    with pytest.raises(ConfigError, match=r"dropout .*; expected at least 0 and"):
        Unit(Style(2, dropout=dropout), 1, 1)


@pytest.mark.parametrize(
    ("norm", "activation", "overwrites"),
    [("batch", "relu", True), ("instance", "relu", False), ("instance", "leaky_relu", True)],
)
def test_relu_does_not_overwrite_the_view_of_an_instance_norm(norm, activation, overwrites):
    assert Unit(Style(3, norm, activation), 2, 2).activation.inplace is overwrites
