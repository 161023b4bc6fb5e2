from __future__ import annotations

import pytest
import torch
from networks.execution_order import run

from volseg.networks import LadderNet
from volseg.networks.laddernet import SharedBlock
from volseg.networks.layers import Style

CHANNELS = (4, 6, 8)
IMAGE = torch.randn(1, 1, 16, 16, generator=torch.manual_seed(0))


def build(**options):
    torch.manual_seed(0)
    return LadderNet(2, 1, 2, channels=CHANNELS, **options).eval()


@pytest.mark.parametrize("num_ladders", [2, 3, 4])
def test_convolutions_of_a_block_share_weights_in_every_ladder(num_ladders):
    first = run(build(num_ladders=num_ladders), IMAGE)
    # Per ladder 5 blocks, and one before all but the first; 2 convolutions down and 2 up.
    blocks = 5 * num_ladders + num_ladders - 1
    others = 4 * num_ladders + 2  # the stem and the head
    assert len(first.owners) == blocks + others
    assert len(first.calls) == 2 * blocks + others


def test_norms_of_a_block_are_not_shared():
    counts = [sum(p.numel() for p in build(norm=n).parameters()) for n in ("none", "instance")]
    # 5 blocks per ladder, of 4, 6, 8, 6, 4 channels, and one of 4; two norms in each. Two
    # convolutions down, to 6 and 8 channels, and the stem have none.
    assert counts[1] - counts[0] == 2 * 2 * (2 * (4 + 6 + 8 + 6 + 4) + 4)


def test_block_by_hand():
    block = SharedBlock(Style(2, "none", "relu"), 1, 1)
    torch.nn.init.constant_(block.conv.weight, 2.0)
    torch.nn.init.constant_(block.conv.bias, -1.0)
    # x = 3: relu(2 * 3 - 1) = 5, 2 * 5 - 1 = 9, relu(9 + 3) = 12. x = -2: relu(-5) = 0, -1 - 2.
    x = torch.tensor([3.0, -2.0]).reshape(1, 1, 1, 2)
    assert block.eval()(x).flatten().tolist() == [12.0, 0.0]
    assert x.flatten().tolist() == [3.0, -2.0]


@pytest.mark.parametrize("bottleneck_skip", [False, True])
def test_every_level_of_a_ladder_reaches_the_next(bottleneck_skip):
    network = build(bottleneck_skip=bottleneck_skip)
    second = network.ladders[1]
    x = torch.randn(1, 4, 16, 16)
    before = [torch.randn(1, width, 16 >> i, 16 >> i) for i, width in enumerate(CHANNELS)]
    reference = second(x, before)[0]
    for level in range(3):
        changed = [f + 1 if i == level else f for i, f in enumerate(before)]
        reaches = not torch.equal(second(x, changed)[0], reference)
        assert reaches == (level < 2 or bottleneck_skip)


def test_bottleneck_skip_changes_the_output_but_no_parameter():
    plain, connected = build(), build(bottleneck_skip=True)
    connected.load_state_dict(plain.state_dict())
    assert not torch.allclose(connected(IMAGE), plain(IMAGE))


def test_dropout_acts_on_whole_channels_in_training_only():
    torch.manual_seed(0)
    block = SharedBlock(Style(2, "none", "relu", dropout=0.5), 32, 1)
    torch.nn.init.zeros_(block.conv.weight)
    torch.nn.init.ones_(block.conv.bias)
    kept = []
    block.dropout.register_forward_hook(lambda _, __, out: kept.append(out))
    x = torch.zeros(1, 32, 4, 4)
    block.train()(x)
    block.eval()(x)
    assert kept[0].flatten(2).unique(dim=2).shape == (1, 32, 1)
    assert set(kept[0].unique().tolist()) == {0.0, 2.0}
    assert kept[1].unique().tolist() == [1.0]


def test_weights_are_torch_defaults_so_that_sums_do_not_grow():
    torch.manual_seed(0)
    conv = LadderNet(2, 1, 2, channels=(32, 64)).ladders[0].encoder[0].conv
    bound = (32 * 9) ** -0.5  # uniform between -bound and bound
    assert bound * 0.99 < conv.weight.abs().max() <= bound
    assert conv.bias.abs().max() > 0
