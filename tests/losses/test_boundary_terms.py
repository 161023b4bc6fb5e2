"""Terms on boundaries and centrelines against scipy, numpy and MONAI."""

from __future__ import annotations

from functools import partial

import monai.losses
import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.distance import cdist

from volseg.errors import ConfigError
from volseg.losses import (
    BoundaryLoss,
    CentrelineDice,
    HausdorffLoss,
    RegionLoss,
    SurfaceLoss,
    build_boundary_term,
    list_boundary_terms,
)
from volseg.losses.distances import measure_distances

SHAPES = [(2, 3, 9, 8), (2, 3, 6, 7, 5)]
SPACINGS = {2: (1.0, 2.5), 3: (1.0, 1.0, 3.0)}


def draw(shape):
    """Logits, and classes in blobs so that there are boundaries."""
    rng = np.random.default_rng(1)
    logits = rng.normal(scale=3, size=shape)
    noise = rng.normal(size=(shape[0], *shape[2:]))
    blobs = np.stack([ndimage.gaussian_filter(part, 1.0) for part in noise])
    target = np.digitize(blobs, np.quantile(blobs, [0.5, 0.8]))
    return torch.from_numpy(logits), torch.from_numpy(target)[:, None]


def foreground(logits, target, activation):
    t = np.stack([target.numpy()[:, 0] == c for c in range(logits.shape[1])], 1)
    if activation == "sigmoid":
        return 1 / (1 + np.exp(-logits.numpy())), t
    e = np.exp(logits.numpy())
    return (e / e.sum(1, keepdims=True))[:, 1:], t[:, 1:]


def as_target(target, t, activation):
    return target if activation == "softmax" else torch.from_numpy(t.astype(float))


def signed(mask, spacing):
    """By comparing all pairs of voxels."""
    points = np.argwhere(np.ones(mask.shape)) * np.asarray(spacing)
    flat = mask.ravel()
    if flat.all() or not flat.any():
        return np.zeros(mask.shape)
    pairs = cdist(points, points)
    to_inside = pairs[:, flat].min(1)
    to_outside = pairs[:, ~flat].min(1)
    return (to_inside - to_outside).reshape(mask.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_are_those_of_all_pairs(shape):
    spacing = SPACINGS[len(shape) - 2]
    _, target = draw(shape)
    masks = torch.cat([target == 1, target == 7, target < 7], 1)
    distances = measure_distances(masks, spacing).numpy()
    for place in np.ndindex(*masks.shape[:2]):
        expected = signed(masks[place].numpy(), spacing)
        np.testing.assert_allclose(distances[place], expected, rtol=1e-6)
    assert not distances[:, 1:].any()
    with pytest.raises(ConfigError, match="one per spatial axis"):
        measure_distances(masks, (1.0,))


def boundary(p, t, spacing):
    phi = signed(t, spacing)
    return (p * np.where(phi < 0, phi + 1, phi)).mean()


def surface(p, t, spacing):
    d = signed(t, spacing)
    return 1 - ((d * (1 - t - p)) ** 2).sum() / (d**2).sum()


def hausdorff(p, t, spacing, alpha=2.0):
    far = sum(abs(signed(mask, spacing)) ** alpha for mask in (t, p > 0.5))
    return ((p - t) ** 2 * far).mean()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("make", "formula"),
    [
        (BoundaryLoss, boundary),
        (SurfaceLoss, surface),
        (HausdorffLoss, hausdorff),
        (partial(HausdorffLoss, alpha=1.0), partial(hausdorff, alpha=1.0)),
    ],
)
def test_terms_on_distances_by_numpy(make, formula, activation, shape):
    spacing = SPACINGS[len(shape) - 2]
    logits, target = draw(shape)
    p, t = foreground(logits, target, activation)
    expected = [formula(p[i], t[i], spacing) for i in np.ndindex(*t.shape[:2])]
    ours = make(activation, spacing=spacing)(logits, as_target(target, t, activation)).item()
    assert ours == pytest.approx(np.mean(expected), rel=1e-5)


def test_surface_loss_is_0_for_the_reference_and_1_for_its_opposite():
    _, target = draw((1, 2, 9, 8))
    target = target.clamp(max=1)
    logits = 100.0 * torch.cat([1 - target, target], 1)
    assert SurfaceLoss()(logits, target).item() == pytest.approx(0, abs=1e-6)
    assert SurfaceLoss()(-logits, target).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_distance_terms_are_monais_for_cubic_voxels(shape):
    logits, target = (x.float() if x.is_floating_point() else x for x in draw(shape))
    options = {"softmax": True, "to_onehot_y": True, "include_background": False}
    monais = monai.losses.BoundaryLoss(**options)(logits, target)
    assert BoundaryLoss()(logits, target).item() == pytest.approx(monais.item(), rel=1e-4)
    monais = monai.losses.HausdorffDTLoss(**options)(logits, target)
    assert HausdorffLoss()(logits, target).item() == pytest.approx(monais.item(), rel=1e-4)


