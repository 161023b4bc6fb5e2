"""nnU-Net's data loader at the command of `loader.py`, in an environment that has nnunetv2.

Arguments: a folder of prepared arrays, the three edges of the patch, the batch size. Makes
nnU-Net's store from the arrays, answers with versions, then reads numbers of batches and answers
with seconds.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager

ANGLE = np.pi / 6
LABELS = {"background": 0, "a": 1, "b": 2}


def write_store(arrays: Path, patch: tuple[int, ...]) -> Path:
    """Chunks and blocks as its preprocessing chooses them for the patch."""
    store = arrays / "store"
    store.mkdir()
    rng = np.random.default_rng(0)
    for file in sorted(arrays.glob("*_image.npy")):
        case = file.name.removesuffix("_image.npy")
        image = np.load(file)
        label = np.load(arrays / f"{case}_label.npy")[None].astype(np.int16)
        params = [
            comp_blosc2_params(array.shape, patch, array.itemsize) for array in (image, label)
        ]
        (blocks, chunks), (blocks_label, chunks_label) = params
        locations = {
            value: rng.permutation(np.argwhere(label == value))[:10_000]
            for value in LABELS.values()
            if value
        }
        nnUNetDatasetBlosc2.save_case(
            image,
            label,
            {"class_locations": locations},
            str(store / case),
            chunks=chunks,
            blocks=blocks,
            chunks_seg=chunks_label,
            blocks_seg=blocks_label,
        )
    return store


def make_loader(store: Path, patch: tuple[int, ...], batch_size: int) -> Any:
    """Loader and transforms as the trainer makes them, without deep supervision."""
    angles = (-ANGLE, ANGLE)
    transforms = nnUNetTrainer.get_training_transforms(patch, angles, None, (0, 1, 2), False)
    return nnUNetDataLoader(
        nnUNetDatasetBlosc2(str(store)),
        batch_size,
        get_patch_size(patch, angles, angles, angles, (0.85, 1.25)),
        patch,
        LabelManager(LABELS, None),
        oversample_foreground_percent=0.33,
        transforms=transforms,
    )


def answer(value: Any) -> None:
    print("answer", json.dumps(value), flush=True)


def main() -> None:
    arrays, *patch, batch_size = sys.argv[1:]
    torch.set_num_threads(1)
    edges = tuple(int(edge) for edge in patch)
    loader = make_loader(write_store(Path(arrays), edges), edges, int(batch_size))
    packages = ("nnunetv2", "batchgeneratorsv2", "blosc2", "torch")
    answer({f"peer {name}": importlib.metadata.version(name) for name in packages})
    for line in sys.stdin:
        start = time.process_time()
        for _ in range(int(line)):
            next(loader)
        answer(time.process_time() - start)


if __name__ == "__main__":
    main()
