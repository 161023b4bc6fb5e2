"""Classes on the source's grid: filled part by part, as if all scores had been interpolated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from volseg.data.cases import Classes
from volseg.data.content import Box
from volseg.data.preprocessing import Placement
from volseg.errors import MachineError
from volseg.geometry import Geometry
from volseg.inference import native_grid
from volseg.inference.native_grid import Line, NativeGrid


def name_classes(number: int) -> Classes:
    return Classes(names=tuple(map(str, range(number))), values=tuple(range(0, 2 * number, 2)))


def place(shape: tuple[int, ...], full: tuple[int, ...]) -> Placement:
    return Placement(Geometry(full, np.eye(4)), full, Box((0,) * len(full), full), shape)


def smooth_scores(number: int, shape: tuple[int, ...]) -> Tensor:
    """Large parts of one class each, as a network gives them, with noise at the borders."""
    generator = torch.Generator().manual_seed(0)
    coarse = 5 * torch.randn((1, number, *(max(1, n // 6) for n in shape)), generator=generator)
    mode = {2: "bilinear", 3: "trilinear"}[len(shape)]
    smooth = interpolate(coarse, shape, mode=mode)[0]
    return smooth + 0.3 * torch.randn(smooth.shape, generator=generator)


def fill(scores: Tensor, placement: Placement, classes: Classes, axis: int, parts: list[int]):
    grid = NativeGrid(placement, classes, probabilities=True)
    filling = grid.open(whole(placement), axis)
    for part in scores.split(parts, axis + 1):
        filling.add(part)
    return grid


def whole(placement: Placement) -> Box:
    return Box((0,) * len(placement.shape), placement.shape)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("shape", "full"),
    [
        ((20, 33, 26), (37, 33, 60)),
        ((20, 33, 26), (11, 70, 26)),
        ((9, 1, 40), (30, 1, 3)),
        ((24, 24, 24), (24, 24, 24)),
        ((6, 7, 5), (1, 30, 2)),
    ],
)
def test_labels_are_those_of_all_scores_interpolated(shape, full, axis, monkeypatch) -> None:
    monkeypatch.setitem(native_grid._CHUNK_BYTES, "cpu", 4 * full[0] * full[1] * 2)
    classes, scores = name_classes(6), smooth_scores(6, shape)
    large = interpolate(scores[None].double(), full, mode="trilinear")[0]
    size = shape[axis]
    parts = [size] if size < 4 else [2, size // 2, size - size // 2 - 2]
    grid = fill(scores, place(shape, full), classes, axis, parts)
    labels = grid.labels
    # Where two classes are equal but for rounding, either is right.
    best = large.topk(2, 0).values
    is_clear = (best[0] - best[1] > 1e-5).numpy()
    expected = 2 * large.argmax(0).numpy()
    assert is_clear.mean() > 0.999
    assert np.array_equal(labels[is_clear], expected[is_clear])
    inside = interpolate(scores.softmax(0)[None], full, mode="trilinear")[0].numpy()
    assert grid.probabilities == pytest.approx(inside, abs=1e-5)


def test_pictures_are_restored_alike() -> None:
    classes, scores = name_classes(4), smooth_scores(4, (30, 41))
    large = interpolate(scores[None], (61, 50), mode="bilinear")[0]
    labels = fill(scores, place((30, 41), (61, 50)), classes, 1, [7, 1, 33]).labels
    assert (labels != 2 * large.argmax(0).numpy()).mean() < 1e-3


def test_classes_are_interpolated_only_where_they_may_win(monkeypatch) -> None:
    scores = torch.zeros(5, 8, 40, 40)
    scores[1:] = -1
    scores[1, :, 2:6, 2:6] = 1
    scores[2, :, 20:, :] = 2
    seen = {}
    plain = native_grid._interpolate

    def interpolate_part(values, lines, part):
        seen[len(seen)] = part.sources[1:]
        return plain(values, lines, part)

    monkeypatch.setattr(native_grid, "_interpolate", interpolate_part)
    placement = place((8, 40, 40), (8, 80, 80))
    grid = NativeGrid(placement, name_classes(5))
    monkeypatch.setitem(native_grid._CHUNK_BYTES, "cpu", 2**30)
    grid.open(whole(placement), 0).add(scores)
    labels = grid.labels
    assert [(s.start, s.stop) for s in seen[0]] == [(0, 25), (0, 40)]
    assert [(s.start, s.stop) for s in seen[1]] == [(0, 9), (0, 9)]
    assert [(s.start, s.stop) for s in seen[2]] == [(16, 40), (0, 40)]
    assert len(seen) == 3
    assert set(np.unique(labels)) == {0, 2, 4}


def test_equal_scores_go_to_the_first_class() -> None:
    placement = place((4, 4, 4), (7, 4, 9))
    grid = NativeGrid(placement, name_classes(3))
    grid.open(whole(placement), 0).add(torch.ones(3, 4, 4, 4))
    assert not grid.labels.any()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_regions_that_share_a_voxel_fill_the_same_volume(axis) -> None:
    shape, full = (20, 33, 26), (37, 33, 60)
    classes, scores = name_classes(6), smooth_scores(6, shape)
    placement = place(shape, full)
    expected = fill(scores, placement, classes, axis, [shape[axis]])
    grid = NativeGrid(placement, classes, probabilities=True)
    for start, stop in ((0, 12), (11, 13), (12, 26)):
        region = Box((0, 0, start), (20, 33, stop - start))
        filling = grid.open(region, axis)
        for part in scores[..., start:stop].split(7, axis + 1):
            filling.add(part)
    assert np.array_equal(grid.labels, expected.labels)
    assert grid.probabilities == pytest.approx(expected.probabilities, abs=1e-6)


def test_outside_a_region_is_background() -> None:
    placement = place((10, 10, 10), (20, 20, 20))
    scores = torch.stack([torch.zeros(10, 10, 10), torch.ones(10, 10, 10)])
    grid = NativeGrid(placement, name_classes(2), probabilities=True)
    grid.open(Box((2, 0, 4), (3, 10, 6)), 2).add(scores[:, 2:5, :, 4:])
    # Results lie between the centres of voxels 2 and 4, and behind that of voxel 4.
    expected = np.zeros((20, 20, 20))
    expected[5:9, :, 9:] = 2
    assert np.array_equal(grid.labels, expected)
    assert np.array_equal(grid.probabilities[0] == 1, expected == 0)


def test_scores_that_are_not_finite_are_refused() -> None:
    scores, (line, _) = torch.zeros(2, 4, 4, 4), Line.between(4, 4).within(0, 4)
    for place, value in (((0, 1, 1, 1), torch.nan), ((1, 3, 3, 3), torch.inf)):
        bad = scores.clone()
        bad[place] = value
        with pytest.raises(MachineError, match="scores that are not finite"):
            native_grid._decide(bad, [line, line.cut(slice(0, 4)), line])
