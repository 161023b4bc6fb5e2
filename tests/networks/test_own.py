"""A network of the user's own behind the promises of volseg's."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import DynUNet, SegResNet
from torch import nn

from volseg import extensions
from volseg.errors import ConfigError
from volseg.networks import OwnNetwork, build_network, build_own_network

FACTS = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2}
LEVELS = {
    "channels": [4, 8, 8],
    "strides": [[1, 1], [2, 2], [2, 2]],
    "kernel_sizes": [[3, 3]] * 3,
}


class Heads(nn.Module):
    """Gives what it is told, whatever goes in."""

    def __init__(self, *shapes, is_list=True, predicted=None):
        super().__init__()
        self.shapes, self.is_list = shapes, is_list
        self.predicted = predicted
        self.weight = nn.Parameter(torch.zeros(()))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        self.norm(x)
        drawn = torch.rand(())
        shapes = self.shapes if self.training or not self.predicted else (self.predicted,)
        outputs = [torch.zeros(len(x), *shape) + self.weight + drawn for shape in shapes]
        return outputs if self.is_list else outputs[0]


def wrap(*shapes, **options):
    return OwnNetwork(Heads(*shapes, **options), **FACTS)


def test_function_gets_the_facts_and_the_levels_that_it_asks_for():
    asked = {}

    def make(spatial_dims, in_channels, out_channels, strides, width=3, deep_supervision=None):
        asked.update(facts=(spatial_dims, in_channels, out_channels), strides=strides)
        asked.update(width=width, deep_supervision=deep_supervision)
        return nn.Conv2d(in_channels, out_channels, 1)

    network = build_own_network(make, **FACTS, **LEVELS, width=5)
    levels = {"strides": [[1, 1], [2, 2], [2, 2]], "width": 5, "deep_supervision": None}
    assert asked == {"facts": (2, 3, 2), **levels}
    assert (network.spatial_dims, network.in_channels, network.out_channels) == (2, 3, 2)


def test_own_network_is_shown_no_slices(monkeypatch):
    monkeypatch.setattr("volseg.networks.check_name", lambda *names: None)
    with pytest.raises(ConfigError, match=r"'mine' is your own and cannot be shown slices"):
        build_network("mine", **{**FACTS, "spatial_dims": 3}, slice_axis=2)


def test_function_with_any_keywords_gets_all():
    asked = {}

    def make(**options):
        asked.update(options)
        return nn.Identity()

    build_own_network(make, **FACTS, **LEVELS, width=5)
    assert asked == {**FACTS, **LEVELS, "width": 5}


@pytest.mark.parametrize("option", ["width", "deep_supervision"])
def test_option_that_the_function_does_not_take_is_refused(option):
    def make(spatial_dims, in_channels, out_channels, depth=2):
        return nn.Identity()

    with pytest.raises(ConfigError, match=f"'{option}' for make; expected one of .*depth"):
        build_own_network(make, **FACTS, **LEVELS, **{option: True})


def test_failure_and_anything_but_a_module_are_one_error():
    def fail(spatial_dims, in_channels, out_channels):
        raise ZeroDivisionError("no")

    with pytest.raises(ConfigError, match=r"fail cannot build its network \(ZeroDivisionError: no"):
        build_own_network(fail, **FACTS)
    with pytest.raises(ConfigError, match=r"gives a dict; expected a torch\.nn\.Module"):
        build_own_network(dict, **FACTS)


def test_networks_of_monai_are_built_by_their_own_names(monkeypatch):
    def make(spatial_dims, in_channels, out_channels, channels, strides, kernel_sizes):
        return DynUNet(
            spatial_dims, in_channels, out_channels, kernel_sizes, strides, strides[1:], channels
        )

    monkeypatch.setattr(extensions, "_registered", {})
    extensions.register("networks", "monai.networks.nets:SegResNet")
    extensions.register("networks", "dynunet", make)
    for name, kind in (("monai.networks.nets:SegResNet", SegResNet), ("dynunet", DynUNet)):
        network = build_network(name, **FACTS, **LEVELS).eval()
        assert isinstance(network.network, kind)
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 2, 32, 32)
        network.find_outputs((32, 32))
        assert network.supervision_strides == ((1, 1),)


def test_outputs_are_a_list_in_training_and_the_first_one_in_eval():
    network = wrap((2, 8, 8), (2, 4, 4))
    image = torch.zeros(1, 3, 8, 8)
    assert [tuple(logits.shape) for logits in network.train()(image)] == [
        (1, 2, 8, 8),
        (1, 2, 4, 4),
    ]
    assert network.eval()(image).shape == (1, 2, 8, 8)
    network.find_outputs((8, 8))
    assert network.supervision_strides == ((1, 1), (2, 2))
    network.set_deep_supervision(False)
    assert network.train()(image).shape == (1, 2, 8, 8)


@pytest.mark.parametrize("options", [{}, {"is_list": False}])
def test_one_output_is_a_tensor(options):
    network = wrap((2, 8, 8), **options)
    assert network.train()(torch.zeros(2, 3, 8, 8)).shape == (2, 2, 8, 8)
    network.find_outputs((8, 8))
    assert network.supervision_strides == ((1, 1),)


def test_finding_outputs_changes_neither_weights_nor_random_numbers():
    network = wrap((2, 8, 8))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(3)
    network.find_outputs((8, 8))
    drawn = torch.rand(2)
    assert torch.equal(drawn, torch.rand(2, generator=torch.manual_seed(3)))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert network.training


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(3, 8, 8)], {}),
        ([(2, 4, 4)], {}),
        ([(2, 8)], {}),
        ([(2, 8, 8), (2, 3, 3)], {}),
        ([(2, 8, 8), (1, 4, 4)], {}),
        ([(2, 8, 8)], {"predicted": (2, 4, 4)}),
    ],
)
def test_logits_of_a_wrong_shape_are_refused(shapes, options):
    with pytest.raises(ConfigError, match=r"turns a patch of \(8, 8\) into .*; expected logits of"):
        wrap(*shapes, **options).find_outputs((8, 8))


def test_anything_but_logits_is_refused():
    for output in ({}, [], "logits", [1.0]):
        network = OwnNetwork(nn.Identity(), **FACTS)
        network.network.forward = lambda x, output=output: output
        with pytest.raises(ConfigError, match="expected a tensor of logits, or a list of them"):
            network(torch.zeros(1, 3, 8, 8))


def test_patch_that_the_module_cannot_take_is_one_error():
    network = OwnNetwork(SegResNet(2, 8, 3, 2), **FACTS)
    with pytest.raises(
        ConfigError, match=r"SegResNet cannot take a patch of \(9, 8\).*plan\.patch"
    ):
        network.find_outputs((9, 8))
