"""Small real images on disk, written by nibabel alone, and other things that tests share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from volseg.config import AugmentationConfig
from volseg.data.augmentation import Augmentation
from volseg.data.cases import Classes
from volseg.planning import NetworkPlan, Normalisation, Plan

# A turn by 20 degrees about z after one by 15 degrees about x.
_COS_Z, _SIN_Z, _COS_X, _SIN_X = np.cos(0.35), np.sin(0.35), np.cos(0.26), np.sin(0.26)
OBLIQUE = np.array([[_COS_Z, -_SIN_Z, 0], [_SIN_Z, _COS_Z, 0], [0, 0, 1]]) @ np.array(
    [[1, 0, 0], [0, _COS_X, -_SIN_X], [0, _SIN_X, _COS_X]]
)


def make_affine(
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0), oblique: bool = False
) -> NDArray[np.float64]:
    """Affine with columns of length `spacing_mm` and an origin that is not zero."""
    affine = np.eye(4)
    directions = OBLIQUE if oblique else np.eye(3)
    affine[:3, :3] = directions * np.asarray(spacing_mm)
    affine[:3, 3] = (-12.5, 7.0, 30.25)
    return affine


def make_arrays(
    shape: tuple[int, int, int] = (12, 11, 10),
    num_channels: int = 1,
    values: Sequence[int] = (1,),
    seed: int = 0,
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Off-centre balls in noise, one for each label value.

    Returns:
        Image ``(*shape, num_channels)`` and label ``shape``.
    """
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(*shape, num_channels)).astype(np.float32)
    label = np.zeros(shape, np.uint8)
    grid = np.indices(shape)
    for number, value in enumerate(values):
        part = (number + 1) / (len(values) + 1)
        centre = np.array([part, 0.4, 0.45]) * shape
        distance = np.sqrt(((grid - centre[:, None, None, None]) ** 2).sum(axis=0))
        label[distance < min(shape) / 4] = value
    image[label > 0] += 4 + label[label > 0][:, None] % 7
    return image, label


STILL = AugmentationConfig(
    rotate=0, scale=0, noise=0, blur=0, brightness=0, contrast=0, low_resolution=0, gamma=0
)
keep = Augmentation(STILL, (1.0, 1.0, 1.0), Classes(names=("background", "a"), values=(0, 1)))
"""An augmentation that changes nothing, in 3D."""


def write_nifti(
    path: Path, array: NDArray[np.generic], affine: NDArray[np.float64] | None = None
) -> Path:
    """Write `array` in file axis order; the folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, make_affine() if affine is None else affine), path)
    return path


def make_case(
    image_files: Path | Sequence[Path],
    label_file: Path | None = None,
    *,
    shape: tuple[int, int, int] = (12, 11, 10),
    values: Sequence[int] = (1,),
    num_channels: int | None = None,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    oblique: bool = False,
    seed: int = 0,
) -> None:
    """Write one case: a file for each channel, or one file with `num_channels` channels (4D)."""
    files = [image_files] if isinstance(image_files, Path) else list(image_files)
    affine = make_affine(spacing_mm, oblique)
    image, label = make_arrays(shape, num_channels or len(files), values, seed)
    if len(files) == 1:
        write_nifti(files[0], image[..., 0] if image.shape[-1] == 1 else image, affine)
    else:
        for channel, file in enumerate(files):
            write_nifti(file, image[..., channel], affine)
    if label_file is not None:
        write_nifti(label_file, label, affine)


def make_dataset(
    folder: Path,
    layout: Literal["msd", "nnunet", "folders"] = "folders",
    *,
    num_cases: int = 4,
    num_channels: int = 1,
    shape: tuple[int, int, int] = (12, 11, 10),
    values: Sequence[int] = (1, 2),
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    oblique: bool = False,
) -> Path:
    """Write a labelled dataset ``case_00``, ``case_01``, ... and return its folder."""
    suffixes = [f"_{channel:04d}" for channel in range(num_channels)]
    if layout == "msd" or (layout == "folders" and num_channels == 1):
        suffixes = [""]
    images, labels = ("images", "labels") if layout == "folders" else ("imagesTr", "labelsTr")
    ids = [f"case_{number:02d}" for number in range(num_cases)]
    for seed, case_id in enumerate(ids):
        make_case(
            [folder / images / f"{case_id}{suffix}.nii.gz" for suffix in suffixes],
            folder / labels / f"{case_id}.nii.gz",
            shape=shape,
            values=values,
            num_channels=num_channels,
            spacing_mm=spacing_mm,
            oblique=oblique,
            seed=seed,
        )
    description = _describe(layout, ids, num_channels, values)
    if description:
        (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def _describe(
    layout: str, ids: Sequence[str], num_channels: int, values: Sequence[int]
) -> dict[str, object]:
    channels = {str(number): f"MR{number}" for number in range(num_channels)}
    names = {"background": 0, **{f"organ_{value}": value for value in values}}
    if layout == "nnunet":
        return {
            "channel_names": channels,
            "labels": names,
            "numTraining": len(ids),
            "file_ending": ".nii.gz",
        }
    if layout == "msd":
        files = [f"{case_id}.nii.gz" for case_id in ids]
        return {
            "name": "Balls",
            "modality": channels,
            "labels": {str(value): name for name, value in names.items()},
            "training": [
                {"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in files
            ],
            "test": [],
        }
    return {}


def write_tree(root: Path, own: str, files: Mapping[str, str]) -> Path:
    """A file system with the cgroups of a process, and what its folders of cgroups say."""
    for path, text in {"proc/self/cgroup": own, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n")
    return root


def make_plan(spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Plan:
    """Of the channel that `make_dataset` makes: patches of 8 voxels, two to a batch."""
    return Plan(
        spatial_dims=3,
        spacing_mm=spacing_mm,
        patch=(8, 8, 8),
        batch_size=2,
        normalisation=(Normalisation(channel="MR0", scheme="zscore"),),
        network=NetworkPlan(
            name="unet",
            channels=(4, 8),
            strides=((1, 1, 1), (2, 2, 2)),
            kernel_sizes=((3, 3, 3),) * 2,
            deep_supervision=False,
        ),
    )
