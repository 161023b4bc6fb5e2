"""nnU-Net's side of ``predict_files.py``; runs in nnU-Net's own environment, without volseg.

``make`` writes a model folder of random or of briefly trained weights as a training would leave it,
and the same weights as a list in the order in which they are used. ``predict`` times the prediction
of a folder.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

CONFIGURATION = "3d_fullres"
MAX_CASES = 30
"""That weights are trained on."""


def make(arguments: argparse.Namespace) -> dict[str, Any]:
    """Model folder, and ``weights.pt``."""
    model: Path = arguments.model
    plans = json.loads((model / "plans.json").read_text())
    description = json.loads((model / "dataset.json").read_text())
    architecture = plans["configurations"][CONFIGURATION]["architecture"]
    torch.manual_seed(0)
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        len(description["channel_names"]),
        len(description["labels"]),
        deep_supervision=False,
    ).eval()
    # Norms begin as the identity, which would leave their order untested.
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.1)
    loss = train(network, arguments, description, plans) if arguments.steps else None
    state = {
        "network_weights": network.state_dict(),
        "init_args": {"configuration": CONFIGURATION},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": None,
    }
    (model / "fold_0").mkdir(exist_ok=True)
    torch.save(state, model / "fold_0" / "checkpoint_final.pth")
    patch = plans["configurations"][CONFIGURATION]["patch_size"]
    torch.save(list_weights(network, len(description["channel_names"]), patch), arguments.weights)
    return {"parameters": sum(p.numel() for p in network.parameters()), "loss": loss}


def train(
    network: torch.nn.Module,
    arguments: argparse.Namespace,
    description: dict[str, Any],
    plans: dict[str, Any],
) -> float:
    """Train on random patches of about half a window until the network is sure; the last loss.

    No recipe: labels of a network that is sure survive what those of random weights do not.
    """
    configuration = plans["configurations"][CONFIGURATION]
    divisor = 2 ** (configuration["architecture"]["arch_kwargs"]["n_stages"] - 1)
    patch = [-(-size // 2 // divisor) * divisor for size in configuration["patch_size"]]
    (scheme,) = configuration["normalization_schemes"]
    facts = plans["foreground_intensity_properties_per_channel"]["0"]
    rng = np.random.default_rng(0)
    cases = []
    for path in sorted(arguments.images.glob("*_0000.nii.gz"))[:MAX_CASES]:
        image = read(path)
        if scheme == "CTNormalization":
            image = image.clip(facts["percentile_00_5"], facts["percentile_99_5"])
            image = (image - facts["mean"]) / facts["std"]
        else:
            image = (image - image.mean()) / image.std()
        labels = read(arguments.labels / path.name.replace("_0000", ""))
        short = [(0, max(0, need - has)) for need, has in zip(patch, image.shape, strict=True)]
        cases.append([np.pad(array, short) for array in (image, labels)])

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, arguments.steps)
    network.train()
    for _ in range(arguments.steps):
        batch = [cut(cases[rng.integers(len(cases))], patch, rng) for _ in range(2)]
        images, labels = (torch.from_numpy(np.stack(part)) for part in zip(*batch, strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(images[:, None].float())
        loss = torch.nn.functional.cross_entropy(logits.float(), labels.long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    return loss.item()


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.float32)


def cut(case: list[np.ndarray], patch: list[int], rng: np.random.Generator) -> list[np.ndarray]:
    """The same patch of image and labels, every second one around a voxel that has a label."""
    image, labels = case
    corner = [rng.integers(0, has - need + 1) for has, need in zip(image.shape, patch, strict=True)]
    if rng.random() < 0.5:
        voxels = np.argwhere(labels > 0)
        centre = voxels[rng.integers(len(voxels))] - np.array(patch) // 2
        corner = np.clip(centre, 0, np.array(image.shape) - patch)
    where = tuple(slice(c, c + need) for c, need in zip(corner, patch, strict=True))
    return [image[where], labels[where]]


@torch.no_grad()
def list_weights(network: torch.nn.Module, channels: int, patch: list[int]) -> list[torch.Tensor]:
    """Weights of the layers in the order in which they run."""
    found: list[torch.Tensor] = []

    def note(module: torch.nn.Module, *_: object) -> None:
        found.extend(parameter.detach().clone() for parameter in module.parameters(recurse=False))

    leaves = [module for module in network.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(note) for module in leaves]
    network(torch.zeros(1, channels, *patch))
    for hook in hooks:
        hook.remove()
    return found


def predict(arguments: argparse.Namespace) -> dict[str, Any]:
    """Files in, files out; importing and loading the model are not in the time."""
    predictor = nnUNetPredictor(
        use_mirroring=False, device=torch.device(arguments.device), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(arguments.model), (0,))
    predictor.network.to(predictor.device)
    inputs, outputs = str(arguments.images), str(arguments.output)
    start = time.perf_counter()
    if arguments.processes:
        predictor.predict_from_files(
            inputs,
            outputs,
            num_processes_preprocessing=arguments.processes,
            num_processes_segmentation_export=arguments.processes,
        )
    else:
        predictor.predict_from_files_sequential(inputs, outputs)
    return {"seconds": time.perf_counter() - start}


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    packages = ("nnunetv2", "torch", "SimpleITK")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("describe", "make", "predict"))
    parser.add_argument("result", type=Path, help="JSON file to write")
    parser.add_argument("--model", type=Path, help="folder with plans.json and dataset.json")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--steps", type=int, default=0, help="of training; 0 for random weights")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=3, help="0: all in one process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    commands = {"describe": describe, "make": make, "predict": predict}
    found = commands[arguments.command](arguments)
    arguments.result.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
