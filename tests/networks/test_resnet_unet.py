from __future__ import annotations

import pytest
import torch
from torch import nn

from volseg.networks import ResNetUNet

CHANNELS = (4, 4, 6, 8, 10)


def build(dims=2, channels=CHANNELS, **options):
    torch.manual_seed(0)
    return ResNetUNet(dims, 1, 2, channels=channels, **options).eval()


@pytest.mark.parametrize(
    ("depth", "units", "convs", "tap"),
    [(18, [2, 2, 2, 2], 2, 10), (34, [3, 4, 6, 3], 2, 10), (50, [3, 4, 6, 3], 3, 40)],
)
def test_depth_says_how_many_units_of_which_kind(depth, units, convs, tap):
    network = build(depth=depth)
    assert [1 + len(stage.units) for stage in network.stages] == units
    assert {len(unit.convs) for s in network.stages for unit in (s.first, *s.units)} == {convs}
    assert network.final.norm.num_features == tap
    assert network(torch.zeros(1, 1, 32, 64)).shape == (1, 2, 32, 64)


def test_bottleneck_unit_strides_in_its_middle_convolution():
    _, middle, last = build(depth=50).stages[1].first.convs
    assert (middle.conv.kernel_size, middle.conv.stride) == ((3, 3), (2, 2))
    assert (last.conv.kernel_size, last.conv.stride) == ((1, 1), (1, 1))


@pytest.mark.parametrize(
    ("channels", "units"), [((4, 4, 6), [3, 4]), ((4, 4, 6, 6, 6, 6), [3, 4, 6, 3, 3])]
)
def test_stages_are_cut_or_the_last_is_repeated(channels, units):
    network = build(channels=channels)
    assert [1 + len(stage.units) for stage in network.stages] == units
    assert network.divisor == (2 ** len(channels),) * 2


def test_small_stem_keeps_full_resolution():
    network = build(3, channels=(4, 4, 6), stem="k3s1", blocks=(1, 1))
    sizes = []
    network.stem.register_forward_hook(lambda _, __, out: sizes.append(out.shape[2:]))
    for stage in network.stages:
        stage.register_forward_hook(lambda _, __, out: sizes.append(out[0].shape[2:]))
    assert network(torch.zeros(1, 1, 8, 8, 8)).shape == (1, 2, 8, 8, 8)
    assert sizes == [(8, 8, 8), (4, 4, 4), (2, 2, 2)]
    assert network.divisor == (4, 4, 4)
    # Every level of the decoder has a tap, the finest that of the stem.
    inputs = [level.convs[0].conv.in_channels for level in network.decoder]
    assert inputs == [6 + 4, 3 + 4]


def test_large_stem_has_two_strides_and_no_tap_at_full_resolution():
    network = build()
    sizes = []
    network.stem.register_forward_hook(lambda _, __, out: sizes.append(out.shape[2:]))
    network.pool.register_forward_hook(lambda _, __, out: sizes.append(out.shape[2:]))
    network(torch.zeros(1, 1, 64, 64))
    assert sizes == [(32, 32), (16, 16)]
    # Widths of the decoder 5, 2, 1, 1, 1 behind 10, 5, 2, 1, 1 and taps of 8, 6, 4, 4, 0.
    inputs = [level.convs[0].conv.in_channels for level in network.decoder]
    assert inputs == [10 + 8, 5 + 6, 2 + 4, 1 + 4, 1]


def test_taps_are_activated_inputs_of_the_halving_units():
    network = build(channels=(4, 4, 6), blocks=(1, 1))
    seen = []
    network.stages[1].first.preactivation.register_forward_hook(
        lambda _, __, out: seen.append(out.clone())
    )
    joined = []
    network.decoder[0].convs.register_forward_pre_hook(lambda _, args: joined.append(args[0]))
    network(torch.randn(1, 1, 16, 16))
    assert seen[0].min() == 0
    assert torch.equal(joined[0][:, 6:], seen[0])


@pytest.mark.parametrize(("first_stage", "projects"), [("projection", True), ("identity", False)])
def test_first_unit_projects_or_adds_its_input(first_stage, projects):
    network = build(first_stage=first_stage)
    assert network.stages[0].first.projects == projects
    assert all(stage.first.projects for stage in list(network.stages)[1:])
    assert not any(unit.projects for stage in network.stages for unit in stage.units)


def test_deconvolution_keeps_the_width():
    network = build(upsampling="deconv")
    up = network.decoder[0].upsampling
    assert (up.in_channels, up.out_channels, up.kernel_size) == (10, 10, (2, 2))


def test_decoder_norm_is_its_own():
    network = build(norm="instance", decoder_norm=("batch", {"eps": 0.5}))
    assert network.decoder[0].convs[0].norm.eps == 0.5
    assert type(network.final.norm).__name__ == "InstanceNorm"


def test_dropout_is_in_the_decoder_alone():
    network = build(dropout=0.25, activation="elu")
    assert not any(isinstance(m, nn.Dropout2d) for m in network.stages.modules())
    drops = [m.p for m in network.decoder.modules() if isinstance(m, nn.Dropout2d)]
    assert drops == [0.25] * 10
    assert not any(isinstance(module, nn.ReLU) for module in network.modules())
