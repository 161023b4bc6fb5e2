from __future__ import annotations

import pytest
import torch
from torch import nn

from volseg.errors import ConfigError
from volseg.networks import (
    OriginalUNet,
    ResNetUNet,
    UNet,
    UNet3d,
    build_network,
    list_networks,
    list_options,
)

FACTS = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
SMALL = {"channels": (4, 8, 16)}


def test_names():
    assert list_networks() == [
        "unet",
        "unet_original",
        "unet_keras",
        "unet3d_original",
        "unet3d_deep_supervision",
        "dsn3d",
        "unet_summed_logits",
        "unetplusplus",
        "laddernet",
        "resnet_unet",
        "hypercolumn_unet",
    ]


@pytest.mark.parametrize(
    ("name", "cls"),
    [("unet", UNet), ("unet_keras", OriginalUNet), ("unet3d_deep_supervision", UNet3d)],
)
def test_name_builds_its_class(name, cls):
    assert type(build_network(name, **FACTS, **SMALL)) is cls


def test_a_preset_has_options_that_can_be_overridden():
    supervised = build_network("unet3d_deep_supervision", **FACTS, **SMALL)
    assert len(supervised.supervision_strides) == 2
    plain = build_network("unet3d_deep_supervision", **FACTS, **SMALL, deep_supervision=False)
    assert len(plain.supervision_strides) == 1


@pytest.mark.parametrize("name", list_networks())
def test_all_but_the_ladders_begin_with_biases_of_zero_behind_he_weights(name):
    network = build_network(name, **FACTS, **SMALL)
    convs = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    biases = [conv.bias for conv in convs if conv.bias is not None]
    assert all(bias.any() == (name == "laddernet") for bias in biases)
    assert biases


def test_options_are_the_keywords_of_the_network():
    assert list_options("resnet_unet")[0] == "depth"
    assert {"pretrained", "stem", "channels"} < set(list_options("resnet_unet"))
    assert not {"spatial_dims", "in_channels", "out_channels"} & set(list_options("unet"))


def test_unknown_name_offers_the_nearest():
    with pytest.raises(ConfigError, match=r"network 'u-net'.* Did you mean 'unet'"):
        build_network("u-net", **FACTS)
    with pytest.raises(ConfigError, match=r"Did you mean 'unetplusplus'"):
        list_options("unet++plus")


@pytest.mark.parametrize("name", list_networks())
def test_unknown_option_offers_the_nearest_and_names_all(name):
    with pytest.raises(ConfigError, match=r"chanels'; expected.*norm.* Did you mean 'channels'"):
        build_network(name, **FACTS, chanels=[4, 8])


def test_option_of_a_wrong_type_is_refused_by_the_class_as_by_its_name():
    with pytest.raises(ConfigError, match="channels 7; expected two levels or more"):
        build_network("unet", **FACTS, channels=7)
    with pytest.raises(ConfigError, match="channels 7; expected two levels or more"):
        UNet(2, 1, 2, channels=7)


def test_networks_can_be_used_by_their_class():
    assert ResNetUNet(2, 1, 2, depth=18).depth == 18


@pytest.mark.parametrize("name", ["unet", "unet3d_original", "dsn3d", "unetplusplus"])
def test_a_single_output_is_a_tensor_in_training_too(name):
    network = build_network(name, **FACTS, channels=[4, 8], deep_supervision=True).train()
    assert len(network.supervision_strides) == 1
    assert isinstance(network(torch.zeros(2, 1, 8, 8)), torch.Tensor)
