"""Structures and landmarks keep their place in the world from the file to the network and back."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import volseg
from volseg.data.cases import Classes
from volseg.data.preprocessing import prepare
from volseg.geometry import Geometry
from volseg.images import Image, read_header
from volseg.inference import Model
from volseg.inference.batch import Outputs, predict_cases
from volseg.inference.inputs import find_inputs
from volseg.inference.model import ModelFacts
from volseg.planning.plan import Plan

ORIENTATIONS = [
    "".join(codes)
    for order in itertools.permutations(("LR", "PA", "IS"))
    for codes in itertools.product(*order)
]
SPACINGS_MM = [(0.8, 0.8, 0.8), (0.7, 1.1, 2.5)]
# Half the length of the axes of two ellipsoids, of which the shortest is 20 mm, and their centres.
STRUCTURES = {
    1: ((17.0, 12.0, 10.0), (-14.0, 4.0, 6.0)),
    2: ((10.0, 10.0, 14.0), (16.0, -6.0, -8.0)),
}
HALF_MM = (36.0, 24.0, 28.0)


class Oracle(nn.Module):
    """Scores of the background, of -1 and of 1: parabolas of the value with their tops there."""

    def forward(self, image: Tensor) -> Tensor:
        value = image[:, :1]
        return torch.cat([torch.zeros_like(value), -2 * value - 1, 2 * value - 1], 1)


def make_predictor(plan: Plan) -> volseg.Predictor:
    classes = Classes(names=("background", "left", "right"), values=(0, 1, 2))
    facts = ModelFacts(plan=plan, classes=classes)
    return volseg.Predictor(Model((Oracle(),), facts, torch.device("cpu"), digest="none"))


def make_plan(channels: int = 1, spacing_mm: float = 1.5, dims: int = 3) -> Plan:
    norm = {"scheme": "ct", "clip_low": -1e4, "clip_high": 1e4, "mean": 0.0, "std": 1.0}
    return Plan.parse(
        {
            "spatial_dims": dims,
            "spacing_mm": (spacing_mm,) * dims,
            "patch": (32,) * dims,
            "batch_size": 1,
            "normalisation": [{"channel": f"c{n}", **norm} for n in range(channels)],
            "network": {
                "name": "unet",
                "channels": (2, 4),
                "strides": [[1] * dims, [2] * dims],
                "kernel_sizes": [[3] * dims] * 2,
                "deep_supervision": False,
            },
        },
        "plan",
    )


def make_grid(codes: str, spacing_mm: tuple[float, ...], is_oblique: bool) -> Geometry:
    """A grid around `HALF_MM` whose axes run to `codes`, the first two turned by 11 degrees."""
    directions = np.zeros((3, 3))
    for axis, code in enumerate(codes):
        world = next(w for w, pair in enumerate(("LR", "PA", "IS")) if code in pair)
        directions[world, axis] = 1 if code in "RAS" else -1
    if is_oblique:
        angle = np.deg2rad(11)
        cos, sin = np.cos(angle), np.sin(angle)
        directions = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ directions
    extent_mm = 2 * np.abs(directions).T @ HALF_MM
    shape = tuple(int(n) for n in np.ceil(extent_mm / spacing_mm))
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing_mm
    affine[:3, 3] = (2.0, -3.0, 5.0) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Geometry(shape, affine)


def list_places(grid: Geometry) -> NDArray[np.float64]:
    """World coordinates (3, *S) of the centres of all voxels."""
    voxels = np.indices(grid.shape).reshape(3, -1)
    places = grid.affine[:3, :3] @ voxels + grid.affine[:3, 3:]
    return places.reshape(3, *grid.shape)


def draw(grid: Geometry) -> NDArray[np.int16]:
    """Labels of `STRUCTURES`."""
    labels, places = np.zeros(grid.shape, np.int16), list_places(grid)
    for value, (radii, centre) in STRUCTURES.items():
        away = np.moveaxis(places, 0, -1) - centre
        labels[((away / radii) ** 2).sum(-1) <= 1] = value
    return labels


@pytest.mark.parametrize("is_oblique", [False, True], ids=["straight", "oblique"])
@pytest.mark.parametrize("spacing_mm", SPACINGS_MM, ids=["isotropic", "anisotropic"])
def test_labels_survive_a_coarser_grid_in_every_orientation(
    spacing_mm: tuple[float, ...], is_oblique: bool, tmp_path: Path
) -> None:
    predictor = make_predictor(make_plan())
    value = np.array([0, -1, 1], np.int16)
    worst = 1.0
    for codes in ORIENTATIONS:
        grid = make_grid(codes, spacing_mm, is_oblique)
        labels = draw(grid)
        source, saved = tmp_path / "image.nii", tmp_path / "labels.nii"
        nib.save(nib.Nifti1Image(value[labels], grid.affine), source)
        predictor(source).save(saved)
        # What was drawn in the world must be found there, by another reader.
        found = nib.load(saved)
        assert found.affine.tobytes() == nib.load(source).affine.tobytes()
        voxels = np.asarray(found.dataobj)
        for label in STRUCTURES:
            ours, theirs = voxels == label, labels == label
            dice = 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())
            worst = min(worst, float(dice))
    assert worst >= 0.98


@pytest.mark.parametrize("is_oblique", [False, True], ids=["straight", "oblique"])
@pytest.mark.parametrize("spacing_mm", SPACINGS_MM, ids=["isotropic", "anisotropic"])
def test_every_voxel_of_the_network_knows_where_it_lies(
    spacing_mm: tuple[float, ...], is_oblique: bool
) -> None:
    """A picture of its own coordinates, which linear interpolation reproduces, says where."""
    for codes in ORIENTATIONS:
        grid = make_grid(codes, spacing_mm, is_oblique)
        image = Image(list_places(grid).astype(np.float32), grid, None)
        prepared = prepare(image, make_plan(channels=3))
        # nibabel says where the canonical volume lies; both grids share their outer edges.
        turn = nib.orientations.io_orientation(grid.affine)
        canonical = grid.affine @ nib.orientations.inv_ornt_aff(turn, grid.shape)
        box, shape = prepared.placement.box, prepared.placement.shape
        scale = np.divide(box.shape, shape)
        voxels = np.moveaxis(np.indices(shape), 0, -1)
        centres = (voxels + 0.5) * scale - 0.5 + box.start
        expected = np.moveaxis(centres @ canonical[:3, :3].T + canonical[:3, 3], -1, 0)
        # Beyond the centres of the outermost voxels there is nothing to interpolate.
        inner = ((centres >= box.start) & (centres <= np.add(box.start, box.shape) - 1)).all(-1)
        away = np.abs(prepared.image.numpy() - expected)[:, inner]
        assert inner.mean() > 0.8
        assert away.max() < 1e-4


@pytest.mark.parametrize(
    "folder",
    [
        "hippocampus/imagesTr",
        "sarcoma_ct/images",
        "tricky/read_ok",
        "tricky/dtypes",
        "tricky/orientations",
    ],
)
def test_predictions_of_real_files_have_their_grid_bit_for_bit(
    folder: str, shared_data: Path, tmp_path: Path
) -> None:
    paths = sorted(path for path in (shared_data / folder).iterdir() if ".nii" in path.suffixes)
    assert paths
    for path in paths:
        grid, channels = read_header(path)
        predictor = make_predictor(make_plan(channels, 4.0, grid.spatial_dims))
        predictor(path).save(tmp_path / "labels.nii.gz")
        source, saved = nib.load(path), nib.load(tmp_path / "labels.nii.gz")
        assert saved.shape == source.shape[: grid.spatial_dims], path
        assert saved.affine.tobytes() == source.affine.tobytes(), path


@pytest.mark.parametrize(
    "name", ["tricky/read_ok/freesurfer_labels.mgz", "tricky/dicom_series/ct_rtstruct/image"]
)
def test_predictions_of_other_formats_have_their_grid(
    name: str, shared_data: Path, tmp_path: Path
) -> None:
    """As far as NIfTI's numbers of 32 bits hold it."""
    source = shared_data / name
    grid, channels = read_header(source)
    make_predictor(make_plan(channels, 4.0))(source).save(tmp_path / "labels.nii.gz")
    saved = nib.load(tmp_path / "labels.nii.gz")
    found = Geometry(saved.shape, saved.affine)
    assert found.shape == grid.shape
    assert found.distance_mm(grid) < 1e-4
    if source.is_file():
        assert found.distance_mm(Geometry(grid.shape, nib.load(source).affine)) < 1e-4


def test_a_series_and_its_structures_are_one_case(shared_data: Path, tmp_path: Path) -> None:
    source, both = shared_data / "tricky" / "dicom_series" / "ct_rtstruct", tmp_path / "both"
    both.mkdir()
    for path in (*(source / "image").iterdir(), source / "mask" / "RS.dcm"):
        shutil.copy(path, both)
    predictor = make_predictor(make_plan(1, 4.0))
    result = predict_cases(
        predictor, find_inputs([source, both], ["MR0"]), Outputs(tmp_path / "out")
    )
    assert list(result.written) == ["image", "both"]
    first, second = (nib.load(path) for path in result.written.values())
    assert np.array_equal(first.affine, second.affine)
    assert np.array_equal(np.asarray(first.dataobj), np.asarray(second.dataobj))
