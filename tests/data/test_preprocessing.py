"""Preparing an image and bringing labels back: values by hand, and round trips."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import volseg
from volseg.config import ConfigError
from volseg.data import resampling
from volseg.data.cases import Classes
from volseg.data.content import Box, find_content
from volseg.data.preprocessing import Placement, normalise, prepare
from volseg.data.resampling import (
    count_slabs,
    reduce_to_indices,
    resample,
    resample_labels,
    resample_slabs,
    resampled_shape,
)
from volseg.errors import DataError
from volseg.geometry import Geometry
from volseg.images import Image
from volseg.inference.native_grid import NativeGrid
from volseg.planning import NetworkPlan, Normalisation, Plan

ZSCORE = Normalisation(channel="MR", scheme="zscore")
CT = Normalisation(channel="CT", scheme="ct", clip_low=-100, clip_high=200, mean=50, std=25)


def make_plan(
    spacing_mm: tuple[float, ...] = (1.0, 1.0, 1.0), *normalisation: Normalisation
) -> Plan:
    dims = len(spacing_mm)
    return Plan(
        spatial_dims=dims,
        spacing_mm=spacing_mm,
        patch=(8,) * dims,
        batch_size=2,
        normalisation=normalisation or (ZSCORE,),
        network=NetworkPlan(
            name="unet",
            channels=(4, 8),
            strides=((1,) * dims, (2,) * dims),
            kernel_sizes=((3,) * dims,) * 2,
            deep_supervision=False,
        ),
    )


def make_labels(shape: tuple[int, ...]) -> NDArray[Any]:
    """Three boxes of different size, none symmetric to another."""
    labels = np.zeros(shape, np.uint8)
    labels[2:9, 3:8, 1:6] = 1
    labels[9:14, 8:15, 6:11] = 2
    labels[3:6, 10:14, 2:12] = 3
    return labels


def test_content_is_the_box_of_nonzero_voxels_of_any_channel() -> None:
    array = np.zeros((2, 6, 7))
    array[0, 1, 2] = -1
    array[1, 4, 3:6] = 5
    box = find_content(array)
    assert (box.start, box.shape) == ((1, 2), (4, 4))
    assert find_content(np.zeros((1, 3, 4))).shape == (3, 4)


def test_content_that_reaches_some_borders_is_cut_at_the_others() -> None:
    array = np.ones((1, 6, 7))
    array[0, 2:4, 2:4] = 0
    assert find_content(array) == Box((0, 0), (6, 7))
    for axis, side in itertools.product((1, 2), (0, -1)):
        cut = array.copy()
        cut[(slice(None),) * axis + (side,)] = 0
        start, shape = [0, 0], [6, 7]
        start[axis - 1] += side == 0
        shape[axis - 1] -= 1
        assert find_content(cut) == Box(tuple(start), tuple(shape))


SIZES = [((9, 7, 5), (4, 11, 5)), ((9, 7, 5), (9, 7, 5)), ((1, 6, 8), (3, 4, 2)), ((9, 8), (4, 13))]


@pytest.mark.parametrize("slab_voxels", [1, 80, 10**6])
@pytest.mark.parametrize(("shape", "target"), SIZES)
def test_slab_by_slab_is_all_at_once(
    shape: tuple[int, ...],
    target: tuple[int, ...],
    slab_voxels: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resampling, "SLAB_VOXELS", slab_voxels)
    whole = np.random.default_rng(0).integers(-1000, 1000, (2, *shape), np.int16)
    expected = resample(torch.from_numpy(whole).float(), target)
    for array in (whole, whole.astype(">i2"), whole.astype(np.float32, order="F")):
        found = resample_slabs(array, target)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("target", [(3, 4, 5), (7, 4, 5), (9, 6, 5)])
def test_axes_that_run_backwards_are_resampled_in_slabs_of_any_size(
    target: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.random.default_rng(0).normal(size=(1, 7, 4, 5)).astype(np.float32)
    for axes in itertools.product((1, -1), repeat=3):
        array = whole[(slice(None), *(slice(None, None, step) for step in axes))]
        expected = resample(torch.from_numpy(array.copy()), target)
        for slab_voxels in (1, 40, 60, 10**6):
            monkeypatch.setattr(resampling, "SLAB_VOXELS", slab_voxels)
            torch.testing.assert_close(resample_slabs(array, target), expected)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((40, 5, 6), (90, 20, 24)),
        ((40, 20, 24), (9, 5, 6)),
        ((3, 40, 40), (8, 90, 50)),
        ((3, 20, 20), (300, 20, 20)),
        ((25, 9, 9), (27, 9, 8)),
        ((4, 5, 6), (5, 6, 7)),
    ],
)
def test_slabs_hold_no_more_than_is_counted(
    source: tuple[int, ...], target: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    held = []

    def watch(*tensors: torch.Tensor) -> None:
        seen.extend(map(weakref.ref, tensors))
        alive = {id(tensor): tensor.numel() for ref in seen if (tensor := ref()) is not None}
        held.append(sum(alive.values()))

    def interpolate_planes(slab: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        flat = planes(slab, shape)
        watch(slab, flat)
        return flat

    def lerp(below: torch.Tensor, above: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        watch(below, above)
        return between(below, above, *rest, **options)

    planes, between = resampling._resample_planes, torch.lerp
    monkeypatch.setattr(resampling, "_resample_planes", interpolate_planes)
    monkeypatch.setattr(torch, "lerp", lerp)
    monkeypatch.setattr(resampling, "SLAB_VOXELS", 500)
    assert resample_slabs(np.zeros((1, *source)), target).shape == (1, *target)
    assert 0 < max(held) <= count_slabs(source, target)


def test_ct_is_clipped_then_scaled() -> None:
    values = normalise(torch.tensor([-1000.0, 50.0, 100.0, 900.0]), CT)
    # Clip to -100..200, minus 50, over 25.
    assert values.tolist() == [-6, 0, 2, 6]


def test_zscore_uses_the_images_own_statistics() -> None:
    values = normalise(torch.tensor([1.0, 3.0, 5.0, 7.0]), ZSCORE)
    # Mean 4, population standard deviation sqrt(5).
    assert values.numpy() == pytest.approx(np.array([-3, -1, 1, 3]) / np.sqrt(5), abs=1e-6)


def test_zscore_inside_nonzero_leaves_zeros() -> None:
    inside = ZSCORE.model_copy(update={"nonzero_only": True})
    values = normalise(torch.tensor([0.0, 2.0, 4.0, 0.0]), inside)
    assert values.tolist() == [0, -1, 1, 0]


def test_normalising_leaves_the_image_as_it_is() -> None:
    """Where nothing is resampled it is the array of whoever called."""
    inside = ZSCORE.model_copy(update={"nonzero_only": True})
    for normalisation in (CT, ZSCORE, inside):
        values = torch.tensor([0.0, 2.0, 400.0, 0.0])
        normalise(values, normalisation)
        assert values.tolist() == [0, 2, 400, 0]
    assert normalise(torch.zeros(4), inside).tolist() == [0, 0, 0, 0]


NORMALISE_ALONE = """
import sys
from pathlib import Path
import torch
from volseg.data.preprocessing import normalise
from volseg.planning import Normalisation

