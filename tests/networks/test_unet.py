from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from volseg.errors import ConfigError
from volseg.networks import UNet

CONV = {2: functional.conv2d, 3: functional.conv3d}
CONV_TRANSPOSE = {2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


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


def parameters_in_order_of_execution(network, image):
    """The weight and bias of each layer, in the order in which the layers first run."""
    found = []
    hooks = [
        module.register_forward_pre_hook(lambda m, _: found.append((m.weight, m.bias)))
        for module in network.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    network(image)
    for hook in hooks:
        hook.remove()
    return iter(found)


def transcribed_unet(x, parameters, strides, kernels, num_convs):
    """The planned U-Net of nnU-Net (Isensee 2021) as a plain sequence of functions."""
    dims = x.dim() - 2

    def block(x, kernel, stride):
        for index in range(num_convs):
            weight, bias = next(parameters)
            padding = [(k - 1) // 2 for k in kernel]
            x = CONV[dims](x, weight, bias, stride if index == 0 else 1, padding)
            gain, shift = next(parameters)
            mean = x.flatten(2).mean(2).reshape(*x.shape[:2], *[1] * dims)
            var = x.flatten(2).var(2, correction=0).reshape(mean.shape)
            x = (x - mean) / torch.sqrt(var + 1e-5)
            x = x * gain.reshape(1, -1, *[1] * dims) + shift.reshape(1, -1, *[1] * dims)
            x = torch.where(x > 0, x, 0.01 * x)
        return x

    skips = []
    for kernel, stride in zip(kernels, strides, strict=True):
        x = block(x, kernel, stride)
        skips.append(x)
    for level in range(len(strides) - 2, -1, -1):
        x = CONV_TRANSPOSE[dims](x, *next(parameters), stride=strides[level + 1])
        x = block(torch.cat((x, skips[level]), 1), kernels[level], 1)
    return CONV[dims](x, *next(parameters))


@pytest.mark.parametrize(
    ("strides", "kernels", "size"),
    [
        ([(1, 1), (2, 2), (2, 1)], [(3, 3), (3, 3), (3, 1)], (12, 8)),
        ([(1, 1, 1), (1, 2, 2), (2, 2, 2)], [(1, 3, 3), (3, 3, 3), (3, 3, 3)], (4, 12, 8)),
    ],
)
def test_output_equals_an_independent_transcription(strides, kernels, size):
    torch.manual_seed(0)
    dims = len(size)
    network = UNet(dims, 2, 3, channels=(4, 6, 8), strides=strides, kernel_sizes=kernels)
    network = network.double().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    image = torch.randn(2, 2, *size, dtype=torch.double)
    parameters = parameters_in_order_of_execution(network, image)
    expected = transcribed_unet(image, parameters, strides, kernels, num_convs=2)
    assert next(parameters, None) is None
    torch.testing.assert_close(network(image), expected, rtol=1e-9, atol=1e-9)


def test_divisor_is_the_product_of_strides_per_axis():
    network = UNet(3, 1, 2, channels=(4, 4, 4), strides=(1, (2, 2, 1), (3, 2, 2)))
    assert network.divisor == (6, 4, 2)


def test_all_decoder_levels_but_the_coarsest_are_supervised():
    network = UNet(2, 1, 2, channels=(4, 4, 4, 4, 4), deep_supervision=True)
    assert network.supervision_strides == ((1, 1), (2, 2), (4, 4))


def test_two_levels_are_supervised_at_full_resolution():
    network = UNet(2, 1, 2, channels=(4, 4), deep_supervision=True)
    assert [output.shape for output in network(torch.zeros(1, 1, 4, 4))] == [(1, 2, 4, 4)]


def test_weights_are_drawn_as_he_for_leaky_relu_and_biases_are_zero():
    torch.manual_seed(0)
    network = UNet(3, 1, 2, channels=(16, 32))
    conv = network.encoder.levels[1][1].conv
    expected = math.sqrt(2 / (1 + 0.01**2) / (32 * 27))
    assert conv.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert conv.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (4,)}, "two levels or more"),
        ({"channels": (4, 0)}, "1 or more each"),
        ({"channels": (4, 8), "strides": (1, 2, 2)}, "2 channels, 3 strides and 2 kernel_sizes"),
        ({"channels": (4, 8), "strides": (2, 2)}, r"strides\[0\] 2; expected 1"),
        ({"channels": (4, 8), "strides": (1, (2, 2, 2))}, r"stride \(2, 2, 2\).*spatial_dims=2"),
        ({"channels": (4, 8), "kernel_sizes": (3, 2)}, r"kernel_size \(2, 2\); expected odd"),
        ({"num_convs": 0}, "num_convs 0; expected at least 1"),
        ({"norm": "layer"}, "norm 'layer'; expected one of instance, batch, none"),
        ({"activation": "tanh"}, "activation 'tanh'; expected one of leaky_relu, relu"),
    ],
)
def test_wrong_option_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        UNet(2, 1, 2, **options)


@pytest.mark.parametrize("spatial_dims", [0, 1, 4])
def test_only_two_or_three_dimensions(spatial_dims):
    with pytest.raises(ConfigError, match="spatial_dims"):
        UNet(spatial_dims, 1, 2, channels=(4, 8))


def test_no_output_channel_is_refused():
    with pytest.raises(ConfigError, match="out_channels 0; expected at least 1"):
        UNet(2, 1, 0, channels=(4, 8))


def test_one_voxel_at_the_coarsest_level_is_refused_under_instance_norm():
    image = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ConfigError, match="leaves one voxel at the coarsest level"):
        UNet(2, 1, 2, channels=(4, 4, 4))(image)
    assert UNet(2, 1, 2, channels=(4, 4, 4), norm="none")(image).shape == (1, 2, 4, 4)
