from __future__ import annotations

import pytest

from volseg.errors import ConfigError
from volseg.networks import UNet, build_network, list_networks

FACTS = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}


def test_the_planned_network_is_listed():
    assert "unet" in list_networks()


def test_name_builds_its_class():
    assert type(build_network("unet", **FACTS)) is UNet


def test_unknown_name_offers_the_nearest():
    with pytest.raises(ConfigError, match=r"network 'u-net'.* Did you mean 'unet'"):
        build_network("u-net", **FACTS)


def test_unknown_option_offers_the_nearest_and_names_all():
    with pytest.raises(ConfigError, match=r"option 'chanels'.*num_convs.* Did you mean 'channels'"):
        build_network("unet", **FACTS, chanels=[4, 8])