def look(word):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(word))

channel = torch.ones(25_000_000)
channel[::7] = 0
for text in sys.argv[1:]:
    before = look("VmRSS:")
    normalise(channel, Normalisation.model_validate_json(text))
    print((look("VmHWM:") - before) / (4 * len(channel)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no peak")
def test_normalising_takes_the_room_of_its_result() -> None:
    inside = ZSCORE.model_copy(update={"nonzero_only": True})
    texts = [normalisation.model_dump_json() for normalisation in (CT, ZSCORE, inside)]
    done = subprocess.run(
        [sys.executable, "-c", NORMALISE_ALONE, *texts],
        env={**os.environ, "PYTHONPATH": str(Path(volseg.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    # Of bytes per byte of the channel; the last one has a mask of a quarter as well.
    assert [float(line) for line in done.stdout.split()] == pytest.approx([1, 1, 1.25], abs=0.15)


def test_constant_image_becomes_zero() -> None:
    assert normalise(torch.full((2, 2), 3.0), ZSCORE).tolist() == [[0, 0], [0, 0]]


def test_resampling_keeps_the_outer_edges() -> None:
    # 4 voxels of 1 mm become 2 of 2 mm: each covers two old ones.
    assert resampled_shape((4,), (1.0,), (2.0,)) == (2,)
    ramp = torch.arange(16.0).reshape(1, 4, 4)
    assert resample(ramp, (2, 2))[0].tolist() == [[2.5, 4.5], [10.5, 12.5]]


def test_labels_follow_the_largest_share() -> None:
    labels = torch.tensor([[0, 0, 7, 7, 7, 7]], dtype=torch.uint8).repeat(3, 1)
    assert resample_labels(labels, 8, (3, 3))[0].tolist() == [0, 7, 7]


def test_running_maximum_equals_argmax() -> None:
    scores = torch.randn(7, 5, 6, 4, generator=torch.Generator().manual_seed(0))
    running = reduce_to_indices(((i, scores[i]) for i in range(7)), torch.uint8)
    assert torch.equal(running.long(), scores.argmax(0))


def one_hot_scores(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    return torch.stack([(labels == c).float() for c in range(num_classes)])


def restore(
    scores: torch.Tensor, placement: Placement, classes: Classes | None = None
) -> NativeGrid:
    if classes is None:
        number = len(scores)
        classes = Classes(names=tuple(map(str, range(number))), values=tuple(range(number)))
    grid = NativeGrid(placement, classes, probabilities=True)
    grid.open(Box((0,) * len(placement.shape), placement.shape), 0).add(scores)
    return grid


ORIENTATIONS = [
    (order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize("slices", [slice(None), slice(5, 6)])
@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_label_returns_exactly_where_nothing_is_resampled(
    order: tuple[int, ...], signs: tuple[int, ...], slices: slice
) -> None:
    spacing = (0.7, 0.9, 3.0)
    affine = np.zeros((4, 4))
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        affine[world, axis] = sign * spacing[axis]
    affine[:, 3] = (5, -7, 11, 1)
    tilt = np.eye(4)
    tilt[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    labels = make_labels((16, 17, 13))[..., slices].copy()
    image = Image(np.ones((1, *labels.shape), np.float32), Geometry(labels.shape, tilt @ affine))
    canonical = image.geometry.to_canonical(image.array)[1]
    prepared = prepare(image, make_plan(canonical.spacing_mm), labels, 4)
    assert prepared.label is not None
    restored = restore(one_hot_scores(prepared.label, 4), prepared.placement).labels
    assert np.array_equal(restored, labels)


def test_label_returns_nearly_after_resampling() -> None:
    labels = np.zeros((40, 44, 16), np.uint8)
    labels[6:30, 8:36, 3:12] = 1
    geometry = Geometry(labels.shape, np.diag([0.8, 0.8, 2.5, 1]))
    image = Image(np.ones((1, *labels.shape), np.float32), geometry)
    prepared = prepare(image, make_plan((1.5, 1.5, 1.5)), labels, 2)
    assert prepared.label is not None
    restored = restore(one_hot_scores(prepared.label, 2), prepared.placement).labels
    dice = 2 * (restored & labels).sum() / (restored.sum() + labels.sum())
    assert dice > 0.95


def test_content_outside_the_box_is_background() -> None:
    array = np.zeros((1, 12, 12, 12), np.float32)
    array[0, 3:9, 2:10, 4:8] = np.random.default_rng(0).normal(5, 1, (6, 8, 4))
    image = Image(array, Geometry((12, 12, 12), np.eye(4)))
    prepared = prepare(image, make_plan())
    assert prepared.image.shape == (1, 6, 8, 4)
    scores = torch.stack([torch.zeros(6, 8, 4), torch.ones(6, 8, 4)])
    classes = Classes(names=("background", "organ"), values=(0, 1))
    grid = restore(scores, prepared.placement, classes)
    assert np.array_equal(grid.labels == 1, array[0] != 0)
    background, organ = grid.probabilities
    assert np.array_equal(background == 1, array[0] == 0)
    inside = array[0] != 0
    assert organ[inside] == pytest.approx(1 / (1 + np.exp(-1)), abs=1e-6)
    regions = Classes(
        **classes.model_dump(exclude={"regions"}), regions=({"name": "organ", "values": (1,)},)
    )
    (whole,) = restore(scores[1:], prepared.placement, regions).probabilities
    assert np.array_equal(whole == 0, ~inside)
    assert whole[inside] == pytest.approx(1 / (1 + np.exp(-1)), abs=1e-6)


def test_pictures_keep_their_axes() -> None:
    array = np.arange(30, dtype=np.float32).reshape(1, 5, 6) + 1
    prepared = prepare(Image(array, Geometry((5, 6), np.eye(4))), make_plan((1.0, 1.0)))
    expected = (array - array.mean()) / array.std()
    assert prepared.image.numpy() == pytest.approx(expected, abs=1e-5)


def test_wrong_number_of_axes_is_refused() -> None:
    picture = Image(np.ones((1, 5, 6), np.float32), Geometry((5, 6), np.eye(4)))
    with pytest.raises(DataError, match="a 2D image; expected 3D"):
        prepare(picture, make_plan())


def test_ct_normalisation_needs_its_numbers() -> None:
    with pytest.raises(ConfigError, match="'ct' needs clip_low"):
        Normalisation.parse({"channel": "CT", "scheme": "ct"}, "plan")


def test_labels_of_more_indices_than_a_byte_holds() -> None:
    classes = Classes(names=tuple(map(str, range(300))), values=tuple(range(300)))
    labels = np.arange(300).reshape(20, 15, 1).repeat(4, 2)
    indices = torch.from_numpy(classes.encode(labels))
    assert torch.equal(indices, torch.from_numpy(labels).to(indices.dtype))
    finer = resample_labels(indices, 300, (20, 15, 8))
    assert torch.equal(finer[:, :, ::2], indices)
