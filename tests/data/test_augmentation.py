"""Each change against an independent computation; what is drawn; batches on any device."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from makers import STILL, keep
from scipy import ndimage
from torch.nn import functional

from volseg.config import AugmentationConfig, load_config
from volseg.data.augmentation import Augmentation, Cut, rotation_range
from volseg.data.cases import Classes
from volseg.data.intensity import (
    add_noise_,
    blur_,
    change_contrast_,
    change_gamma_,
    lower_resolution_,
)
from volseg.data.patches import cut
from volseg.data.spatial import find_region, keep_inside, resample, rotation_matrix
from volseg.errors import ConfigError, DataError

CLASSES = Classes(names=("background", "left a", "right a"), values=(0, 1, 2))
ALWAYS = {
    change: 1.0
    for change in (
        "rotate",
        "scale",
        "noise",
        "blur",
        "brightness",
        "contrast",
        "low_resolution",
        "gamma_inverted",
        "gamma",
    )
}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
SHAPES = [(7, 9), (5, 7, 6)]


def draw_image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_smooth(*shape: int) -> torch.Tensor:
    """Values that nearest neighbours keep apart, but with small steps between neighbours."""
    noise = np.random.default_rng(0).normal(size=shape)
    return torch.from_numpy(ndimage.gaussian_filter(noise, 1.0).astype(np.float32))


def make_augmentation(dims: int = 3, **changes: Any) -> Augmentation:
    config = AugmentationConfig(**{**STILL.model_dump(), **changes})
    return Augmentation(config, (1.0,) * dims, CLASSES)


def make_cut(
    augmentation: Augmentation, image: torch.Tensor, label: torch.Tensor, seed: int
) -> Cut:
    centre = [(size - 1) / 2 for size in label.shape]
    return Cut(
        image,
        label,
        centre,
        label.shape,
        augmentation.draw(np.random.default_rng(seed), len(image)),
    )


def change(
    augmentation: Augmentation, image: torch.Tensor, label: torch.Tensor, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = augmentation([make_cut(augmentation, image, label, seed)])
    return images[0], labels[0]


def middle(shape: tuple[int, ...]) -> list[float]:
    return [(size - 1) / 2 for size in shape]


def test_quarter_turn_in_the_plane_moves_each_pixel() -> None:
    image, label = draw_image(2, 8, 8), torch.arange(64).reshape(8, 8)
    turned, labels = resample(image, label, rotation_matrix([np.pi / 2]), (3.5, 3.5), (8, 8))
    # Place (i, j) shows (7 - j, i).
    torch.testing.assert_close(turned, image.flip(1).transpose(1, 2), atol=1e-5, rtol=0)
    assert torch.equal(labels, label.flip(0).T)


@pytest.mark.parametrize(("axis", "first", "second"), [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_quarter_turn_about_each_axis_moves_each_voxel(axis: int, first: int, second: int) -> None:
    image, label = draw_image(1, 6, 6, 6), torch.arange(216).reshape(6, 6, 6)
    angles = [0.0, 0.0, 0.0]
    angles[axis] = np.pi / 2
    turned, labels = resample(image, label, rotation_matrix(angles), (2.5,) * 3, (6, 6, 6))
    expected = image.flip(first + 1).transpose(first + 1, second + 1)
    torch.testing.assert_close(turned, expected, atol=1e-4, rtol=0)
    assert torch.equal(labels, label.flip(first).transpose(first, second))


def test_rotations_follow_each_other_about_axes_0_1_2() -> None:
    one_by_one = [rotation_matrix([0.3, 0, 0]), rotation_matrix([0, 0.5, 0])]
    one_by_one.append(rotation_matrix([0, 0, -0.2]))
    whole = rotation_matrix([0.3, 0.5, -0.2])
    np.testing.assert_allclose(whole, one_by_one[2] @ one_by_one[1] @ one_by_one[0])
    np.testing.assert_allclose(whole @ whole.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(whole) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(23, 31), (1, 40), (19, 25, 31), (1, 20, 20), (20, 1, 20)])
def test_resampling_agrees_with_scipy(shape: tuple[int, ...]) -> None:
    rng, dims = np.random.default_rng(3), len(shape)
    angles = rng.uniform(-0.6, 0.6, 1 if dims == 2 else 3)
    matrix = rotation_matrix(angles) * rng.uniform(0.7, 1.4, dims)
    patch, centre = (18, 21, 17)[:dims], np.asarray(middle(shape)) + 0.3
    image = torch.stack([draw_smooth(*shape), -2 * draw_smooth(*shape)])
    label = torch.arange(image[0].numel()).reshape(shape)
    changed, labels = resample(image, label, matrix, centre, patch)
    offset = centre - matrix @ middle(patch)
    options: dict[str, Any] = {"offset": offset, "output_shape": patch, "mode": "nearest"}
    for channel, result in zip(image.numpy(), changed.numpy(), strict=True):
        expected = ndimage.affine_transform(channel, matrix, order=1, **options)
        np.testing.assert_allclose(result, expected, atol=2e-4)
    expected = ndimage.affine_transform(label.numpy(), matrix, order=0, **options)
    assert (labels.numpy() == expected).mean() > 0.999


@pytest.mark.parametrize("shape", SHAPES)
def test_twofold_enlargement_agrees_with_scipy_zoom(shape: tuple[int, ...]) -> None:
    image, dims = draw_image(1, *shape), len(shape)
    patch = tuple(2 * size for size in shape)
    larger, _ = resample(image, image[0].long(), np.eye(dims) / 2, middle(shape), patch)
    expected = ndimage.zoom(image[0].numpy(), 2, order=1, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(larger[0].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("edge", [160, 200])
def test_large_regions_are_sampled_as_exactly_as_small_ones(edge: int) -> None:
    """A ramp along each axis shows where voxels were taken from."""
    shape, patch = (edge, edge, edge), (4, edge, 8)
    matrix, centre = rotation_matrix([0.3, 0.2, -0.4]), np.asarray(middle(shape))
    ramps = torch.stack(
        torch.meshgrid(*[torch.arange(float(n)) - (n - 1) / 2 for n in shape], indexing="ij")
    )
    found, _ = resample(ramps, torch.zeros(shape), matrix, centre, patch)
    places = np.indices(patch).reshape(3, -1) - np.array(middle(patch))[:, None]
    limit = (edge - 1) / 2
    expected = np.clip(matrix @ places, -limit, limit).reshape(3, *patch)
    np.testing.assert_allclose(found.numpy(), expected, atol=5e-3)


def test_scale_above_one_shows_more_of_the_volume() -> None:
    augmentation = make_augmentation(scale=1, scale_range=(1.5, 1.5))
    label = torch.zeros(16, 16, 16, dtype=torch.int64)
    label[4:12, 4:12, 4:12] = 1
    assert change(augmentation, label[None].float(), label)[1].sum() < label.sum() / 2


@pytest.mark.parametrize("per_axis", [True, False])
def test_scale_is_one_for_all_axes_or_one_for_each(per_axis: bool) -> None:
    augmentation = make_augmentation(scale=1, scale_per_axis=per_axis)
    factors = np.diag(augmentation.draw(np.random.default_rng(0), 1).matrix)
    assert len(set(factors)) == (3 if per_axis else 1)
    assert ((factors > 0.8) & (factors < 1.2)).all()


@pytest.mark.parametrize("dims", [2, 3])
def test_image_and_label_turn_together(dims: int) -> None:
    label = torch.zeros((24,) * dims, dtype=torch.int64)
    label[(slice(4, 12), slice(6, 20))] = 1
    augmentation = make_augmentation(dims, rotate=1, scale=1, flip=1)
    image, turned = change(augmentation, label[None].float(), label, seed=3)
    assert not torch.equal(turned, label)
    assert turned.dtype == torch.int64
    # Mirroring along the first axis has turned left into right.
    assert ((image[0] > 0.5).long() * 2 == turned).float().mean() > 0.97


def test_label_indices_beyond_the_classes_are_kept() -> None:
    label = torch.randint(0, 200, (12, 12, 12), generator=torch.Generator().manual_seed(0))
    _, turned = change(make_augmentation(rotate=1), label[None].float(), label.to(torch.uint8))
    assert set(turned.unique().tolist()) <= set(label.unique().tolist())
    assert turned.max() > 150


def test_region_holds_what_the_patch_shows_and_ends_with_the_volume() -> None:
    matrix, patch, shape = rotation_matrix([0.4, 0.3, 0.2]) * 1.3, (6, 7, 8), (40, 41, 42)
    whole, label = draw_image(1, *shape), torch.arange(40 * 41 * 42).reshape(shape)
    for start in ((15, 16, 17), (0, 0, 0), (34, 34, 34)):
        centre = np.asarray(start) + middle(patch)
        expected = resample(whole, label, matrix, centre, patch)
        first, size = find_region(matrix, centre, start, patch, shape)
        assert all(a >= 0 and a + n <= s for a, n, s in zip(first, size, shape, strict=True))
        assert np.prod(size) < 20**3
        parts = [torch.from_numpy(cut(part.numpy(), first, size)) for part in (whole, label)]
        found = resample(parts[0], parts[1], matrix, centre - first, patch)
        torch.testing.assert_close(found[0], expected[0], atol=1e-3, rtol=0)
        assert torch.equal(found[1], expected[1])


def test_region_of_a_small_volume_reaches_no_further_than_the_patch() -> None:
    matrix = rotation_matrix([0.4, 0.3, 0.2])
    start, patch = (-2, 1, -1), (8, 4, 5)
    centre = np.add(start, middle(patch))
    assert find_region(matrix, centre, start, patch, (4, 6, 3)) == ((-2, 0, -1), (8, 6, 5))


def test_region_without_a_turn_is_the_patch() -> None:
    start, patch = (3, 5), (8, 1)
    centre = np.add(start, middle(patch))
    assert find_region(np.eye(2), centre, start, patch, (20, 20)) == ((3, 5), (8, 1))
    quarter = rotation_matrix([np.pi / 2])
    centre = np.array([8.5, 8.5])
    assert find_region(quarter, centre, (5, 5), (8, 8), (20, 20)) == ((5, 5), (8, 8))


def test_patch_turns_about_its_voxel_where_that_would_fall_out() -> None:
    matrix, patch = rotation_matrix([0.3, 0.2, 0.4]), (9, 9, 9)
    centre = np.array([4.0, 4.0, 4.0])
    assert keep_inside(matrix, centre, patch, (5, 3, 6)) is centre
    for voxel in ((0, 0, 8), (8, 0, 4), (0, 8, 0)):
        moved = keep_inside(matrix, centre, patch, voxel)
        # Voxel q of the patch shows moved + matrix @ (q - middle): at its old place it is itself.
        np.testing.assert_allclose(moved + matrix @ (np.array(voxel) - 4), voxel, atol=1e-9)


def test_slices_are_not_resampled_across() -> None:
    config = STILL.model_copy(update={"rotate": 1.0, "scale": 1.0})
    for axis in range(3):
        augment = Augmentation(config, (1.0, 1.0, 1.5), CLASSES, slice_axis=axis)
        for seed in range(5):
            matrix = augment.draw(np.random.default_rng(seed), 1).matrix
            assert matrix[axis].tolist() == matrix[:, axis].tolist() == np.eye(3)[axis].tolist()
            assert abs(matrix - np.eye(3)).max() > 1e-3
        assert augment.fine_axes == tuple(i for i in range(3) if i != axis)
    # In a plane that is coarse along one axis, nothing is turned.
    augment = Augmentation(config, (0.7, 2.2, 6.0), CLASSES, slice_axis=2)
    assert augment.angles == [0, 0, 0]
    assert augment.fine_axes == (0,)


def test_patch_that_cannot_be_changed_names_its_case() -> None:
    augmentation = make_augmentation(3, **ALWAYS)
    (cut, *_) = make_cuts(augmentation, (6, 6, 6))
    broken = cut._replace(image=cut.image[:, :0], case_id="case_07")
    with pytest.raises(DataError, match="case case_07: its patch could not be changed"):
        augmentation([broken])


def test_rotation_spares_a_coarse_axis() -> None:
    assert rotation_range(180, (False, False, True)) == [0, 0, pytest.approx(np.pi)]
    assert rotation_range(90, (False,) * 3) == [pytest.approx(np.pi / 2)] * 3
    assert rotation_range(90, (False,) * 2) == [pytest.approx(np.pi / 2)]
    config = STILL.model_copy(update={"rotate": 1.0})
    matrix = Augmentation(config, (1.0, 4.0, 1.0), CLASSES).draw(np.random.default_rng(0), 1).matrix
    assert matrix[1].tolist() == [0, 1, 0]
    assert matrix[:, 1].tolist() == [0, 1, 0]
    assert abs(matrix[0, 2]) > 0


@pytest.mark.parametrize("shape", [(1, 12, 12), (12, 1, 12), (12, 12, 1), (1, 12), (1, 1, 1)])
def test_axis_of_one_voxel_passes_through_every_change(shape: tuple[int, ...]) -> None:
    augmentation = make_augmentation(len(shape), **ALWAYS, flip=0.5)
    label = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(0))
    for seed in range(5):
        image, labels = change(augmentation, draw_image(2, *shape), label, seed)
        assert image.shape == (2, *shape)
        assert labels.shape == shape
        assert torch.isfinite(image).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigma", [0.5, 1.7])
def test_blur_agrees_with_scipy(shape: tuple[int, ...], sigma: float) -> None:
    channel = draw_image(*shape)
    options: dict[str, Any] = {"sigma": sigma, "mode": "constant", "truncate": 3.5}
    expected = ndimage.gaussian_filter(channel.double().numpy(), **options)
    expected /= ndimage.gaussian_filter(np.ones(shape), **options)
    blur_(channel, sigma)
    np.testing.assert_allclose(channel.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zoom", [0.2, 0.5, 0.73, 1.0])
def test_lower_resolution_agrees_with_interpolation(shape: tuple[int, ...], zoom: float) -> None:
    channel = draw_image(*shape)
    coarse = functional.interpolate(
        channel[None, None], [round(size * zoom) for size in shape], mode="nearest-exact"
    )
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    (expected,) = functional.interpolate(coarse, shape, mode=mode)[0]
    lower_resolution_(channel, zoom, range(len(shape)))
    torch.testing.assert_close(channel, expected, atol=1e-5, rtol=1e-5)


def test_resolution_along_a_coarse_axis_is_kept() -> None:
    config = STILL.model_copy(update={"low_resolution": 1.0, "low_resolution_range": (0.5, 0.5)})
    image = draw_image(1, 8, 8, 8)
    augmentation = Augmentation(config, (1.0, 1.0, 3.0), CLASSES)
    found, _ = change(augmentation, image, torch.zeros(8, 8, 8))
    for number in range(8):
        slice_ = image[0, ..., number].clone()
        lower_resolution_(slice_, 0.5, (0, 1))
        torch.testing.assert_close(found[0, ..., number], slice_)


def test_contrast_by_hand() -> None:
    channel = torch.tensor([[0.0, 1.0], [3.0, 4.0]])
    change_contrast_(channel, 0.5)
    assert channel.tolist() == [[1, 1.5], [2.5, 3]]
    channel = torch.tensor([[0.0, 1.0], [3.0, 4.0]])
    change_contrast_(channel, 1.5)
    # -1 and 5 are outside the range that was there.
    assert channel.tolist() == [[0, 0.5], [3.5, 4]]


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("exponent", [0.7, 1.5])
def test_gamma_by_hand_keeps_the_statistics(exponent: float, inverted: bool) -> None:
    channel = draw_image(6, 7, 8) * 3 + 20
    values = channel.double().numpy() * (-1 if inverted else 1)
    low, high = values.min(), values.max()
    expected = ((values - low) / (high - low)) ** exponent
    expected = (expected - expected.mean()) / expected.std() * values.std() + values.mean()
    before = channel.mean().item(), channel.std().item()
    change_gamma_(channel, exponent, inverted=inverted)
    np.testing.assert_allclose(channel, expected * (-1 if inverted else 1), atol=1e-4)
    assert (channel.mean().item(), channel.std().item()) == pytest.approx(before, rel=1e-5)


def test_gamma_leaves_a_constant_channel_alone() -> None:
    channel = torch.full((4, 4), 2.5)
    change_gamma_(channel, 1.3, inverted=False)
    assert (channel == 2.5).all()


def test_noise_has_its_deviation_in_each_channel() -> None:
    image = torch.ones(2, 40, 40, 40)
    add_noise_(image, 0.1, seed=4)
    for channel in image - 1:
        assert channel.std().item() == pytest.approx(0.1, rel=0.02)
        assert abs(channel.mean().item()) < 0.002
    assert not torch.equal(image[0], image[1])


def test_brightness_is_a_factor() -> None:
    image = draw_image(2, 6, 6)
    augmentation = make_augmentation(2, brightness=1, brightness_range=(2.0, 3.0))
    factors = augmentation.draw(np.random.default_rng(0), 2).brightness
    found, _ = change(augmentation, image, torch.zeros(6, 6))
    assert 2 < min(factors) < max(factors) < 3
    torch.testing.assert_close(found, image * torch.tensor(factors)[:, None, None])


def test_no_chance_is_no_change() -> None:
    image, label = draw_image(2, 5, 6, 7), torch.arange(210).reshape(5, 6, 7)
    found, labels = change(keep, image, label)
    assert torch.equal(found, image)
    assert torch.equal(labels, label)


@pytest.mark.parametrize("name", sorted(ALWAYS))
def test_each_change_changes_the_image(name: str) -> None:
    image, label = draw_image(1, 20, 20, 20), torch.arange(8000).reshape(20, 20, 20)
    found, labels = change(make_augmentation(**{name: 1}), image, label)
    assert not torch.allclose(found, image, atol=1e-3)
    assert torch.equal(labels, label) == (name not in ("rotate", "scale"))


@pytest.mark.parametrize("shape", SHAPES)
def test_all_changes_together_stay_finite(shape: tuple[int, ...]) -> None:
    augmentation = make_augmentation(len(shape), **ALWAYS, flip=0.5)
    for seed, scale in enumerate((1e-6, 1.0, 6e4)):
        image, _ = change(augmentation, draw_image(1, *shape) * scale, torch.zeros(shape), seed)
        assert image.dtype == torch.float32
        assert torch.isfinite(image).all()
        assert image.abs().max() < 20 * max(scale, 1)


def test_chances_and_ranges_are_those_of_the_configuration() -> None:
    config = load_config(None, ["augmentation.blur_channels=0.5"]).augmentation
    augmentation = Augmentation(config, (1.0, 1.0, 1.0), CLASSES)
    drawn = [augmentation.draw(np.random.default_rng(seed), 2) for seed in range(4000)]
    for name in ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma"):
        share = sum(bool(getattr(changes, name)) for changes in drawn) / len(drawn)
        assert share == pytest.approx(getattr(config, name), abs=0.02)
    turned = 1 - sum(changes.matrix is None for changes in drawn) / len(drawn)
    assert turned == pytest.approx(1 - 0.7 * 0.7, abs=0.02)
    gamma = [exponent for changes in drawn for exponent in changes.gamma]
    assert 0.7 < min(gamma) < 0.71
    assert 1.49 < max(gamma) < 1.5
    assert sum(exponent < 1 for exponent in gamma) / len(gamma) == pytest.approx(0.5, abs=0.04)
    blurred = [sigma is not None for changes in drawn for sigma in changes.blur]
    assert sum(blurred) / len(blurred) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("key", ["scale_range=[1.2,0.8]", "low_resolution_range=[0.5,1.5]"])
def test_senseless_range_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key.partition("=")[0]):
        load_config(None, [f"augmentation.{key}"])


def test_global_generators_are_neither_asked_nor_moved() -> None:
    augmentation = make_augmentation(**ALWAYS, flip=0.5)
    label = torch.zeros(8, 8, 8, dtype=torch.int64)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        results.append(change(augmentation, draw_image(1, 8, 8, 8), label, seed=5)[0])
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()
        assert random.getstate() == before[2]
    assert torch.equal(*results)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("patch", [(16, 20), (12, 16, 10)])
def test_sample_is_the_same_alone_and_in_any_batch(device: str, patch: tuple[int, ...]) -> None:
    augmentation = make_augmentation(len(patch), **ALWAYS, flip=0.5)
    cuts = make_cuts(augmentation, patch)
    images, labels = augmentation(cuts, torch.device(device))
    assert images.device.type == labels.device.type == device
    for number, single in enumerate(cuts):
        image, label = augmentation([single], torch.device(device))
        assert torch.equal(image[0], images[number])
        assert torch.equal(label[0], labels[number])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("patch", [(16, 20), (12, 16, 10)])
def test_devices_agree(device: str, patch: tuple[int, ...]) -> None:
    augmentation = make_augmentation(len(patch), **ALWAYS, flip=0.5)
    cuts = make_cuts(augmentation, patch)
    here, there = augmentation(cuts), augmentation(cuts, torch.device(device))
    torch.testing.assert_close(there[0].cpu(), here[0], atol=5e-3, rtol=1e-3)
    assert (there[1].cpu() == here[1]).float().mean() > 0.999


def make_cuts(augmentation: Augmentation, patch: tuple[int, ...]) -> list[Cut]:
    shape = tuple(size + 3 for size in patch)
    return [
        Cut(
            draw_image(2, *shape, seed=seed).half(),
            torch.arange(np.prod(shape)).reshape(shape) % 3,
            middle(shape),
            patch,
            augmentation.draw(np.random.default_rng(seed), 2),
        )
        for seed in range(6)
    ]


@pytest.mark.parametrize("patch", [(16, 20), (12, 16, 10)])
def test_no_change_reads_a_value_back_from_the_device(patch: tuple[int, ...]) -> None:
    """On `meta` there are no values: what a GPU would be waited for is an error there."""
    config = AugmentationConfig(**{**STILL.model_dump(), **ALWAYS, "flip": 0.5, "drop_channel": 1})
    augmentation = Augmentation(config, (1.0,) * len(patch), CLASSES, optional_channels=(1,))
    images, labels = augmentation(make_cuts(augmentation, patch), torch.device("meta"))
    assert (images.shape, labels.shape) == ((6, 2, *patch), (6, *patch))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("patch", [(16, 20), (12, 16, 10)])
def test_no_change_waits_for_the_gpu(patch: tuple[int, ...]) -> None:
    augmentation = make_augmentation(len(patch), **ALWAYS, flip=0.5)
    pinned = [
        cut._replace(image=cut.image.pin_memory(), label=cut.label.pin_memory())
        for cut in make_cuts(augmentation, patch)
    ]
    gpu = torch.device("cuda")
    # What is copied to the device once is there then.
    augmentation(pinned, gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        augmentation(pinned, gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_zeros_of_masked_channels_stay_zero(device: str, shape: tuple[int, ...]) -> None:
    intensities = {name: 1.0 for name in ALWAYS if name not in ("rotate", "scale")}
    config = AugmentationConfig(**{**STILL.model_dump(), **intensities, "flip": 1})
    augmentation = Augmentation(config, (1.0,) * len(shape), CLASSES, masked_channels=(1,))
    image = draw_image(2, *shape)
    image[:, :3] = 0
    label = torch.zeros(shape, dtype=torch.int64)
    images, _ = augmentation([make_cut(augmentation, image, label, 0)], torch.device(device))
    # Mirrored along every axis.
    assert (images[0, 1, -3:] == 0).all()
    assert (images[0, 1, :-3] != 0).all()
    assert (images[0, 0, -3:] != 0).any()


def test_every_axis_has_its_own_chance_of_mirroring() -> None:
    augmentation = make_augmentation(3, flip=(0.0, 1.0, 0.0))
    drawn = [augmentation.draw(np.random.default_rng(seed), 1).mirrored for seed in range(5)]
    assert drawn == [(1,)] * 5
    assert AugmentationConfig(flip=0.25).flips(2) == (0.25, 0.25)
    with pytest.raises(ConfigError, match=r"augmentation.flip \[0.0, 1.0\]; expected 3 values"):
        make_augmentation(3, flip=(0.0, 1.0))
