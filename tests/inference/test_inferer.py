"""The inferer is MONAI's, but for the memory it takes."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer

from volseg.inference import SlidingWindow


@pytest.mark.parametrize(
    ("shape", "window", "overlap"),
    [
        ((20, 17, 9), (8, 8, 8), 0.5),
        ((5, 30, 12), (8, 10, 8), 0.25),
        ((6, 5, 4), (8, 8, 8), 0.5),
        ((21, 30), (8, 9), 0.5),
        ((21, 30), (8, 9), 0.0),
    ],
)
def test_it_gives_what_monais_gives(
    shape: tuple[int, ...], window: tuple[int, ...], overlap: float
) -> None:
    torch.manual_seed(0)
    convolution = {2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[len(shape)]
    network = convolution(2, 3, 3, padding=1)
    images = torch.randn(2, 2, *shape)
    theirs = SlidingWindowInferer(window, 2, overlap, mode="gaussian")(images, network)
    for number in (None, 3):
        found = SlidingWindow(window, number, overlap)(images, network)
        torch.testing.assert_close(found, theirs.detach(), atol=1e-5, rtol=1e-5)


def test_a_meta_tensor_and_other_arguments() -> None:
    images = MetaTensor(torch.randn(1, 1, 12, 12, 12), meta={"filename_or_obj": "a.nii.gz"})
    found = SlidingWindow((8, 8, 8))(
        images, lambda x, factor, shift: factor * x + shift, 2, shift=1
    )
    assert isinstance(found, MetaTensor)
    assert found.meta["filename_or_obj"] == "a.nii.gz"
    torch.testing.assert_close(found.as_tensor(), 2 * images.as_tensor() + 1)


def test_an_overlap_without_end_is_refused() -> None:
    for overlap in (-0.1, 1.0):
        with pytest.raises(ValueError, match="expected from 0 to below 1"):
            SlidingWindow((8, 8), overlap=overlap)


def test_windows_as_large_as_the_image_and_results_that_can_be_changed() -> None:
    images, calls = torch.randn(1, 1, 12, 10, 8), []

    def network(windows: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(windows.shape[2:]))
        return windows

    for size, expected in (((8, 8, -1), (8, 8, 8)), (6, (6, 6, 6)), ((-1, -1, 4), (12, 10, 4))):
        calls.clear()
        found = SlidingWindow(size)(images, network)
        assert set(calls) == {expected}
        torch.testing.assert_close(found, images)
        found += 1
