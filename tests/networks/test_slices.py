"""A 2D network on the slices of volumes: each slice as if it were a picture of its own."""

from __future__ import annotations

import pytest
import torch

from volseg.errors import ConfigError
from volseg.networks import SliceNetwork, build_network, inside_slices, list_networks

SHORT = {"resnet_unet": {"blocks": [1, 2]}}
LEVELS = {"channels": (4, 6, 8, 8), "deep_supervision": True}


def build(name="unet", axis=2, **options):
    torch.manual_seed(0)
    facts = {"in_channels": 2, "out_channels": 3}
    return build_network(name, spatial_dims=3, **facts, slice_axis=axis, **options)


def make_volume(network, axis, slices=3):
    """Two volumes of the smallest size that leaves two voxels at the coarsest level."""
    flat = [2 * max(d, s) for d, s in zip(network.divisor, network.smallest, strict=True)]
    flat[axis] = slices
    return torch.randn(2, 2, *flat, generator=torch.Generator().manual_seed(1))


def slice_by_slice(network, volume, axis):
    """Every slice of every volume alone through the 2D network."""
    slices = [network(volume.select(axis + 2, i)) for i in range(volume.shape[axis + 2])]
    if isinstance(slices[0], list):
        return [torch.stack(level, axis + 2) for level in zip(*slices, strict=True)]
    return torch.stack(slices, axis + 2)


@pytest.mark.parametrize("name", list_networks())
def test_every_network_sees_slices(name):
    network = build(name, channels=(4, 6, 8), **SHORT.get(name, {})).eval()
    volume = make_volume(network, 2)
    with torch.no_grad():
        expected = slice_by_slice(network.network, volume, 2)
        torch.testing.assert_close(network(volume), expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_outputs_in_training_are_those_of_the_slices(axis):
    network = build(axis=axis, **LEVELS)
    volume = make_volume(network, axis)
    outputs = network(volume)
    expected = slice_by_slice(network.network, volume, axis)
    assert len(outputs) == len(expected) == 2
    for output, one, stride in zip(outputs, expected, network.supervision_strides, strict=True):
        torch.testing.assert_close(output, one, atol=1e-5, rtol=1e-4)
        size = [n // s for n, s in zip(volume.shape[2:], stride, strict=True)]
        assert list(output.shape[2:]) == size


@pytest.mark.parametrize(
    ("axis", "divisor", "second"),
    [(0, (1, 8, 8), (1, 2, 2)), (1, (8, 1, 8), (2, 1, 2)), (2, (8, 8, 1), (2, 2, 1))],
)
def test_sizes_have_a_one_along_the_slices(axis, divisor, second):
    network = build(axis=axis, **LEVELS)
    assert network.divisor == network.total_stride == network.smallest == divisor
    assert network.supervision_strides == ((1, 1, 1), second)
    assert network.spatial_dims == 3


def test_levels_of_a_volume_become_those_of_a_slice():
    strides, kernels = ((1, 1, 1), (2, 1, 4), (2, 1, 2)), ((3, 1, 5), (3, 1, 3), 3)
    network = build(axis=1, channels=(4, 6, 8), strides=strides, kernel_sizes=kernels)
    alone = build_network(
        "unet",
        spatial_dims=2,
        in_channels=2,
        out_channels=3,
        channels=(4, 6, 8),
        strides=((1, 1), (2, 4), (2, 2)),
        kernel_sizes=((3, 5), (3, 3), 3),
    )
    assert network.divisor == (4, 1, 8)
    shapes = [(name, p.shape) for name, p in network.network.state_dict().items()]
    assert shapes == [(name, p.shape) for name, p in alone.state_dict().items()]


@pytest.mark.parametrize("axis", [0, 2])
def test_scripted_slices_are_equal(axis):
    network = build(axis=axis, **LEVELS)
    volume = make_volume(network, axis)
    scripted = torch.jit.script(network)
    for one, other in zip(scripted(volume), network(volume), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    scripted, network = torch.jit.script(network.eval()), network.eval()
    more = torch.cat([volume, volume + 1], axis + 2)
    torch.testing.assert_close(scripted(more), network(more), atol=1e-5, rtol=1e-4)


def test_supervision_can_be_switched_off():
    network = build(**LEVELS)
    network.set_deep_supervision(False)
    assert isinstance(network(make_volume(network, 2)), torch.Tensor)
    network.set_deep_supervision(True)
    assert len(network(make_volume(network, 2))) == 2


def test_the_network_inside_is_found():
    network = build()
    assert isinstance(network, SliceNetwork)
    assert inside_slices(network).spatial_dims == 2
    alone = build_network("unet", spatial_dims=3, in_channels=1, out_channels=2)
    assert inside_slices(alone) is alone


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"spatial_dims": 2, "slice_axis": 1}, "slice_axis with spatial_dims 2"),
        ({"spatial_dims": 3, "slice_axis": 3}, "slice_axis 3; expected 0, 1 or 2"),
        (
            {"spatial_dims": 3, "slice_axis": 2, "strides": ((1, 1, 1), (2, 2, 2))},
            r"strides \[2, 2, 2\] of a network on slices; expected three values, with a 1",
        ),
    ],
)
def test_what_is_no_slice_is_refused(options, problem):
    with pytest.raises(ConfigError, match=problem):
        build_network("unet", in_channels=1, out_channels=2, channels=(4, 8), **options)


def test_an_input_of_a_wrong_size_is_refused_in_three_axes():
    network = build(**LEVELS)
    with pytest.raises(ConfigError, match=r"Pad to \[16, 16, 3\]"):
        network(torch.zeros(1, 2, 15, 16, 3))
