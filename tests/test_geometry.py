"""The grid of an image: hand values, and agreement with nibabel."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest

from volseg.errors import DataError
from volseg.geometry import Geometry, NiftiSpace

ORIENTATIONS = [
    "".join(codes)
    for order in itertools.permutations(("LR", "PA", "IS"))
    for codes in itertools.product(*order)
]


def _affine(spacing_mm=(1, 1, 1), origin=(0, 0, 0)):
    affine = np.diag([*spacing_mm, 1.0]).astype(float)
    affine[:3, 3] = origin
    return affine


def _rotation(rng):
    return np.linalg.qr(rng.normal(size=(3, 3)))[0]


def _oriented(codes, shape, spacing_mm=(0.7, 0.9, 3.0)):
    """Grid whose array axes run to `codes`, slightly oblique."""
    affine = np.eye(4)
    for axis, code in enumerate(codes):
        world = next(w for w, pair in enumerate(("LR", "PA", "IS")) if code in pair)
        affine[:3, axis] = 0
        affine[world, axis] = spacing_mm[axis] * (1 if code in "RAS" else -1)
    tilt = np.array([[0.98, -0.199, 0], [0.199, 0.98, 0], [0, 0, 1]])
    affine[:3, :3] = tilt @ affine[:3, :3]
    affine[:3, 3] = (10, -20, 30)
    return Geometry(shape, affine)


def test_orientations_are_all_48():
    assert len(set(ORIENTATIONS)) == 48


def test_spacing_is_the_length_of_the_affine_columns():
    affine = np.array([[0, 0, -2, 5], [3, 0, 0, 6], [4, 1.5, 0, 7], [0, 0, 0, 1.0]])
    assert Geometry((2, 3, 4), affine).spacing_mm == (5.0, 1.5, 2.0)


def test_volume_of_a_voxel_is_that_of_its_sheared_edges_and_of_a_pixel_its_area():
    sheared = _affine((2, 3, 5))
    sheared[0, 1] = 1.0  # It lengthens an axis but keeps the volume.
    assert Geometry((2, 3, 4), sheared).voxel_ml == pytest.approx(0.030)
    assert Geometry((2, 3), _affine((2, 3, 7))).voxel_ml == pytest.approx(0.006)


def test_orientation_agrees_with_nibabel_on_random_sheared_affines():
    rng = np.random.default_rng(0)
    for _ in range(500):
        affine = np.eye(4)
        shear = np.eye(3) + np.triu(rng.uniform(-0.6, 0.6, (3, 3)), 1)
        affine[:3, :3] = _rotation(rng) @ shear @ np.diag(rng.uniform(0.3, 5, 3))
        assert Geometry((4, 5, 6), affine).orientation == "".join(nib.aff2axcodes(affine))


def test_picture_has_two_axes():
    picture = Geometry((7, 5), _affine((0.5, 2, 1)))
    assert (picture.spatial_dims, picture.spacing_mm, picture.orientation) == (2, (0.5, 2.0), "RA")


@pytest.mark.parametrize(
    ("shape", "affine", "message"),
    [
        ((4, 5, 0), np.eye(4), r"shape \(4, 5, 0\); expected 2 or 3 axes"),
        ((4,), np.eye(4), "expected 2 or 3 axes"),
        ((4, 5, 6), np.eye(3), "not a finite 4x4"),
        ((4, 5, 6), _affine((1, np.nan, 1)), "not a finite 4x4"),
        ((4, 5, 6), _affine((1, 0, 1)), "singular"),
        ((4, 5, 6), np.ones((4, 4)) * [[1], [1], [1], [0]] + np.diag([0, 0, 0, 1]), "singular"),
        ((4, 5, 6), np.eye(4) + np.diag([0, 0, 0, 1]), "expected 0 0 0 1"),
    ],
)
def test_impossible_grids_are_refused(shape, affine, message):
    with pytest.raises(DataError, match=message):
        Geometry(shape, affine)


def test_tiny_voxels_are_not_singular():
    assert Geometry((2, 2, 2), _affine((1e-4, 1e-4, 1e-4))).spacing_mm == pytest.approx([1e-4] * 3)


def test_affine_cannot_be_changed_afterwards():
    affine = np.eye(4)
    geometry = Geometry((2, 2, 2), affine)
    affine[0, 0] = 5
    assert geometry.affine[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        geometry.affine[0, 0] = 2


def test_distance_is_that_of_the_farthest_corner():
    first = Geometry((11, 2, 2), _affine())
    stretched = Geometry((11, 2, 2), _affine((1.3, 1, 1), origin=(0, 0, 4)))
    # Index (10, ., .) moves by 3 mm in x and every voxel by 4 mm in z.
    assert first.distance_mm(stretched) == pytest.approx(5)


def test_same_grid_allows_rounding_but_no_shift():
    first = Geometry((10, 10, 10), _affine())
    assert first.is_same_grid(Geometry((10, 10, 10), _affine(origin=(0.009, 0, 0))))
    assert not first.is_same_grid(Geometry((10, 10, 10), _affine(origin=(0.011, 0, 0))))
    assert not first.is_same_grid(Geometry((10, 10, 9), _affine()))


def test_same_grid_ignores_the_header_it_was_read_from():
    space = NiftiSpace(1, {"qform_code": 1})
    assert Geometry((2, 2, 2), np.eye(4), space).is_same_grid(Geometry((2, 2, 2), np.eye(4)))


def test_canonical_grid_drops_the_header():
    grid = Geometry((4, 4, 4), np.eye(4), NiftiSpace(1, {}))
    assert grid.to_canonical(np.zeros((4, 4, 4)))[1].nifti is None


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_canonical_form_agrees_with_nibabel_and_comes_back(codes):
    array = np.arange(24).reshape(2, 3, 4)
    grid = _oriented(codes, array.shape)
    expected = nib.as_closest_canonical(nib.Nifti1Image(array.astype(np.int32), grid.affine))
    canonical, found = grid.to_canonical(array)
    assert found.orientation == "RAS"
    assert np.array_equal(canonical, np.asarray(expected.dataobj))
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-12)
    assert np.array_equal(grid.from_canonical(canonical), array)


def test_canonical_form_leaves_leading_axes_alone():
    array = np.arange(48).reshape(2, 2, 3, 4)
    grid = _oriented("SPL", (2, 3, 4))
    canonical, found = grid.to_canonical(array)
    assert canonical.shape == (2, *found.shape)
    assert np.array_equal(canonical[1], grid.to_canonical(array[1])[0])
    assert np.array_equal(grid.from_canonical(canonical), array)


def test_a_point_keeps_its_place_in_the_patient():
    array = np.zeros((2, 3, 4))
    array[1, 0, 2] = 1
    grid = _oriented("ILP", array.shape)
    canonical, found = grid.to_canonical(array)
    before = grid.affine @ [1, 0, 2, 1]
    after = found.affine @ [*np.argwhere(canonical)[0], 1]
    np.testing.assert_allclose(after, before, atol=1e-12)


def test_pictures_are_not_turned():
    array = np.arange(6).reshape(2, 3)
    grid = Geometry((2, 3), _affine((-1, -1, 1)))
    canonical, found = grid.to_canonical(array)
    assert found is grid
    assert canonical is array
    assert grid.from_canonical(array) is array
