"""Numbers of parameters in the published sizes; no weight is allocated."""

from __future__ import annotations

import pytest
import torch

from volseg.networks import build_network

LADDER_OF_5 = {"channels": (10, 20, 40, 80, 160)}
COUNTS = [
    ("laddernet", 2, 3, 2, {}, 879_698),
    ("laddernet", 3, 1, 2, {}, 2_635_346),
    ("laddernet", 2, 1, 2, LADDER_OF_5, 1_381_652),
    ("laddernet", 3, 1, 2, LADDER_OF_5, 4_141_232),
    ("unet_original", 2, 3, 1, {}, 31_031_745),
    ("unet_original", 3, 1, 2, {}, 90_292_738),
    ("unet_keras", 2, 1, 1, {"penultimate": 2}, 31_031_685),
    ("unet_keras", 3, 1, 1, {"penultimate": 2}, 90_296_069),
    ("unetplusplus", 2, 3, 3, {}, 47_195_340),
    ("unetplusplus", 3, 1, 2, {}, 156_196_808),
    ("unetplusplus", 2, 1, 2, {"form": "keras"}, 9_041_832),
    ("unetplusplus", 3, 1, 2, {"form": "keras"}, 26_198_504),
    ("unetplusplus", 2, 1, 1, {"form": "keras"}, 9_041_700),
    ("unetplusplus", 2, 1, 1, {"form": "keras", "deep_supervision": False}, 9_041_601),
    ("resnet_unet", 2, 3, 1, {}, 24_438_804),
    ("resnet_unet", 2, 3, 1, {"first_stage": "identity"}, 24_434_708),
    ("resnet_unet", 3, 1, 1, {}, 72_923_186),
    ("unet_summed_logits", 2, 4, 4, {}, 2_775_788),
    ("unet_summed_logits", 3, 4, 4, {}, 8_269_676),
    ("unet_summed_logits", 3, 4, 4, {"num_auxiliary": 0}, 8_269_284),
    ("hypercolumn_unet", 2, 1, 1, {}, 5_147_073),
    ("hypercolumn_unet", 3, 1, 1, {}, 15_418_593),
    ("unet3d_original", 3, 3, 3, {}, 19_069_955),
]
PRUNED = [
    (3, 3, "pytorch", (505_027, 2_638_339, 11_481_027, 47_189_763)),
    (1, 2, "keras", (100_994, 511_138, 2_204_994, 9_041_634)),
]


def build(name, dims, in_channels, out_channels, options):
    with torch.device("meta"):
        return build_network(
            name, spatial_dims=dims, in_channels=in_channels, out_channels=out_channels, **options
        )


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "dims", "in_channels", "out_channels", "options", "expected"), COUNTS
)
def test_number_of_parameters(name, dims, in_channels, out_channels, options, expected):
    assert count(build(name, dims, in_channels, out_channels, options)) == expected


@pytest.mark.parametrize(("in_channels", "out_channels", "form", "expected"), PRUNED)
def test_number_of_parameters_of_pruned_networks(in_channels, out_channels, form, expected):
    network = build("unetplusplus", 2, in_channels, out_channels, {"form": form})
    with torch.device("meta"):
        assert tuple(count(network.prune(level)) for level in (1, 2, 3, 4)) == expected
