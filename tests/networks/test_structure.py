"""What is found of a network by running it, and where a drawing puts it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from volseg.errors import ConfigError
from volseg.networks import SegmentationNetwork, UNet, build_network, list_networks
from volseg.networks.layout import arrange
from volseg.networks.levels import make_levels
from volseg.networks.structure import trace_structure

OPTIONS = {
    "unet": {"encoder": "residual", "deep_supervision": True},
    "unet3d_original": {"deep_supervision": True, "supervision": "encoder"},
    "laddernet": {"num_ladders": 3, "bottleneck_skip": True},
    "resnet_unet": {"stem": "k3s1", "depth": 50},
}
CASES = [*((name, {}) for name in list_networks()), *OPTIONS.items()]


def trace(name, size=(64, 64), **options):
    with torch.device("meta"):
        network = build_network(
            name, spatial_dims=len(size), in_channels=1, out_channels=3, **options
        )
    return trace_structure(network, size)


def links(structure):
    """The wiring by name: a join is the names that it joins."""

    def name(index):
        block = structure.blocks[index]
        if block.name:
            return block.name
        return frozenset(name(e.source) for e in structure.edges if e.target == index)

    return {(name(edge.source), name(edge.target)) for edge in structure.edges}


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{'-'.join(case[1])}")
def structure(request):
    name, options = request.param
    return trace(name, **options)


def test_blocks_of_a_unet_by_hand():
    network = UNet(3, 2, 3, channels=(4, 6, 8), strides=(1, (1, 2, 2), 2), deep_supervision=True)
    structure = trace_structure(network, (8, 16, 16))
    full, half, coarse = (8, 16, 16), (8, 8, 8), (4, 4, 4)
    assert [(b.name, b.kind, b.channels, b.size, b.stride, b.join) for b in structure.blocks] == [
        ("image", "image", 2, full, (1, 1, 1), ""),
        ("encoder.levels.0", "ConvStack", 4, full, (1, 1, 1), ""),
        ("encoder.levels.1", "ConvStack", 6, half, (1, 2, 2), ""),
        ("encoder.levels.2", "ConvStack", 8, coarse, (2, 4, 4), ""),
        ("decoder.0", "ConcatLevel", 6, half, (1, 2, 2), "cat"),
        ("decoder.1", "ConcatLevel", 4, full, (1, 1, 1), "cat"),
        ("heads.1", "Conv3d", 3, full, (1, 1, 1), ""),
    ]
    assert [(edge.source, edge.target) for edge in structure.edges] == [
        (0, 1), (1, 2), (2, 3), (3, 4), (2, 4), (4, 5), (1, 5), (5, 6)
    ]  # fmt: skip
    assert structure.outputs == (6,)


def test_every_block_leads_from_the_image_to_the_logits(structure):
    last = len(structure.blocks) - 1
    assert {edge.target for edge in structure.edges} == set(range(1, last + 1))
    ends = set(range(last + 1)) - {edge.source for edge in structure.edges}
    assert ends == set(structure.outputs)
    assert all(edge.source < edge.target for edge in structure.edges)
    assert all(structure.blocks[index].channels == 3 for index in structure.outputs)


def test_names_are_parts_of_the_network_and_strides_divide_sizes(structure):
    names = [block.name for block in structure.blocks if block.name]
    assert len(names) == len(set(names))
    for block in structure.blocks:
        assert tuple(n * s for n, s in zip(block.size, block.stride, strict=True)) == (64, 64)


def test_several_inputs_are_joined_and_single_ones_are_not(structure):
    for index, block in enumerate(structure.blocks):
        several = sum(edge.target == index for edge in structure.edges) > 1
        assert block.join in (("cat", "add") if several else ("",))


def test_outputs_are_those_of_training_main_output_first():
    structure = trace("unet3d_deep_supervision")
    names = [structure.blocks[index].name for index in structure.outputs]
    assert names == ["head", "branches.0", "branches.1"]


def test_nodes_of_unetplusplus_are_wired_as_in_the_paper():
    """X(i, j) takes X(i - 1, 0), or all X(i, k < j) and X(i + 1, j - 1)."""
    nodes = [(i, j) for i, j in itertools.product(range(5), repeat=2) if i + j <= 4]
    expected = {("image", "nodes.0_0")} | {(f"nodes.0_{j}", f"heads.0_{j}") for j in range(1, 5)}
    for i, j in nodes:
        before = [(i, k) for k in range(j)] + ([(i + 1, j - 1)] if j else [(i - 1, 0)] if i else [])
        expected |= {(f"nodes.{a}_{b}", f"nodes.{i}_{j}") for a, b in before}
    assert links(trace("unetplusplus")) == expected


def test_ladders_add_what_the_ladder_before_has_decoded():
    structure = trace("laddernet", channels=(4, 6, 8))
    first, second = "ladders.0", "ladders.1"
    assert links(structure) == {
        ("image", "stem"),
        ("stem", f"{first}.encoder.0"),
        (f"{first}.encoder.0", f"{first}.encoder.1"),
        (f"{first}.encoder.1", f"{first}.encoder.2"),
        (f"{first}.encoder.2", f"{first}.decoder.0"),
        (f"{first}.encoder.1", f"{first}.decoder.0"),
        (f"{first}.decoder.0", f"{first}.decoder.1"),
        (f"{first}.encoder.0", f"{first}.decoder.1"),
        (f"{first}.decoder.1", f"{second}.entry"),
        (f"{second}.entry", f"{second}.encoder.0"),
        (f"{first}.decoder.1", f"{second}.encoder.0"),
        (f"{second}.encoder.0", f"{second}.encoder.1"),
        (f"{first}.decoder.0", f"{second}.encoder.1"),
        (f"{second}.encoder.1", f"{second}.encoder.2"),
        (f"{second}.encoder.2", f"{second}.decoder.0"),
        (f"{second}.encoder.1", f"{second}.decoder.0"),
        (f"{second}.decoder.0", f"{second}.decoder.1"),
        (f"{second}.encoder.0", f"{second}.decoder.1"),
        (f"{second}.decoder.1", "head"),
    }
    assert {block.join for block in structure.blocks} == {"", "add"}


def test_skips_of_a_resnet_leave_their_stage_before_it_strides():
    structure = trace("resnet_unet")
    names = [block.name for block in structure.blocks]
    taps = [
        (names[edge.source], names[edge.target], edge.stride[0])
        for edge in structure.edges
        if edge.stride != structure.blocks[edge.source].stride
    ]
    assert taps == [
        ("stages.3", "decoder.0", 16),
        ("stages.2", "decoder.1", 8),
        ("stages.1", "decoder.2", 4),
    ]


def test_hypercolumn_joins_all_decoder_levels():
    decoder = [f"decoder.{i}" for i in range(4)]
    assert {source for source, target in links(trace("hypercolumn_unet")) if target == "head"} == {
        *decoder
    }


def test_logits_are_summed_from_level_to_level():
    structure = trace("unet_summed_logits", channels=(4, 6, 8, 10), residual=False)
    assert [structure.blocks[index].kind for index in structure.outputs] == ["join"]
    coarse = frozenset({"heads.0", "heads.1"})
    assert {pair for pair in links(structure) if not isinstance(pair[1], str)} == {
        ("heads.0", coarse),
        ("heads.1", coarse),
        (coarse, frozenset({coarse, "heads.2"})),
        ("heads.2", frozenset({coarse, "heads.2"})),
    }


def test_a_strided_convolution_is_drawn_where_its_features_go_two_ways():
    names = {block.name for block in trace("unet_summed_logits", channels=(4, 6)).blocks}
    assert {"transitions.0", "transitions.1"} <= names
    plain = {block.name for block in trace("unet_summed_logits", residual=False).blocks}
    assert {name for name in plain if name.startswith("transitions")} == {"transitions.0"}


def test_a_sum_that_several_blocks_take_stays_by_itself():
    structure = trace("unet_summed_logits", channels=(4, 6))
    joined = frozenset({"transitions.0", "encoder.0"})
    assert {(joined, "transitions.1"), (joined, "decoder.0")} <= links(structure)


def test_convolutions_without_padding_are_measured_and_cropping_is_no_stride():
    """Sizes of figure 1 of the U-Net paper."""
    structure = trace("unet_original", (572, 572), align="crop", padding="valid")
    sizes = [block.size[0] for block in structure.blocks]
    assert sizes == [572, 568, 280, 136, 64, 28, 52, 100, 196, 388, 388]
    assert [block.stride[0] for block in structure.blocks] == [1, 1, 2, 4, 8, 16, 8, 4, 2, 1, 1]


@pytest.mark.parametrize("more", [0, 1, 7])
@pytest.mark.parametrize(
    ("name", "options"), [("unet_original", {"align": "crop"}), ("unet3d_original", {})]
)
def test_strides_without_padding_are_those_of_the_levels(name, options, more):
    channels, strides = (4, 6, 8, 10), (1, 2, (3, 1), 2)
    levels = make_levels(2, channels, strides)
    size = [smallest + more for smallest in levels.find_smallest(has_norm=True)]
    options = {**options, "channels": channels, "strides": strides, "padding": "valid"}
    structure = trace(name, size, **options)
    down = [(1, 1), (2, 2), (6, 2), (12, 4)]
    assert [*levels.total_strides] == down
    # Image, encoder, decoder, head.
    found = [block.stride for block in structure.blocks]
    assert found == [(1, 1), *down, *down[-2::-1], (1, 1)]
    assert arrange(structure).rows == tuple(down)


def test_strides_of_a_small_image_are_not_those_of_its_padding():
    """3 voxels are 1 at the coarser level, 2 when upsampled, and padded to 3."""
    structure = trace("unet_original", (3, 3), channels=(4, 6))
    assert [block.size for block in structure.blocks] == [(3, 3), (3, 3), (1, 1), (3, 3), (3, 3)]
    assert [block.stride[0] for block in structure.blocks] == [1, 1, 2, 1, 1]


def test_the_network_is_left_as_it_was():
    network = UNet(2, 1, 2, channels=(4, 8)).eval()
    trace_structure(network, (8, 8))
    assert not network.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert all(parameter.device.type == "cpu" for parameter in network.parameters())


def test_a_size_that_the_network_refuses_is_refused():
    with pytest.raises(ConfigError, match=r"Pad to \[8, 8\]"):
        trace_structure(UNet(2, 1, 2, channels=(4, 8, 16)), (6, 6))


class TwoWays(SegmentationNetwork):
    """Two branches of one convolution each; what the first finds goes two ways."""

    def __init__(self):
        super().__init__(2, 1, 2, total_stride=(2, 2), norm="none")
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU())
        self.left, self.right = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)
        self.up = nn.ConvTranspose2d(2, 2, 2, 2)

    def forward(self, x):
        x = self.first(x)
        return self.up(torch.maximum(self.left(x), self.right(x)))


def test_a_network_of_ones_own():
    structure = trace_structure(TwoWays(), (8, 8))
    found = [(block.name, block.kind, block.join) for block in structure.blocks]
    assert found == [
        ("image", "image", ""),
        ("first", "Conv2d", ""),  # Strided, but nothing is before it.
        ("left", "Conv2d", ""),
        ("right", "Conv2d", ""),
        ("", "join", "maximum"),
        ("up", "ConvTranspose2d", ""),  # No block is behind it.
    ]
    assert structure.outputs == (5,)


class Resampled(SegmentationNetwork):
    """A function between two convolutions."""

    def __init__(self, function):
        super().__init__(2, 1, 2, total_stride=(1, 1), norm="none")
        self.first, self.head = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1)
        self.function = function

    def forward(self, x):
        return self.head(self.function(self.first(x)))


@pytest.mark.parametrize(
    ("function", "stride"),
    [
        (lambda x: functional.max_pool2d(x, 3), (3, 3)),
        (lambda x: functional.avg_pool2d(x, kernel_size=3, stride=(2, 1)), (2, 1)),
        (lambda x: functional.conv2d(x, x.new_ones(4, 4, 5, 5), stride=2), (2, 2)),
        (lambda x: functional.interpolate(x, scale_factor=0.5), (2, 2)),
        (lambda x: functional.interpolate(functional.max_pool2d(x, 4), scale_factor=2), (2, 2)),
        (lambda x: functional.interpolate(x, (5, 4)), (2, 3)),
        # 3 voxels to 11: the size of the features before, though no multiple.
        (lambda x: functional.interpolate(functional.max_pool2d(x, 3), x.shape[2:]), (1, 1)),
        (lambda x: functional.pad(x, (8, 8, 8, 8)), (1, 1)),
        (lambda x: x[:, :, 3:-3, 4:-4], (1, 1)),
    ],
)
def test_functions_count_like_modules(function, stride):
    structure = trace_structure(Resampled(function), (11, 11))
    assert [block.stride for block in structure.blocks] == [(1, 1), (1, 1), stride]


def test_no_two_blocks_stand_in_one_place_and_all_ways_lead_right(structure):
    layout = arrange(structure)
    assert len(set(layout.cells)) == len(layout.cells)
    for edge in structure.edges:
        (_, first), (above, last) = layout.cells[edge.source], layout.cells[edge.target]
        assert first < last or (above == -1 and first == last)
    for block, (row, _) in zip(structure.blocks, layout.cells, strict=True):
        assert block.stride == layout.rows[max(row, 0)]


def test_a_unet_is_drawn_as_a_u():
    structure = trace("unet3d_deep_supervision", channels=(4, 6, 8))
    assert arrange(structure).rows == ((1, 1), (2, 2), (4, 4))
    assert arrange(structure).cells == (
        (0, 0),  # image
        (0, 1), (1, 2), (2, 3),  # down
        (1, 4), (0, 5),  # up
        (0, 6), (0, 7),  # head and branch, behind the last block of their row
    )  # fmt: skip


def test_outputs_in_the_middle_of_the_finest_row_stand_above_it():
    structure = trace("unetplusplus", channels=(4, 6, 8))
    cells = dict(zip([b.name for b in structure.blocks], arrange(structure).cells, strict=True))
    assert cells["nodes.0_1"] == (0, 3)
    assert cells["heads.0_1"] == (-1, 3)
    assert cells["heads.0_2"] == (0, 6)
