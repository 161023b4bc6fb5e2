"""Simulates a small brain MR dataset from a public template, without any download.

Takes the ICBM 152 template and tissue maps that the nilearn package carries, gives a folder in the
Medical Segmentation Decathlon layout. Each subject is the template seen through its own smooth
deformation, contrast, bias field, noise, voxel size and axis order. Reading the folder, training
and scoring are left to the same code as for any other dataset.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from volseg.atomic import write_json, write_text
from volseg.cores import count_cores
from volseg.errors import ConfigError
from volseg.geometry import Geometry
from volseg.images import read_image, write_image, write_labels

logger = logging.getLogger(__name__)

CLASS_NAMES = ("background", "CSF", "grey matter", "white matter")

_TEMPLATE_FILE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_FIELD_OF_VIEW_MM = (174.0, 210.0, 182.0)
"""Right, anterior, superior: the template's brain with a margin for its deformation."""
_CENTRE_MM = (0.0, -18.0, 5.0)
"""Middle of the template's brain."""
_ORIENTATIONS = ("RAS", "LAS", "LPS", "RPI", "PIR", "ASL", "LIA", "RSP")
_SULCUS_VOXELS = 6
"""Gaps of the brain up to twice this wide, at 1 mm, are filled with CSF."""
_SHELL_VOXELS = 2
"""Thickness of the CSF around the brain, at 1 mm."""
_SHARPNESS = 3.0
"""The maps are means over 152 people. A power of them has the sharper borders of one person."""

_README = """\
# Simulated brain MR images

These images are **simulated**: no person was scanned. `volseg.demo` made them from the ICBM 152
non-linear symmetric template (2009) and its grey and white matter maps, by random deformation,
contrast, bias field, noise, voxel size and axis order. They are brain-extracted, as the template
is. They serve to try the software; a result on them says nothing about real patients.

Labels: 0 background, 1 CSF, 2 grey matter, 3 white matter. `labelsTs` holds the labels of the
held-out images in `imagesTs`, for scoring; `dataset.json` does not list them.

Template: Fonov et al. (2011), Unbiased average age-appropriate atlases for pediatric studies,
NeuroImage 54(1), doi:10.1016/j.neuroimage.2010.07.033; as carried by the nilearn package.

Its notice, which must stay with copies: Copyright (C) 1993-2009 Louis Collins, McConnell Brain
Imaging Centre, Montreal Neurological Institute, McGill University. Permission to use, copy, modify,
and distribute this software and its documentation for any purpose and without fee is hereby
granted, provided that the above copyright notice appear in all copies. The authors and McGill
University make no representations about the suitability of this software for any purpose. It is
provided "as is" without express or implied warranty. The authors are not responsible for any data
loss, equipment damage, property loss, or injury to subjects or patients resulting from the use or
misuse of this software package.
"""


@dataclass(frozen=True, eq=False)
class _Template:
    """Maps `(4, *S)` in [0, 1]: background, CSF, grey and white matter; and what T1 adds to them.

    `texture` `(*S)` is the T1 image minus its tissues' means, as a share of white matter's mean:
    it carries what tissues alone do not, such as the brighter deep grey matter.
    """

    tissues: NDArray[np.float32]
    texture: NDArray[np.float32]
    affine: NDArray[np.float64]


