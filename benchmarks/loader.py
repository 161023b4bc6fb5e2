"""How many augmented patches per second one core makes, beside MONAI and nnU-Net.

``python benchmarks/loader.py --peer-python NNUNET_ENVIRONMENT/bin/python``

Every side cuts its patches from its own store of the same synthetic volumes and changes them by
nnU-Net's set (``configs/nnunet.yaml``), in batches of two:

- volseg: prepared cases on disk, by the loader of a training;
- MONAI: dictionary transforms on volumes in memory, without metadata tensors; as in its tutorials,
  where each crop looks for the classes anew, and with the places of the classes kept;
- nnU-Net: its own data loader and transforms on its own compressed store (`loader_nnunet.py`, by
  ``--peer-python``, where nnunetv2 is installed; left out without it).

The sides take turns, each with one thread, whose processor time counts: what else the machine
does has little weight. Which share of a step waits for its batch is in every row of a training's
``history.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, cast

import nibabel as nib
import numpy as np
import torch
from machine import describe_machine
from monai.data import set_track_meta
from monai.transforms import (
    Compose,
    EnsureTyped,
    FgBgToIndicesd,
    RandAdjustContrastd,
    RandAffined,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
    RandSimulateLowResolutiond,
)
from scipy import ndimage

from volseg.config import load_config
from volseg.data.augmentation import Augmentation
from volseg.data.cache import CachedCase, build_cache
from volseg.data.layouts import find_dataset
from volseg.data.patches import PatchDataset, make_loader
from volseg.planning import NetworkPlan, Normalisation, Plan

HERE = Path(__file__).resolve().parent
BATCH, CASES = 2, 6
SIZES = {"small": ((32, 48, 32), (48, 72, 56)), "large": ((128, 128, 128), (224, 256, 192))}
"""Patch and volume."""
BATCHES = {"small": 100, "large": 8}
"""Of a side's turn."""
AFFINE = 1 - 0.8 * 0.8
"""A patch is turned, scaled or both; MONAI's transform knows one probability for the two."""

Turn = Callable[[int], float]
"""Make so many batches; seconds."""


