"""The planner's table of networks against the networks themselves."""

from __future__ import annotations

import pytest
import torch

from volseg.errors import ConfigError
from volseg.networks import build_network, list_networks, list_options
from volseg.networks.cost import count_cost
from volseg.planning.architectures import ARCHITECTURES, choose_supervision, find_architecture

LEVELS = [((16, 32, 64, 128), (40, 56, 40)), ((32, 64, 128, 256), (64, 64, 64))]


def test_every_network_can_be_planned() -> None:
    assert list(ARCHITECTURES) == list_networks()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_supervision_is_asked_of_networks_that_have_it(name: str) -> None:
    assert ARCHITECTURES[name].has_supervision == ("deep_supervision" in list_options(name))


VARIANTS = [(name, {}) for name in ARCHITECTURES] + [
    (name, {option: value})
    for name, architecture in ARCHITECTURES.items()
    for option, value in architecture.variants
    if value not in (5, 7, 8, 9, 10, 11)  # Of ladders some are enough.
]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize(("channels", "size"), LEVELS)
def test_cost_beside_the_unet_holds_within_a_third(
    name: str, options: dict[str, object], channels: tuple[int, ...], size: tuple[int, ...]
) -> None:
    architecture = ARCHITECTURES[name]
    operations, memory = architecture.scale(options)

    def count(name: str, **options: object) -> tuple[float, float]:
        facts = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": channels}
        with torch.device("meta"):
            cost = count_cost(build_network(name, **facts, **options), size)
        return cost.gflop, cost.training_mb

    theirs = count(name, **{**architecture.options, **options})
    unet = count("unet", deep_supervision=True)
    assert theirs[0] / unet[0] == pytest.approx(operations, rel=1 / 3)
    assert theirs[1] / unet[1] == pytest.approx(memory, rel=1 / 3)


def test_cost_of_an_option_that_is_not_listed_or_no_value_is_the_networks_own() -> None:
    architecture = ARCHITECTURES["laddernet"]
    own = (architecture.operations, architecture.memory)
    assert architecture.scale({"norm": ["batch", {}], "num_ladders": [2]}) == own


def test_supervision_is_the_sources_unless_said() -> None:
    assert choose_supervision("unet", None) is True
    assert choose_supervision("unet3d_original", None) is False
    assert choose_supervision("unetplusplus", False) is False
    assert choose_supervision("laddernet", None) is None


def test_supervision_of_a_single_output_is_refused() -> None:
    with pytest.raises(ConfigError, match="'laddernet', which has a single output"):
        choose_supervision("laddernet", True)


def test_unknown_network_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'unet\+\+'; expected one of .*Did you mean 'unet'"):
        find_architecture("unet++")