def simulate_dataset(folder: Path, num_train: int = 16, num_test: int = 4, seed: int = 0) -> Path:
    """Write simulated subjects in the Medical Segmentation Decathlon layout.

    The same seed and subject number give the same subject, whatever the other arguments.

    Args:
        folder: absent or empty.
        num_train: subjects in ``imagesTr`` and ``labelsTr``.
        num_test: held-out subjects in ``imagesTs``; their labels go to ``labelsTs``.
        seed: of every random choice.

    Returns:
        `folder`.

    Raises:
        ConfigError: nilearn is not installed, `folder` is not empty, or no training subject.
    """
    if num_train < 1 or num_test < 0:
        raise ConfigError(
            f"{num_train} training and {num_test} test subjects; expected at least "
            "1 and 0. Raise the number."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty; expected a new folder. Choose another name.")
    template = _read_template()
    names = [f"brain_{number:03d}" for number in range(1, num_train + num_test + 1)]
    parts = ["Tr"] * num_train + ["Ts"] * num_test
    write = partial(_write_subject, template, folder, seed)
    with ThreadPoolExecutor(count_cores()) as workers:
        list(workers.map(write, range(len(names)), names, parts))
    write_text(folder / "README.md", _README)
    # Last: a folder with a dataset.json is complete.
    write_json(folder / "dataset.json", _describe(names[:num_train], names[num_train:]))
    logger.info("simulated %d subjects -> %s", len(names), folder)
    return folder


def _describe(train: Sequence[str], test: Sequence[str]) -> dict[str, Any]:
    """The content of ``dataset.json``."""
    return {
        "name": "Simulated brain tissues",
        "description": "Simulated brain MR images with CSF, grey matter and white matter",
        "reference": "Made from the ICBM 152 2009 template; see README.md",
        "licence": "Template: Copyright (C) 1993-2009 Louis Collins, MNI, McGill; see README.md",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {str(value): name for value, name in enumerate(CLASS_NAMES)},
        "numTraining": len(train),
        "numTest": len(test),
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
            for name in train
        ],
        "test": [f"./imagesTs/{name}.nii.gz" for name in test],
    }


def _read_template() -> _Template:
    # Importing nilearn takes seconds and only its data files are needed.
    package = importlib.util.find_spec("nilearn")
    if package is None or package.origin is None:
        raise ConfigError(
            "nilearn is not installed; expected it for its brain template. "
            'Run: pip install "volseg[demo]"'
        )
    data = Path(package.origin).parent / "datasets" / "data"
    paths = {name: data / _TEMPLATE_FILE.format(name) for name in ("t1", "gm", "wm")}
    for path in paths.values():
        if not path.is_file():
            raise ConfigError(
                f"{path} does not exist; expected nilearn's brain template. "
                'Run: pip install --upgrade "volseg[demo]"'
            )
    images = {name: read_image(path) for name, path in paths.items()}
    maps = {name: image.array[0].astype(np.float32) / 255 for name, image in images.items()}
    return _make_template(maps["t1"], maps["gm"], maps["wm"], images["t1"].geometry.affine)


def _make_template(
    t1: NDArray[np.float32],
    grey: NDArray[np.float32],
    white: NDArray[np.float32],
    affine: NDArray[np.float64],
) -> _Template:
    """From `(*S)` maps in [0, 1]: what the brain encloses but no tissue fills is CSF."""
    brain = t1 > 0
    inside = _enclose(brain).astype(np.float32)
    csf = np.clip(inside - grey - white, 0, 1)
    tissues = np.stack([1 - inside, csf, grey * inside, white * inside])
    labels = np.where(brain, np.argmax(tissues, axis=0), 0)
    means = np.array([0, *(t1[labels == value].mean() for value in (1, 2, 3))], dtype=np.float32)
    texture = (t1 - np.tensordot(means, tissues, axes=1)) * brain / means[3]
    return _Template(tissues, texture, affine)


