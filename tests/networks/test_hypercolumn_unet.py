from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from volseg.networks import HypercolumnUNet

CHANNELS = (4, 6, 8, 10)
IMAGE = torch.randn(1, 1, 16, 32, generator=torch.manual_seed(0))


def build():
    torch.manual_seed(0)
    return HypercolumnUNet(2, 1, 2, channels=CHANNELS).eval()


def test_head_sees_all_decoder_levels_at_full_resolution_finest_first():
    network = build()
    decoded, columns = [], []
    for level in network.decoder:
        level.register_forward_hook(lambda _, __, out: decoded.insert(0, out))
    network.head.register_forward_pre_hook(lambda _, args: columns.append(args[0]))
    network(IMAGE)
    expected = [functional.interpolate(x, (16, 32), mode="bilinear") for x in decoded]
    assert [x.shape[1] for x in expected] == [4, 6, 8]
    torch.testing.assert_close(columns[0], torch.cat(expected, 1))


def test_dropout_is_halved_behind_the_first_pooling():
    network = build()
    levels = [
        [m.p for m in level.modules() if isinstance(m, nn.Dropout)] for level in network.encoder
    ]
    assert levels == [[], [0.25], [0.5], [0.5]]
    others = [*network.decoder.modules(), *network.head.modules()]
    assert [m.p for m in others if isinstance(m, nn.Dropout)] == [0.5] * 4
