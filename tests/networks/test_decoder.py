from __future__ import annotations

from weakref import ref

import pytest
import torch
from torch import nn

from volseg.errors import ConfigError
from volseg.networks.decoder import ConcatLevel, crop_to, pad_to


def row(*values):
    return torch.tensor(values, dtype=torch.float).reshape(1, 1, 1, -1)


def test_padding_repeats_the_last_voxel_behind():
    assert pad_to(row(1, 2), row(0, 0, 0, 0)).flatten().tolist() == [1, 2, 2, 2]
    assert pad_to(torch.zeros(1, 1, 2, 4, 5), torch.zeros(1, 1, 3, 4, 7)).shape == (1, 1, 3, 4, 7)


@pytest.mark.parametrize("margin", range(8))
def test_crop_rounds_half_of_the_margin_to_even(margin):
    start = round(margin / 2)
    x = torch.arange(3.0 + margin).reshape(1, 1, 1, -1)
    assert crop_to(x, row(0, 0, 0)).flatten().tolist() == [start, start + 1, start + 2]


@pytest.mark.parametrize(
    ("align", "skip_first", "expected"),
    [
        ("pad", False, [[1, 1, 2, 2, 2], [5, 6, 7, 8, 9]]),
        ("pad", True, [[5, 6, 7, 8, 9], [1, 1, 2, 2, 2]]),
        ("crop", False, [[1, 1, 2, 2], [5, 6, 7, 8]]),
    ],
)
def test_upsampled_and_skip_are_aligned_and_joined(align, skip_first, expected):
    up = nn.Upsample(scale_factor=(1.0, 2.0))
    level = ConcatLevel(up, nn.Identity(), skip_first=skip_first, align=align)
    features = [row(0), row(5, 6, 7, 8, 9), row(1, 2)]
    assert level(features).squeeze().tolist() == expected
    assert [values.tolist() for values in features] == [row(0).tolist()]


@pytest.mark.parametrize("align", ["pad", "crop", "none"])
def test_what_is_joined_is_free_while_the_convolutions_work(align):
    size = 8 if align == "none" else 9
    level = ConcatLevel(nn.Upsample(scale_factor=2), nn.Identity(), align=align)
    features = [torch.zeros(1, 2, size, size), torch.zeros(1, 2, 4, 4)]
    joined, alive = [ref(values) for values in features], []
    level.upsampling.register_forward_hook(lambda *passed: joined.append(ref(passed[-1])))
    level.convs.register_forward_pre_hook(lambda *_: alive.extend(r() for r in joined))
    with torch.inference_mode():
        level(features)
    assert alive == [None, None, None]


def test_unknown_alignment_is_refused():
    with pytest.raises(ConfigError, match=r"align 'padd'; expected one of pad, crop, none"):
        ConcatLevel(nn.Identity(), nn.Identity(), align="padd")