def _enclose(brain: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Brain with sulci and ventricles, which the template's mask leaves out, and a thin shell."""
    is_near = ndimage.distance_transform_edt(~brain) <= _SULCUS_VOXELS
    closed = ndimage.distance_transform_edt(is_near) > _SULCUS_VOXELS
    filled = ndimage.binary_fill_holes(closed)
    return np.asarray(ndimage.distance_transform_edt(~filled) <= _SHELL_VOXELS)


def _write_subject(
    template: _Template, folder: Path, seed: int, subject: int, name: str, part: str
) -> None:
    rng = np.random.default_rng([seed, subject])
    geometry = _draw_geometry(rng)
    points = _draw_deformation(rng, geometry)
    tissues, texture = _sample(template, points)
    labels = np.argmax(tissues, axis=0).astype(np.uint8)
    image = _draw_image(rng, tissues, texture, labels)
    write_image(folder / f"images{part}" / f"{name}.nii.gz", image[None], geometry)
    write_labels(folder / f"labels{part}" / f"{name}.nii.gz", labels, geometry)


def _draw_geometry(rng: np.random.Generator) -> Geometry:
    """A grid about the brain: voxel size, axis order, and half of the time slightly oblique."""
    codes = _ORIENTATIONS[rng.integers(len(_ORIENTATIONS))]
    spacing = np.full(3, rng.uniform(1.9, 2.4))
    if rng.random() < 0.4:
        spacing[2] = 3.0
    worlds = ["LRPAIS".index(code) // 2 for code in codes]
    signs = [1 if code in "RAS" else -1 for code in codes]
    shape = tuple(
        round(_FIELD_OF_VIEW_MM[world] / size) for world, size in zip(worlds, spacing, strict=True)
    )
    axes = np.zeros((3, 3))
    axes[worlds, range(3)] = signs * spacing
    if rng.random() < 0.5:
        axes = _draw_rotation(rng, degrees=5.0) @ axes
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = np.asarray(_CENTRE_MM) - axes @ ((np.asarray(shape) - 1) / 2)
    return Geometry(shape, affine)


def _draw_rotation(rng: np.random.Generator, degrees: float) -> NDArray[np.float64]:
    """(3, 3) rotation by up to `degrees` about each axis."""
    angles = rng.uniform(-degrees, degrees, 3)
    return np.asarray(Rotation.from_euler("xyz", angles, degrees=True).as_matrix())


def _draw_deformation(rng: np.random.Generator, geometry: Geometry) -> NDArray[np.float64]:
    """(3, *S) template positions in RAS+ mm of the subject's voxels.

    Up to 4 degrees of turn and 5 percent of size, and a smooth displacement of up to about 5 mm
    along each axis.
    """
    affine = geometry.affine
    linear = _draw_rotation(rng, degrees=4.0) @ np.diag(1 / rng.uniform(0.95, 1.05, 3))
    voxels = np.indices(geometry.shape, dtype=np.float64)
    points = np.tensordot(affine[:3, :3], voxels, axes=1) + affine[:3, 3].reshape(3, 1, 1, 1)
    centre = np.reshape(_CENTRE_MM, (3, 1, 1, 1))
    points = np.asarray(np.tensordot(linear, points - centre, axes=1) + centre)
    for axis in range(3):
        points[axis] += _draw_smooth_field(rng, geometry.shape, num_knots=6, size=5.0)
    return points


def _draw_smooth_field(
    rng: np.random.Generator, shape: tuple[int, ...], num_knots: int, size: float
) -> NDArray[np.float64]:
    """(*S) cubic spline through random knots, uniform in ``-size..size``."""
    knots = rng.uniform(-size, size, (num_knots,) * 3)
    zoom = [length / num_knots for length in shape]
    return np.asarray(ndimage.zoom(knots, zoom, order=3, mode="nearest"))


def _sample(
    template: _Template, points: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Tissue shares `(4, *S)` that sum to one, and texture `(*S)`, at template positions in mm."""
    inverse = np.linalg.inv(template.affine)
    indices = np.tensordot(inverse[:3, :3], points, axes=1) + inverse[:3, 3].reshape(3, 1, 1, 1)
    interpolate = partial(ndimage.map_coordinates, coordinates=indices, order=1)
    tissues = np.stack([interpolate(share) for share in template.tissues[1:]])
    background = 1 - tissues.sum(axis=0, keepdims=True)
    tissues = np.clip(np.concatenate([background, tissues]), 0, 1) ** _SHARPNESS
    return tissues / tissues.sum(axis=0), interpolate(template.texture)


def _draw_image(
    rng: np.random.Generator,
    tissues: NDArray[np.float32],
    texture: NDArray[np.float32],
    labels: NDArray[np.uint8],
) -> NDArray[np.int16]:
    """(*S) intensities of a brain-extracted T1-weighted image: white matter about 100 to 1000."""
    csf, grey = rng.uniform(0.25, 0.4), rng.uniform(0.65, 0.75)
    image = np.tensordot(np.array([0, csf, grey, 1.0]), tissues, axes=1) + 0.5 * texture
    image *= np.exp(_draw_smooth_field(rng, labels.shape, num_knots=4, size=0.2))
    sigma = rng.uniform(0.02, 0.04)
    # The magnitude of a complex signal with noise in both parts: Rician, as in a scanner.
    noise = rng.normal(0, sigma, (2, *labels.shape))
    image = np.hypot(image + noise[0], noise[1])
    image *= rng.uniform(100, 1000)
    return np.where(labels > 0, np.rint(image), 0).astype(np.int16)
