"""The optimiser that suits a network, and its learning rate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from volseg.config import ConfigError, OptimizerConfig, load_config
from volseg.networks import build_network, list_networks
from volseg.training.muon import Muon
from volseg.training.optimizers import choose_optimizer, learning_rate, make_optimizer

UNNORMALISED = {"laddernet", "unet_keras", "unet_original"}


@pytest.mark.parametrize("name", list_networks())
def test_muon_is_for_networks_with_normalisation(name: str) -> None:
    options = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    chosen = choose_optimizer(OptimizerConfig(), build_network(name, **options))
    assert chosen.name == ("adamw" if name in UNNORMALISED else "muon")


@pytest.mark.parametrize("norm", [nn.BatchNorm3d(4), nn.InstanceNorm3d(4), nn.GroupNorm(2, 4)])
def test_norms_of_own_networks_count(norm: nn.Module) -> None:
    network = nn.Sequential(nn.Conv3d(1, 4, 3), norm)
    assert choose_optimizer(OptimizerConfig(), network).name == "muon"
    assert choose_optimizer(OptimizerConfig(), network[:1]).name == "adamw"


def test_what_was_named_stays() -> None:
    network = build_network("laddernet", spatial_dims=2, in_channels=1, out_channels=2)
    for name in ("muon", "adamw", "sgd"):
        config = load_config(None, [f"optimizer.name={name}"]).optimizer
        assert choose_optimizer(config, network).name == name


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [("unetplusplus", {"form": "keras"}, "adamw"), ("laddernet", {"norm": "instance"}, "muon")],
)
def test_options_of_a_network_decide(name: str, options: dict[str, str], expected: str) -> None:
    shape = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    network = build_network(name, **shape, **options)
    assert choose_optimizer(OptimizerConfig(), network).name == expected


def test_every_optimiser_has_a_learning_rate_of_its_own() -> None:
    for name, rate in {"muon": 1e-2, "adamw": 3e-3, "sgd": 1e-2}.items():
        layer = nn.Conv2d(1, 2, 3)
        config = choose_optimizer(OptimizerConfig(name=name), layer)
        assert config.learning_rate == rate
        optimizer = make_optimizer(layer, config)
        assert [group["lr"] for group in optimizer.param_groups] == [rate] * len(
            optimizer.param_groups
        )
        mine = OptimizerConfig(name=name, learning_rate=0.5)
        assert choose_optimizer(mine, layer).learning_rate == 0.5


def test_every_optimiser_has_a_decay_of_its_own() -> None:
    for name, decays in {"muon": [0.3, 0.0], "adamw": [1e-2], "sgd": [3e-5]}.items():
        layer = nn.Conv2d(1, 2, 3)
        config = choose_optimizer(OptimizerConfig(name=name), layer)
        assert config.weight_decay == decays[0]
        groups = make_optimizer(layer, config).param_groups
        # Of Muon's groups the second is the biases and norms.
        assert [group["weight_decay"] for group in groups] == decays
        mine = OptimizerConfig(name=name, weight_decay=0)
        assert choose_optimizer(mine, layer).weight_decay == 0


def test_optimisers_by_name() -> None:
    kinds = {"muon": Muon, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    for name, kind in kinds.items():
        layer = nn.Conv2d(1, 2, 3)
        config = choose_optimizer(OptimizerConfig(name=name), layer)
        assert type(make_optimizer(layer, config)) is kind


def test_what_is_left_open_is_chosen_first() -> None:
    for use in (
        lambda config: make_optimizer(nn.Conv2d(1, 2, 3), config),
        lambda config: learning_rate(config, 0.5),
    ):
        with pytest.raises(ValueError, match="that choose_optimizer gave"):
            use(OptimizerConfig())


def test_a_momentum_needs_an_optimiser_that_has_one() -> None:
    config = load_config(None, ["optimizer.momentum=0.9"]).optimizer
    normalised = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4))
    assert choose_optimizer(config, normalised).momentum == 0.9
    with pytest.raises(ConfigError, match="without normalisation, which adamw trains"):
        choose_optimizer(config, normalised[:1])
