from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from volseg.errors import ConfigError
from volseg.losses.coarsening import average, pick_foreground, subsample


def lone_voxel():
    target = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    target[0, 0, 3, 3] = 1
    return target


@pytest.mark.parametrize("size", [(12, 12), (6, 4), (4, 12), (3, 2), (1, 1)])
def test_subsample_is_nearest_exact(size):
    target = torch.arange(144).reshape(1, 1, 12, 12)
    expected = functional.interpolate(target.float(), size=size, mode="nearest-exact").long()
    assert torch.equal(subsample(target, size), expected)


@pytest.mark.parametrize(("stride", "kept"), [(2, 1), (4, 0), (8, 0)])
def test_lone_voxel_is_kept_by_nearest_only_in_the_middle_of_its_block(stride, kept):
    size = (16 // stride, 16 // stride)
    assert subsample(lone_voxel(), size).sum() == kept


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_lone_voxel_is_kept_by_max_in_its_block(stride):
    size = (16 // stride, 16 // stride)
    coarse = pick_foreground(lone_voxel(), size, 2)
    assert coarse.dtype == torch.uint8
    assert coarse.nonzero().tolist() == [[0, 0, 3 // stride, 3 // stride]]


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_lone_voxel_is_kept_by_area_as_its_share(stride):
    size = (16 // stride, 16 // stride)
    shares = average(lone_voxel(), size, 2)
    assert shares[0, 1, 3 // stride, 3 // stride] == 1 / stride**2
    assert shares[0, 1].sum() == 1 / stride**2


@pytest.mark.parametrize(
    ("fine", "strides"), [((6, 8), (1, 4)), ((6, 8), (3, 2)), ((2, 4, 6), (1, 2, 3))]
)
def test_anisotropic_blocks_counted_one_by_one(fine, strides):
    target = torch.randint(0, 4, (2, 1, *fine), generator=torch.manual_seed(0))
    target[target == 1] = 0
    size = [n // s for n, s in zip(fine, strides, strict=True)]
    shares = average(target, size, 4)
    picked = pick_foreground(target, size, 4)
    assert shares.shape == (2, 4, *size)
    for index in torch.cartesian_prod(*(torch.arange(m) for m in size)).tolist():
        block = (..., *(slice(i * s, (i + 1) * s) for i, s in zip(index, strides, strict=True)))
        for sample in range(2):
            labels = target[sample, 0][block].flatten().tolist()
            counts = [labels.count(label) for label in range(4)]
            found = shares[(sample, slice(None), *index)].tolist()
            assert found == pytest.approx([count / len(labels) for count in counts])
            most = max(range(1, 4), key=lambda label: counts[label])  # the first of equals
            assert picked[(sample, 0, *index)] == (most if counts[most] else 0)


def test_shares_sum_to_one():
    target = torch.randint(0, 5, (2, 1, 9, 6, 3), generator=torch.manual_seed(0))
    total = average(target, (3, 2, 1), 5).sum(1)
    torch.testing.assert_close(total, torch.ones(2, 3, 2, 1))


def test_shares_are_averaged_again():
    shares = torch.rand(1, 3, 4, 4, dtype=torch.double, generator=torch.manual_seed(0))
    assert torch.equal(average(shares, (2, 2), 3), functional.avg_pool2d(shares, 2))


def test_one_channel_holds_class_one():
    target = torch.tensor([[[0, 1, 0, 0, 1, 1]]])
    assert average(target, (3,), 1).tolist() == [[[0.5, 0, 1]]]
    assert pick_foreground(target, (3,), 1).tolist() == [[[1, 0, 1]]]


@pytest.mark.parametrize(
    "coarsen",
    [subsample, lambda t, size: average(t, size, 2), lambda t, size: pick_foreground(t, size, 2)],
)
def test_size_that_does_not_divide_is_refused(coarsen):
    with pytest.raises(ConfigError, match=r"size \(4, 5\); expected a divisor of \(16, 16\)"):
        coarsen(lone_voxel(), (4, 5))
