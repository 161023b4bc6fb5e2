"""Supervised outputs can be switched off, and their weights left out."""

from __future__ import annotations

import pytest
import torch

from volseg.errors import ConfigError
from volseg.networks import build_network, list_networks, list_options, strip_supervision

SUPERVISED = [
    (name, options)
    for name in list_networks()
    if "deep_supervision" in list_options(name)
    for options in ({}, {"supervision": "encoder"}, {"form": "keras"})
    if set(options) <= set(list_options(name))
]
IMAGE = torch.randn(2, 1, 16, 16, generator=torch.manual_seed(0))


def build(name, **options):
    options = {"channels": (4, 6, 8, 8), **options}
    return build_network(name, spatial_dims=2, in_channels=1, out_channels=2, **options)


def predict(network):
    with torch.no_grad():
        return network.eval()(IMAGE)


@pytest.mark.parametrize(("name", "options"), SUPERVISED)
def test_without_supervision_training_gives_the_main_output(name, options):
    network = build(name, deep_supervision=True, **options).train()
    outputs = network(IMAGE)
    assert len(outputs) == len(network.supervision_strides) > 1
    network.set_deep_supervision(False)
    torch.testing.assert_close(network(IMAGE), outputs[0])
    network.set_deep_supervision(True)
    assert len(network(IMAGE)) == len(outputs)


def test_supervision_cannot_be_switched_on_where_no_branch_was_built():
    network = build("unet")
    network.set_deep_supervision(False)
    with pytest.raises(ConfigError, match="deep_supervision=True, if it has that option"):
        network.set_deep_supervision(True)
    with pytest.raises(ConfigError, match="expected true or false"):
        network.set_deep_supervision("false")


@pytest.mark.parametrize(("name", "options"), SUPERVISED)
def test_stripped_weights_give_the_same_logits(name, options):
    trained = build(name, deep_supervision=True, **options)
    network = build(name, deep_supervision=False, **options)
    weights = strip_supervision(trained.state_dict(), network)
    assert len(weights) < len(trained.state_dict())
    network.load_state_dict(weights)
    assert torch.equal(predict(network), predict(trained))


def test_heads_that_predict_are_never_left_out():
    weights = build("unet_summed_logits").state_dict()
    with pytest.raises(ConfigError, match="expected those of the same network"):
        strip_supervision(weights, build("unet_summed_logits", num_auxiliary=0))


def test_weights_without_supervision_stay():
    network = build("unet3d_original")
    assert strip_supervision(network.state_dict(), network).keys() == network.state_dict().keys()


@pytest.mark.parametrize(
    "other", [{"channels": (4, 6, 8)}, {"channels": (4, 6, 8, 10)}, {"norm": "batch"}]
)
def test_weights_of_another_network_are_refused(other):
    weights = build("unet", deep_supervision=True, **other).state_dict()
    with pytest.raises(ConfigError, match="expected those of the same network"):
        strip_supervision(weights, build("unet"))
