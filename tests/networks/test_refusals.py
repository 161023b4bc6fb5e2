"""Wrong options and inputs are refused by a `ConfigError` that names them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from volseg.errors import ConfigError
from volseg.networks import build_network, list_networks, list_options

SMALL = {"channels": (4, 8, 16)}


def build(name, spatial_dims=2, in_channels=1, out_channels=2, **options):
    return build_network(
        name,
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=out_channels,
        **{**SMALL, **options},
    )


def test_configuration_errors_are_value_errors():
    with pytest.raises(ValueError, match="channels"):
        build("unet", channels=(4,))


COMMON = [
    ({"spatial_dims": 1}, r"spatial_dims 1; expected 2 or 3"),
    ({"spatial_dims": 4}, r"spatial_dims 4; expected 2 or 3"),
    ({"in_channels": 0}, r"in_channels 0; expected at least 1"),
    ({"out_channels": 0}, r"out_channels 0; expected at least 1"),
    ({"channels": (4,)}, r"channels \(4,\); expected two levels or more"),
    ({"channels": (4, 0, 4)}, r"channels \(4, 0, 4\); expected .* 1 or more each"),
    ({"strides": (1, 2)}, r"3 channels, 2 strides and 3 kernel_sizes"),
    ({"kernel_sizes": (3, 3, 3, 3)}, r"3 channels, 3 strides and 4 kernel_sizes"),
    ({"strides": (1, 2, (2, 2, 2))}, r"stride \(2, 2, 2\).*spatial_dims=2"),
    ({"strides": (1, 0, 2)}, r"stride 0; expected a positive integer"),
    ({"kernel_sizes": (3, 2, 3)}, r"kernel_size \(2, 2\); expected odd sizes"),
    ({"norm": "layer"}, r"norm 'layer'; expected one of instance, batch, group, none"),
    ({"norm": []}, r"norm \[\]; expected a name, or a name and a dict of options"),
    ({"norm": ["batch", 1e-3]}, r"norm \['batch', 0.001\]; expected a name, or a name and a dict"),
    ({"norm": ["batch", {"epsilon": 1}]}, r"option of norm 'batch' 'epsilon'.*Did you mean 'eps'"),
    ({"spatial_dims": 3.0}, r"spatial_dims 3.0; expected 2 or 3"),
    ({"spatial_dims": "3"}, r"spatial_dims '3'; expected 2 or 3"),
    ({"in_channels": 1.5}, r"in_channels 1.5; expected at least 1, a whole number"),
    ({"in_channels": True}, r"in_channels True; expected at least 1, a whole number"),
    ({"out_channels": "2"}, r"out_channels '2'; expected at least 1, a whole number"),
    ({"out_channels": None}, r"out_channels None; expected at least 1, a whole number"),
    ({"channels": 16}, r"channels 16; expected two levels or more, whole numbers"),
    ({"channels": "abc"}, r"channels 'abc'; expected two levels or more, whole numbers"),
    ({"channels": (4.5, 8)}, r"channels \(4.5, 8\); expected two levels or more, whole numbers"),
    ({"channels": (4, True)}, r"channels \(4, True\); expected two levels or more, whole"),
    ({"strides": 2}, r"strides 2; expected a list of one per level"),
    ({"strides": "122"}, r"stride '1'; expected a positive integer or 2 of them"),
    ({"strides": (1, 2.0, 2)}, r"stride 2.0; expected a positive integer"),
    ({"strides": (1, (2, None), 2)}, r"stride \(2, None\); expected a positive integer"),
    ({"kernel_sizes": 3}, r"kernel_sizes 3; expected a list of one per level"),
    ({"kernel_sizes": (3, True, 3)}, r"kernel_size True; expected a positive integer"),
    ({"norm": 5}, r"norm 5; expected a name, or a name and a dict of options"),
    ({"norm": ("batch", {"eps": -1})}, r"eps of norm 'batch' -1; expected a number above 0"),
    ({"norm": ("instance", {"eps": "1e-5"})}, r"eps of norm 'instance' '1e-5'; .* as 1.0e-5"),
    ({"norm": ("batch", {"eps": float("nan")})}, r"eps of norm 'batch' nan; expected a number"),
    ({"norm": ("batch", {"affine": "no"})}, r"affine of norm 'batch' 'no'; expected true or false"),
    ({"norm": ("batch", {"momentum": 2})}, r"momentum of norm 'batch' 2; expected .* from 0 to 1"),
    ({"norm": ("batch", {3: 1})}, r"option of norm 'batch' 3; expected one of eps, affine"),
]


@pytest.mark.parametrize(("options", "message"), COMMON)
@pytest.mark.parametrize("name", list_networks())
def test_wrong_option_that_all_networks_have(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build(name, **options)


SHARED = [
    ("strides", (2, 2, 2), r"strides\[0\] 2; expected 1"),
    ("dropout", 1.0, r"dropout 1.0; expected at least 0 and below 1"),
    ("dropout", -0.5, r"dropout -0.5; expected at least 0 and below 1"),
    ("activation", "tanh", r"activation 'tanh'; expected one of leaky_relu, relu"),
    ("padding", "full", r"padding 'full'; expected one of same, valid"),
    ("upsampling", "linear", r"upsampling 'linear'; expected one of"),
    ("upsampling", ["nearest"], r"upsampling \['nearest'\]; expected one of"),
    ("activation", None, r"activation None; expected one of leaky_relu, relu"),
    ("dropout", "0.1", r"dropout '0.1'; expected at least 0 and below 1, a number"),
    ("dropout", False, r"dropout False; expected at least 0 and below 1, a number"),
    ("dropout", None, r"dropout None; expected at least 0 and below 1, a number"),
    ("deep_supervision", "false", r"deep_supervision 'false'; expected true or false"),
    ("deep_supervision", 1, r"deep_supervision 1; expected true or false"),
    ("skip_first", "no", r"skip_first 'no'; expected true or false"),
    ("residual", 0, r"residual 0; expected true or false"),
    ("bottleneck_skip", None, r"bottleneck_skip None; expected true or false"),
    ("num_ladders", 2.5, r"num_ladders 2.5; expected 2 or more, a whole number"),
    ("num_auxiliary", "2", r"num_auxiliary '2'; expected at least 0, a whole number"),
    ("num_convs", 1.5, r"num_convs 1.5; expected at least 1, one whole number or 3 of them"),
    ("num_convs", (1, True, 1), r"num_convs \(1, True, 1\); expected .* 3 of them"),
    ("num_decoder_convs", "22", r"num_decoder_convs '22'; expected .* 2 of them"),
    ("penultimate", 2.5, r"penultimate 2.5; expected None, or 1 or more"),
    ("branch", False, r"branch False; expected one of linear"),
    ("eval_output", True, r"eval_output True; expected 'last'"),
    ("eval_output", 1.0, r"eval_output 1.0; expected 'last'"),
    ("depth", "34", r"depth '34'; expected one of 18, 34, 50"),
    ("depth", 34.0, r"depth 34.0; expected one of 18, 34, 50"),
    ("blocks", 2, r"blocks 2; expected 2 numbers of 1 or more"),
    ("blocks", (1, 1.5), r"blocks \(1, 1.5\); expected 2 numbers of 1 or more"),
    ("decoder_channels", "abc", r"decoder_channels 'abc'; expected 3 of 1 or more"),
    ("pretrained", 7, r"pretrained 7; expected the path of a file"),
]


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        (name, *row)
        for name in list_networks()
        for row in SHARED
        # The large stem of a ResNet may have a stride.
        if row[0] in list_options(name) and (name, row[0]) != ("resnet_unet", "strides")
    ],
)
def test_wrong_option_that_several_networks_have(name, option, value, message):
    with pytest.raises(ConfigError, match=message):
        build(name, **{option: value})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unet", {"encoder": "resnet"}, r"encoder 'resnet'; expected one of plain, residual"),
        ("unet", {"num_convs": 0}, r"num_convs 0; expected at least 1"),
        ("unet", {"num_convs": (2, 2)}, r"num_convs \(2, 2\); expected .* 3 of them"),
        ("unet", {"num_decoder_convs": (1,)}, r"num_decoder_convs \(1,\); expected .* 2 of them"),
        ("unet_original", {"align": "padd"}, r"align 'padd'.*Did you mean 'pad'"),
        ("unet_original", {"padding": "valid"}, r"padding 'valid' with align 'pad'"),
        (
            "unet_original",
            {"padding": "valid", "align": "crop", "upsampling": "nearest"},
            r"upsampling 'nearest'; expected .* upsampling 'deconv'",
        ),
        ("unet3d_original", {"channels": (4, 7)}, r"channels \(4, 7\); expected even numbers"),
        ("unet3d_original", {"supervision": "both"}, r"supervision 'both'; expected one of"),
        (
            "unet3d_deep_supervision",
            {"branch": "cubic"},
            r"branch 'cubic'; expected one of linear, nearest, deconv, none",
        ),
        (
            "unet3d_deep_supervision",
            {"padding": "valid"},
            r"deep_supervision with padding 'valid'; expected padding 'same'",
        ),
        ("unet_summed_logits", {"num_auxiliary": -1}, r"num_auxiliary -1; expected at least 0"),
        ("unetplusplus", {"form": "tensorflow"}, r"form 'tensorflow'; expected one of pytorch"),
        ("unetplusplus", {"eval_output": 3}, r"eval_output 3; expected .* of \[1, 2\]"),
        ("unetplusplus", {"eval_output": 0}, r"eval_output 0; expected .* of \[1, 2\]"),
        ("unetplusplus", {"eval_output": "first"}, r"eval_output 'first'; expected 'last', 'mean'"),
        (
            "unetplusplus",
            {"eval_output": 1, "deep_supervision": False},
            r"eval_output 1; expected .* of \[2\]",
        ),
        (
            "unetplusplus",
            {"eval_output": "mean", "mean_of": "probs"},
            r"mean_of 'probs'; expected one of logits, softmax, sigmoid",
        ),
        (
            "unetplusplus",
            {"mean_of": "softmax"},
            r"without an average; expected eval_output 'mean'",
        ),
        (
            "unetplusplus",
            {"mean_of": "softmax", "eval_output": "mean", "out_channels": 1},
            r"mean_of 'softmax' with 1 out_channels; expected 'sigmoid'",
        ),
        ("unet", {"norm": "group"}, r"4 channels in 8 groups; expected a multiple"),
        ("unet", {"norm": ["group", {"num_groups": 0}]}, r"num_groups of norm 'group' 0; expected"),
        ("laddernet", {"num_ladders": 1}, r"num_ladders 1; expected 2 or more"),
        ("resnet_unet", {"depth": 101}, r"depth 101; expected one of 18, 34, 50"),
        ("resnet_unet", {"stem": "k5"}, r"stem 'k5'; expected one of k7s2pool, k3s1"),
        ("resnet_unet", {"first_stage": "none"}, r"first_stage 'none'; expected one of"),
        (
            "resnet_unet",
            {"first_stage": "identity"},
            r"first_stage 'identity' .* 4 to 8 channels.*Use 'projection'",
        ),
        (
            "resnet_unet",
            {"first_stage": "identity", "channels": (4, 4, 8), "stem": "k3s1"},
            r"first_stage 'identity' with stride \(2, 2\)",
        ),
        ("resnet_unet", {"strides": (1, 2, 2)}, r"strides\[0\] 1 with stem 'k7s2pool'"),
        ("resnet_unet", {"strides": (2, 2, 2), "stem": "k3s1"}, r"strides\[0\] 2; expected 1"),
        ("resnet_unet", {"blocks": (1,)}, r"blocks \(1,\); expected 2 numbers"),
        ("resnet_unet", {"blocks": (1, 0)}, r"blocks \(1, 0\); expected 2 numbers of 1 or more"),
        ("resnet_unet", {"decoder_channels": (4, 4)}, r"decoder_channels \(4, 4\); expected 3"),
        ("resnet_unet", {"decoder_norm": "layer"}, r"norm 'layer'; expected one of"),
    ],
)
def test_wrong_option_of_one_network(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build(name, **options)


@pytest.mark.parametrize("name", list_networks())
def test_numbers_of_numpy_are_taken_and_leave_no_trace(name):
    options = {
        "strides": [np.int64(1 if name != "resnet_unet" else 2), np.int64(2)],
        "kernel_sizes": [np.int32(3), [np.int64(3), 3]],
        "norm": ["batch", {"eps": np.float32(0.5), "momentum": 1}],
        "dropout": np.float32(0.5),
        "num_convs": np.int64(1),
        "num_auxiliary": np.int64(0),
        "num_ladders": np.int64(2),
        "penultimate": np.int64(2),
        "eval_output": np.int64(1),
        "depth": np.int64(18),
        "blocks": [np.int64(1)],
    }
    taken = {option: value for option, value in options.items() if option in list_options(name)}
    one, two = np.int64(1), np.int64(2)
    network = build(name, two, one, two, channels=[np.int64(4), np.int64(8)], **taken).eval()
    image = torch.randn(1, 1, 32, 32)
    # TorchScript takes plain numbers only.
    torch.testing.assert_close(torch.jit.script(network)(image), network(image))


def make_single_voxel(network, batch=1):
    return torch.zeros(batch, 1, *network.total_stride)


@pytest.mark.parametrize("name", list_networks())
@pytest.mark.parametrize("is_training", [True, False])
def test_one_voxel_at_the_coarsest_level_is_refused_under_instance_norm(name, is_training):
    network = build(name, norm="instance").train(is_training)
    with pytest.raises(ConfigError, match=r"one voxel at the coarsest level.*expected twice"):
        network(make_single_voxel(network))


@pytest.mark.parametrize("name", list_networks())
def test_one_value_at_the_coarsest_level_is_refused_under_batch_norm_in_training(name):
    network = build(name, norm="batch")
    with pytest.raises(ConfigError, match=r"one voxel at the coarsest.*batch normalisation"):
        network.train()(make_single_voxel(network))
    network.train()(make_single_voxel(network, batch=2))
    network.eval()(make_single_voxel(network))


@pytest.mark.parametrize("name", list_networks())
def test_less_than_a_voxel_at_the_coarsest_level_is_refused(name):
    network = build(name, norm="none").eval()
    image = make_single_voxel(network)
    with pytest.raises(ConfigError, match="input size"):
        network(image[:, :, : network.total_stride[0] - 1])
    network(image)


@pytest.mark.parametrize(
    ("name", "options"), [("unet_original", {"align": "crop"}), ("unet3d_original", {})]
)
def test_smallest_input_of_unpadded_convolutions_is_named(name, options):
    # Backwards: the last two convolutions need 5, upsampling makes 6 of 3; those before need 7,
    # made as 8 of 4. Hence 4 + 4 at the coarsest level, 16 + 4 above, and 40 + 4 at the finest.
    network = build(name, padding="valid", **options).eval()
    assert network(torch.zeros(1, 1, 44, 44)).shape == (1, 2, 4, 4)
    with pytest.raises(ConfigError, match=r"input size \[44, 43\]; expected at least \[44, 44\]"):
        network(torch.zeros(1, 1, 44, 43))


def test_smallest_input_counts_an_unpadded_convolution_before_the_head():
    # Backwards: 1 + 2 before the head, + 4, made as 8 of 4; + 4 at the coarsest level, twice, + 4.
    network = build("unet_original", channels=(4, 8), padding="valid", align="crop", penultimate=2)
    assert network.eval()(torch.zeros(1, 1, 20, 20)).shape == (1, 2, 2, 2)
    with pytest.raises(ConfigError, match=r"input size \[20, 19\]; expected at least \[20, 20\]"):
        network(torch.zeros(1, 1, 20, 19))


def test_unpadded_convolutions_leave_two_voxels_at_the_coarsest_level():
    # Backwards: 2 + 4 at the coarsest level, doubled; the finest level's kernels take nothing.
    options = {"channels": (4, 8), "kernel_sizes": (1, 3), "padding": "valid", "align": "crop"}
    network = build("unet_original", norm="instance", **options).eval()
    assert network(torch.zeros(1, 1, 12, 12)).shape == (1, 2, 4, 4)
    with pytest.raises(ConfigError, match=r"expected at least \[12, 12\]"):
        network(torch.zeros(1, 1, 10, 10))
    # One voxel is enough where nothing is normalised, and along an axis where nothing happens.
    network = build("unet_original", norm="none", **options).eval()
    assert network(torch.zeros(1, 1, 10, 10)).shape == (1, 2, 2, 2)
    thin = {**options, "strides": (1, (1, 2)), "kernel_sizes": ((1, 3), (1, 3))}
    network = build("unet_original", norm="instance", **thin).eval()
    assert network.smallest[0] == 1
    assert network(torch.zeros(1, 1, *network.smallest)).shape[2] == 1


def test_norm_of_the_decoder_counts_where_it_works_at_the_coarsest_level():
    options = {"channels": (4, 4, 6), "blocks": (1, 1), "decoder_norm": "instance"}
    network = build("resnet_unet", strides=(2, 2, 1), **options).eval()
    with pytest.raises(ConfigError, match=r"one voxel at the coarsest.*instance normalisation"):
        network(torch.zeros(1, 1, 4, 4))
    assert build("resnet_unet", **options).eval()(torch.zeros(1, 1, 8, 8)).shape[2:] == (8, 8)


@pytest.mark.parametrize("name", list_networks())
def test_smallest_input_leaves_a_voxel(name):
    network = build(name, norm="none").eval()
    assert network(torch.zeros(1, 1, *network.smallest)).shape[2:] == network.smallest
    with pytest.raises(ConfigError, match="input size"):
        network(torch.zeros(1, 1, *(size - 1 for size in network.smallest)))


@pytest.mark.parametrize("value", [0, -1])
def test_penultimate_of_no_channel_is_refused(value):
    with pytest.raises(ConfigError, match=f"penultimate {value}; expected None, or 1 or more"):
        build_network(
            "unet_keras", spatial_dims=2, in_channels=1, out_channels=2, penultimate=value
        )