def write_volumes(folder: Path, shape: Sequence[int]) -> Path:
    """Noise of every size with bright blobs in it, which are the classes."""
    for number in range(CASES):
        rng = np.random.default_rng(number)
        fields = [ndimage.zoom(rng.normal(size=[n // 8 for n in shape]), 8, order=1) for _ in "ab"]
        label = sum((field > 0.9).astype(np.uint8) for field in fields)
        image = 100 * (sum(fields) + label + 0.3 * rng.normal(size=shape))
        for name, array in (("images", image.astype(np.float32)), ("labels", label)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / name / f"case_{number}.nii")
    return folder


def make_plan(patch: tuple[int, ...]) -> Plan:
    """Of a network that is never built: only the grid and the normalisation count here."""
    return Plan(
        spatial_dims=3,
        spacing_mm=(1.0, 1.0, 1.0),
        patch=patch,
        batch_size=BATCH,
        normalisation=(Normalisation(channel="image", scheme="zscore"),),
        network=NetworkPlan(
            name="unet",
            channels=(4, 8),
            strides=((1, 1, 1), (2, 2, 2)),
            kernel_sizes=((3, 3, 3),) * 2,
            deep_supervision=False,
        ),
    )


def start_volseg(cases: Sequence[CachedCase], dataset: Path, patch: Sequence[int]) -> Turn:
    config = load_config(HERE.parent / "configs" / "nnunet.yaml")
    augment = Augmentation(config.augmentation, (1.0,) * 3, find_dataset(dataset).classes)
    patches = PatchDataset(
        cases,
        patch,
        batch_size=BATCH,
        foreground=config.training.foreground,
        augment=augment,
        seed=0,
    )
    return time_batches(iter(make_loader(patches, 0, 0, torch.device("cpu"))))


def start_monai(cases: Sequence[CachedCase], patch: Sequence[int], *, keeps_indices: bool) -> Turn:
    """MONAI's transforms as its tutorials have them, or with the places of the classes kept."""
    set_track_meta(False)
    volumes = [
        {"image": case.image.astype(np.float32), "label": np.array(case.label)[None]}
        for case in cases
    ]
    if keeps_indices:
        find = FgBgToIndicesd("label")
        volumes = [find(volume) for volume in volumes]
    transforms = Compose(list_monai_transforms(patch, keeps_indices=keeps_indices))
    return time_batches(make_monai_batches(volumes, transforms))


def make_monai_batches(
    volumes: Sequence[dict[str, Any]], transforms: Compose
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rng = np.random.default_rng(0)
    while True:
        chosen = [volumes[rng.integers(len(volumes))] for _ in range(BATCH)]
        samples = [transforms(volume)[0] for volume in chosen]
        images = torch.stack([sample["image"] for sample in samples]).float()
        yield images, torch.stack([sample["label"][0] for sample in samples]).long()


def list_monai_transforms(patch: Sequence[int], *, keeps_indices: bool) -> list[Any]:
    both, image = ("image", "label"), "image"
    angles = [np.pi / 6] * 3
    sigmas = {f"sigma_{axis}": (0.5, 1.0) for axis in "xyz"}
    gamma = {"gamma": (0.7, 1.5), "retain_stats": True}
    return [
        RandCropByPosNegLabeld(
            both,
            "label",
            patch,
            num_samples=1,
            fg_indices_key="label_fg_indices" if keeps_indices else None,
            bg_indices_key="label_bg_indices" if keeps_indices else None,
        ),
        EnsureTyped(both, track_meta=False),
        RandAffined(
            both,
            prob=AFFINE,
            rotate_range=angles,
            scale_range=[(-0.3, 0.4)] * 3,
            mode=("bilinear", "nearest"),
            padding_mode="border",
        ),
        RandGaussianNoised(image, prob=0.1, std=0.1),
        # One channel, which nnU-Net blurs and coarsens every other time.
        RandGaussianSmoothd(image, prob=0.1, **sigmas),
        RandScaleIntensityd(image, prob=0.15, factors=0.25),
        RandScaleIntensityFixedMeand(image, prob=0.15, factors=0.25, preserve_range=True),
        RandSimulateLowResolutiond(image, prob=0.125, zoom_range=(0.5, 1.0)),
        RandAdjustContrastd(image, prob=0.1, invert_image=True, **gamma),
        RandAdjustContrastd(image, prob=0.3, **gamma),
        *[RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)],
    ]


def time_batches(batches: Iterator[Any]) -> Turn:
    def take(count: int) -> float:
        start = time.process_time()
        for _ in range(count):
            next(batches)
        return time.process_time() - start

    return take


class Peer:
    """A data loader in a process of its own, which makes batches when it is told to."""

    def __init__(self, python: Path, folder: Path, patch: Sequence[int]) -> None:
        command = [python, HERE / "loader_nnunet.py", folder, *patch, BATCH]
        words = [str(part) for part in command]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.orders, self.answers = cast(IO[str], process.stdin), cast(IO[str], process.stdout)
        self.versions = self.read()

    def read(self) -> Any:
        # What nnU-Net prints besides is no answer.
        for line in self.answers:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise SystemExit("the peer's process ended; see its message above")

    def __call__(self, count: int) -> float:
        print(count, file=self.orders, flush=True)
        return float(self.read())


def write_arrays(cases: Sequence[CachedCase], folder: Path) -> Path:
    folder.mkdir()
    for case in cases:
        np.save(folder / f"{case.case_id}_image.npy", case.image.astype(np.float32))
        np.save(folder / f"{case.case_id}_label.npy", case.label)
    return folder


def compare(size: str, rounds: int, peer_python: Path | None) -> dict[str, Any]:
    """Patches per second of each side and round."""
    patch, shape = SIZES[size]
    with TemporaryDirectory() as name:
        path = write_volumes(Path(name, "dataset"), shape)
        dataset = find_dataset(path)
        cases = build_cache(dataset, dataset.cases, make_plan(patch), Path(name, "cache"))
        sides: dict[str, Turn] = {
            "volseg": start_volseg(cases, path, patch),
            "MONAI": start_monai(cases, patch, keeps_indices=False),
            "MONAI, places kept": start_monai(cases, patch, keeps_indices=True),
        }
        if peer_python:
            arrays = write_arrays(cases, Path(name, "arrays"))
            sides["nnU-Net"] = peer = Peer(peer_python, arrays, patch)
            print(*(f"{key}: {value}" for key, value in peer.versions.items()), sep="\n")
        for turn in sides.values():
            turn(2)
        speeds: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(rounds):
            # Who goes first changes with every round.
            for side in list(sides)[:: 1 if number % 2 else -1]:
                speeds[side].append(BATCH * BATCHES[size] / sides[side](BATCHES[size]))
    return {"patch": patch, "speeds": speeds}


def format_row(side: str, result: dict[str, Any]) -> str:
    speeds = result["speeds"]
    ratios = [own / other for own, other in zip(speeds["volseg"], speeds[side], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    patch = "x".join(str(edge) for edge in result["patch"])
    speed = statistics.median(speeds[side])
    return f"{patch:12} {side:20} {speed:9.2f} {median:8.2f}  {low:.2f} - {high:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", type=Path, help="of an environment with nnunetv2")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side; 2 or more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about: dict[str, Any] = describe_machine("cpu")
    print(*(f"{key}: {value}" for key, value in about.items()), sep="\n")
    results = [compare(s, arguments.rounds, arguments.peer_python) for s in arguments.sizes]
    print(f"\n{'patch':12} {'side':20} {'patches/s':>9} {'volseg x':>8}  quartiles")
    for result in results:
        print(*(format_row(side, result) for side in result["speeds"]), sep="\n")
    about["results"] = results
    if arguments.json:
        arguments.json.write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
