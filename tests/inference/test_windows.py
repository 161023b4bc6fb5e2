"""Scores of overlapping windows leave part by part and are those of MONAI's inferer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from monai.data.utils import compute_importance_map
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from volseg.data.content import Box
from volseg.inference import windows
from volseg.inference.windows import choose_axis, list_starts, make_weights, stream_scores


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def network(channels: int, outputs: int, dims: int) -> nn.Module:
    """Looks beyond the voxel, so that overlapping windows differ at their borders."""
    torch.manual_seed(0)
    conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
    layers = [conv(channels, 4, 3, padding=1), nn.ReLU(), conv(4, outputs, 5, padding=2)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def collect(score, image: Tensor, window: Sequence[int], axis: int = 0, **options) -> Tensor:
    parts = stream_scores(score, image, window, axis=axis, **options)
    return torch.cat([part.clone() for part in parts], axis + 1)


def watch_scores(given: list[weakref.ref[np.ndarray]]) -> Callable[[Tensor], Tensor]:
    """A network that refuses to work while its former scores are held by anybody."""

    def score(windows: Tensor) -> Tensor:
        assert all(each() is None for each in given)
        # The tensor, and every part of it, keeps the array.
        scores = np.ones((len(windows), 2, *windows.shape[2:]), np.float32)
        given.append(weakref.ref(scores))
        return torch.from_numpy(scores)

    return score


def test_scores_are_not_held_while_the_next_are_computed() -> None:
    given: list[weakref.ref[np.ndarray]] = []
    for _ in stream_scores(watch_scores(given), torch.rand(1, 12, 16), (8, 8), at_once=2):
        pass
    # Two rows of three windows.
    assert len(given) == 4


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((21, 9, 14), (8, 8, 8)),
        ((21, 9, 14), (32, 16, 16)),
        ((40, 7, 20), (16, 9, 5)),
        ((5, 1, 9), (4, 4, 1)),
        ((17, 30), (8, 10)),
        ((1, 30), (8, 32)),
    ],
)
def test_scores_are_those_of_monais_inferer_along_every_axis(shape, window) -> None:
    image, model = draw(2, *shape), network(2, 3, len(shape))
    inferer = SlidingWindowInferer(window, overlap=0.5, mode="gaussian")
    expected = inferer(image[None], model)[0]
    for axis in range(len(shape)):
        torch.testing.assert_close(
            collect(model, image, window, axis), expected, atol=1e-5, rtol=1e-5
        )


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """Shapes of the sums, filled as windows are added."""
    shapes = set()
    plain = windows._Blend.add

    def add(self: windows._Blend, scores: Tensor, place: Sequence[int]) -> None:
        plain(self, scores, place)
        shapes.add(tuple(self.sums.shape))

    monkeypatch.setattr(windows._Blend, "add", add)
    return shapes


@pytest.mark.parametrize("window", [(1,), (2,), (7, 1, 32), (40, 56, 40), (3, 96)])
def test_weights_are_those_of_monai(window: Sequence[int]) -> None:
    expected = compute_importance_map(window, mode="gaussian", sigma_scale=0.125)
    torch.testing.assert_close(make_weights(window, torch.device("cpu")), expected)


def test_no_more_than_a_windows_extent_is_held(held: set[tuple[int, ...]]) -> None:
    parts = list(stream_scores(network(1, 3, 3), draw(1, 8, 8, 100), (8, 8, 8), axis=2))
    assert [part.shape[-1] for part in parts] == [4] * 23 + [8]
    # Three classes, and the sum of the weights.
    assert held == {(4, 8, 8, 8)}


def test_no_sums_are_held_beside_a_region(held: set[tuple[int, ...]]) -> None:
    region = Box((9, 0, 2), (6, 24, 3))
    list(stream_scores(network(1, 3, 3), draw(1, 30, 24, 6), (8, 8, 8), axis=1, region=region))
    assert held == {(4, 6, 8, 3)}


def test_number_of_windows_at_once_changes_nothing() -> None:
    image, model = draw(1, 20, 18, 9), network(1, 2, 3)
    one = collect(model, image, (8, 8, 8))
    five = collect(model, image, (8, 8, 8), at_once=5)
    torch.testing.assert_close(five, one, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25, 0.3, 0.7, 0.8])
def test_steps_are_those_of_monais_overlap(overlap: float) -> None:
    image, model = draw(1, 37, 22, 9), network(1, 2, 3)
    inferer = SlidingWindowInferer((10, 9, 8), overlap=overlap, mode="gaussian")
    found = collect(model, image, (10, 9, 8), step=1 - overlap)
    torch.testing.assert_close(found, inferer(image[None], model)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("size", "window"), [(7, 7), (8, 7), (30, 7), (31, 1), (31, 8), (1, 1)])
def test_windows_cover_every_voxel_and_stay_inside(size: int, window: int) -> None:
    starts = list_starts(size, window)
    covered = {voxel for start in starts for voxel in range(start, start + window)}
    assert covered == set(range(size))
    assert starts == sorted(set(starts))


def test_parts_follow_the_axis_of_the_most_windows() -> None:
    assert choose_axis((100, 300, 90), (96, 96, 32)) == 1
    assert choose_axis((100, 100, 900), (96, 96, 96)) == 2
    # Of equal ones that which is slower in files.
    assert choose_axis((300, 300, 90), (96, 96, 96)) == 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_region_is_a_part_of_the_whole(axis: int) -> None:
    seen = []
    model = network(1, 2, 3)

    def score(windows: Tensor) -> Tensor:
        seen.append(len(windows))
        return model(windows)

    image = draw(1, 30, 24, 6)
    whole = collect(score, image, (8, 8, 8), axis)
    number = len(seen)
    region = Box((9, 0, 2), (6, 24, 3))
    parts = stream_scores(score, image, (8, 8, 8), axis=axis, region=region)
    found = torch.cat([part.clone() for part in parts], axis + 1)
    torch.testing.assert_close(found, whole[:, 9:15, :, 2:5], atol=1e-6, rtol=1e-6)
    # Of the seven rows of windows those from 4, 8 and 12.
    assert len(seen) - number == number * 3 // 7