def skeleton(x, iterations):
    """As the paper's algorithm 1 has it, by scipy."""
    cross = ndimage.generate_binary_structure(x.ndim, 1)
    block = np.ones((3,) * x.ndim)

    def erode(a):
        return ndimage.minimum_filter(a, footprint=cross, mode="constant", cval=np.inf)

    def open_(a):
        return ndimage.maximum_filter(erode(a), footprint=block, mode="constant", cval=-np.inf)

    result = np.maximum(x - open_(x), 0)
    for _ in range(iterations):
        x = erode(x)
        result = result + (1 - result) * np.maximum(x - open_(x), 0)
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_centreline_dice_by_scipy(shape, activation):
    logits, target = draw(shape)
    p, t = foreground(logits, target, activation)
    expected = []
    for place in np.ndindex(*t.shape[:2]):
        mask = t[place].astype(float)
        s_p, s_t = skeleton(p[place], 3), skeleton(mask, 3)
        precision = ((s_p * mask).sum() + 1) / (s_p.sum() + 1)
        sensitivity = ((s_t * p[place]).sum() + 1) / (s_t.sum() + 1)
        expected.append(1 - 2 * precision * sensitivity / (precision + sensitivity))
    loss = CentrelineDice(activation, iterations=3)
    ours = loss(logits, as_target(target, t, activation)).item()
    # MONAI adds 1e-4 to the last denominator.
    assert ours == pytest.approx(np.mean(expected), abs=2e-4)


@pytest.mark.parametrize("name", list_boundary_terms())
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("size", [0.0, 1.0, 200.0])
@pytest.mark.parametrize("label", [0, 1])
def test_gradient_is_finite_where_a_class_is_nowhere_or_everywhere(name, activation, size, label):
    logits = torch.full((1, 2, 6, 6), -size)
    logits[:, 0] = size
    logits.requires_grad_()
    loss = build_boundary_term(name, activation, (1.0, 1.0))
    value = loss(logits, torch.full((1, 6, 6), label))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()
    if name in ("boundary", "surface"):
        assert value == 0


@pytest.mark.parametrize("name", list_boundary_terms())
def test_gradient_descent_on_the_term_alone_finds_the_reference(name):
    target = torch.zeros(1, 1, 12, 12, dtype=torch.long)
    target[..., 3:9, 4:8] = 1
    logits = torch.zeros(1, 2, 12, 12, requires_grad=True)
    loss = build_boundary_term(name, "softmax", (1.0, 1.0))
    optimiser = torch.optim.Adam([logits], 0.1)
    before = loss(logits, target).item()
    for _ in range(60):
        optimiser.zero_grad()
        value = loss(logits, target)
        value.backward()
        optimiser.step()
    assert value.item() < before
    wrong = (logits.argmax(1, keepdim=True) != target).float().mean().item()
    # clDice looks at centrelines alone, and the boundary itself counts nothing in one term.
    assert wrong < (0.35 if name in ("cldice", "boundary") else 0.02)


@pytest.mark.parametrize("name", list_boundary_terms())
def test_regions_get_a_sigmoid(name):
    logits, target = draw((1, 2, 9, 8))
    loss = build_boundary_term(name, "sigmoid", (1.0, 1.0))
    shares = torch.cat([target >= 1, target == 2], 1).double()
    assert RegionLoss(loss, [[1, 2], [2]], 3)(logits, target) == loss(logits, shares)
    with pytest.raises(ConfigError, match="with softmax"):
        RegionLoss(build_boundary_term(name, "softmax", (1.0, 1.0)), [[1]])


def test_spacing_is_relative_to_the_finest_axis():
    logits, target = draw(SHAPES[0])
    loss = build_boundary_term("hausdorff", "softmax", (2.0, 5.0), alpha=1.5)
    assert loss(logits, target) == HausdorffLoss(alpha=1.5, spacing=(1.0, 2.5))(logits, target)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clDice", {}, r"loss\.boundary 'clDice'.*Did you mean 'cldice'"),
        ("cldice", {"iteration": 3}, "'iteration'; .*Did you mean 'iterations'"),
        ("cldice", {"iterations": 0}, "iterations 0; expected a whole number from 1"),
        ("cldice", {"iterations": True}, "iterations True"),
        ("hausdorff", {"alpha": 0}, "alpha 0; expected above 0"),
        ("hausdorff", {"alpha": float("inf")}, "alpha inf; expected above 0"),
        ("surface", {"alpha": 1}, "option of boundary term 'surface' 'alpha'"),
    ],
)
def test_wrong_name_or_option_is_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build_boundary_term(name, "softmax", (1.0, 1.0), **options)
