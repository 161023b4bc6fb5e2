"""From image files to label maps: volseg, a MONAI bundle's workflow and nnU-Net, same weights.

``python benchmarks/predict_files.py OUTPUT --peer-python NNUNET/bin/python --hippocampus DATASET``

The network is nnU-Net's U-Net with random weights, or with those of so many ``--steps`` of
training, which the others load by the order in which they are used. Same windows, half overlapping,
Gaussian weights, no mirroring, same spacing. The bundle has MONAI's own inferer and MONAI's own
edition of that network (``DynUNet``); with volseg's network it is a side of its own.
volseg computes in 16 bits where the CPU has instructions for them and the weights bear it, and in
float32 where a side says so; labels are compared with those of float32.
Sides take turns; the time goes from the first image that is read to the last label map that is
written, in a process that has loaded its libraries and the model. Memory is that of the side's
processes from their start, as ``sides.py`` watches it; of a GPU it is not measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from machine import describe_machine
from sides import Measured, run_measured
from torch import nn

from volseg.atomic import write_json
from volseg.data.cases import Case, Classes, Dataset
from volseg.inference.model import BUNDLE_FILE, build_planned_network
from volseg.networks.weights import save_weights
from volseg.planning.plan import Plan
from volseg.run_folder import DATASET_FILE, PLAN_FILE

SIDES = (
    "volseg",
    "volseg, openvino",
    "volseg, float32",
    "volseg, openvino, float32",
    "MONAI bundle",
    "MONAI bundle, volseg's network",
    "nnU-Net",
    "nnU-Net, one process",
)

BUNDLES = {"MONAI bundle": "bundle", "MONAI bundle, volseg's network": "bundle_of_volseg"}
"""Their folders."""
KINDS_HU = (-500.0, 0.0, 80.0, 200.0)
"""Intensities between the classes of the volume that is made."""


@dataclass(frozen=True)
class Task:
    """Images and the plan that they are predicted by.

    Attributes:
        name: of the folder.
        images: folder of files ``CASE_0000.nii.gz``.
        labels: folder of files ``CASE.nii.gz``.
        plan: volseg's.
        classes: of the network.
    """

    name: str
    images: Path
    labels: Path
    plan: Plan
    classes: Classes


def make_plan(
    spacing: Sequence[float], patch: Sequence[int], channels: Sequence[int], norm: Mapping[str, Any]
) -> Plan:
    levels = len(channels)
    return Plan.parse(
        {
            "spatial_dims": 3,
            "spacing_mm": tuple(spacing),
            "patch": tuple(patch),
            "batch_size": 2,
            "normalisation": [norm],
            "network": {
                "name": "unet",
                "channels": tuple(channels),
                "strides": [[1] * 3, *[[2] * 3] * (levels - 1)],
                "kernel_sizes": [[3] * 3] * levels,
                "deep_supervision": False,
            },
        },
        "plan",
    )


def name_classes(number: int) -> Classes:
    return Classes(
        names=("background", *(f"class {n}" for n in range(1, number))),
        values=tuple(range(number)),
    )


def make_hippocampus(dataset: Path, folder: Path) -> Task:
    """All cases of MSD's Task04, under the names that nnU-Net wants."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for path in sorted((dataset / "imagesTr").glob("[!.]*.nii.gz")):
        shutil.copy(path, images / path.name.replace(".nii.gz", "_0000.nii.gz"))
    norm = {"channel": "MRI", "scheme": "zscore"}
    plan = make_plan((1, 1, 1), (40, 56, 40), (32, 64, 128, 256), norm)
    return Task("hippocampus", images, dataset / "labelsTr", plan, name_classes(3))


def make_ct(folder: Path) -> Task:
    """One volume like a CT: an ellipse of soft tissue with organs in air, and noise.

    Its classes are soft tissue and three kinds of organs, by their intensity.
    """
    images, labels = folder / "images", folder / "labels"
    for made in (images, labels):
        made.mkdir(parents=True, exist_ok=True)
    shape, spacing = (320, 320, 128), (0.8, 0.8, 1.25)
    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    volume = np.full(shape, -1000.0, np.float32)
    volume[x**2 / 0.8 + y**2 / 0.5 + 0 * z < 1] = 40
    for _ in range(12):
        centre, radius = rng.uniform(-0.5, 0.5, 3), rng.uniform(0.08, 0.25)
        inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2 < radius**2
        volume[inside] = rng.uniform(-100, 300)
    kinds = np.digitize(volume, KINDS_HU).astype(np.uint8)
    volume += rng.normal(0, 12, shape).astype(np.float32)
    affine = np.diag([*spacing, 1.0])
    nib.save(nib.Nifti1Image(volume.astype(np.int16), affine), images / "ct_0000.nii.gz")
    nib.save(nib.Nifti1Image(kinds, affine), labels / "ct.nii.gz")
    norm = {
        "channel": "CT",
        "scheme": "ct",
        "clip_low": -1000.0,
        "clip_high": 1000.0,
        "mean": -200.0,
        "std": 400.0,
    }
    plan = make_plan((1.5, 1.5, 1.5), (96, 96, 96), (32, 64, 128, 256, 320), norm)
    return Task("CT", images, labels, plan, name_classes(len(KINDS_HU) + 1))


def write_nnunet_model(task: Task, folder: Path) -> None:
    """What nnU-Net's planner would have written of the same plan, its axes the other way round."""
    plan, network = task.plan, task.plan.network
    (norm,) = plan.normalisation
    is_ct = norm.scheme == "ct"
    levels = len(network.channels)
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(plan.patch[::-1]),
        "median_image_size_in_voxels": list(plan.patch[::-1]),
        "spacing": list(plan.spacing_mm[::-1]),
        "normalization_schemes": ["CTNormalization" if is_ct else "ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": levels,
                "features_per_stage": list(network.channels),
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": [[3, 3, 3]] * levels,
                "strides": [list(stride) for stride in network.strides],
                "n_conv_per_stage": [2] * levels,
                "n_conv_per_stage_decoder": [2] * (levels - 1),
                "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": True,
    }
    properties = {
        "mean": norm.mean,
        "std": norm.std,
        "percentile_00_5": norm.clip_low,
        "percentile_99_5": norm.clip_high,
    }
    plans = {
        "dataset_name": "Dataset001_Benchmark",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": properties},
    }
    description = {
        "channel_names": {"0": norm.channel},
        "labels": dict(zip(task.classes.names, task.classes.values, strict=True)),
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    write_json(folder / "plans.json", plans)
    write_json(folder / "dataset.json", description)


def write_run(task: Task, weights: Path, folder: Path) -> None:
    """A run folder of volseg with nnU-Net's weights."""
    task.plan.write_yaml(folder / PLAN_FILE)
    case = Case(case_id="a", images=(Path("a.nii.gz"),), patient_id="a")
    Dataset(
        name=task.name,
        root=folder,
        layout="benchmark",
        channels=task.plan.channel_names,
        classes=task.classes,
        cases=(case,),
    ).write_json(folder / DATASET_FILE)
    network = build_planned_network(task.plan, task.classes.num_outputs).eval()
    take_weights(network, torch.load(weights, weights_only=True), task.plan.patch)
    plan = task.plan.model_dump(mode="json")
    save_weights(
        folder / "fold_0" / "checkpoint_last.pt", {"network": network.state_dict(), "plan": plan}
    )


@torch.no_grad()
def take_weights(
    network: nn.Module,
    weights: Sequence[torch.Tensor],
    patch: Sequence[int],
    *,
    lacks_biases: bool = False,
) -> None:
    """Take over weights in the order in which layers run; their kernels have the axes reversed.

    Args:
        network: it has the weights afterwards.
        weights: nnU-Net's.
        patch: voxels of a window.
        lacks_biases: of convolutions before a norm, which subtracts them in any case.
    """
    waiting = list(weights)

    def take(module: nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            theirs = waiting.pop(0)
            turned = theirs.permute(0, 1, 4, 3, 2) if theirs.dim() == 5 else theirs
            parameter.copy_(turned)
        if lacks_biases and isinstance(module, nn.Conv3d) and module.bias is None:
            waiting.pop(0)

    leaves = [module for module in network.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(take) for module in leaves]
    network(torch.zeros(1, 1, *patch))
    for hook in hooks:
        hook.remove()
    if waiting:
        raise SystemExit(f"{len(waiting)} of {len(weights)} weights have no place in the network.")


def predict_volseg(model: Path, images: Path, output: Path, side: str, device: str) -> float:
    """In a process of its own."""
    from volseg.inference import Options, Predictor
    from volseg.inference.batch import Outputs, predict_cases
    from volseg.inference.inputs import find_inputs

    options = Options(
        backend="openvino" if "openvino" in side else "torch",
        precision="float32" if "float32" in side else "auto",
    )
    predictor = Predictor.load(model, device=device, options=options)
    start = time.perf_counter()
    predict_cases(predictor, find_inputs([images], ["CT"]), Outputs(output))
    return time.perf_counter() - start


def predict_monai(model: Path, images: Path, output: Path, device: str) -> float:
    """In a process of its own: the bundle's workflow as ``monai.bundle run`` runs it."""
    from monai.bundle import ConfigWorkflow

    workflow = ConfigWorkflow(
        config_file=str(model / "configs" / "inference.json"),
        workflow_type="inference",
        bundle_root=str(model),
        dataset_dir=str(images),
        output_dir=str(output),
        device=f"$torch.device({device!r})",
    )
    workflow.initialize()
    # Resolved at its first use otherwise, network and weights with it.
    workflow.parser.get_parsed_content("evaluator")
    start = time.perf_counter()
    workflow.run()
    return time.perf_counter() - start


def list_command(
    side: str, task: Task, folder: Path, output: Path, result: Path, arguments: argparse.Namespace
) -> list[str]:
    """How a side is run."""
    images = ["--images", str(task.images), "--output", str(output)]
    where = ["--threads", str(torch.get_num_threads()), "--device", arguments.device]
    if side.startswith("nnU-Net"):
        script = Path(__file__).with_name("nnunet_predict.py")
        alone = ["--processes", "0"] if "one process" in side else []
        return [
            *(str(arguments.peer_python), str(script), "predict", str(result)),
            *("--model", str(folder / "nnunet"), *images, *where, *alone),
        ]
    model = folder / (BUNDLES[side] if side.startswith("MONAI") else "run")
    words = [sys.executable, __file__, str(output), "--side", side, "--model", str(model)]
    return [*words, *images, *where, "--result", str(result)]


def compare_labels(folder: Path, side: str) -> float:
    """Share of voxels with the same label as volseg's, in float32 if that was predicted."""
    same = total = 0
    exact = folder / "volseg, float32"
    for path in sorted((exact if exact.exists() else folder / "volseg").glob("*.nii.gz")):
        ours = np.asarray(nib.load(path).dataobj)
        names = path.name, path.name.replace(".nii", "_0000.nii")
        candidates = [folder / side / name for name in names]
        theirs = next(np.asarray(nib.load(c).dataobj) for c in candidates if c.exists())
        same, total = same + int((ours == theirs).sum()), total + ours.size
    return same / total


def list_sides(arguments: argparse.Namespace) -> list[str]:
    """Those that were asked for, in order; OpenVINO is for CPUs."""
    asked = [side for side in SIDES if side in arguments.sides]
    return [side for side in asked if arguments.device == "cpu" or "openvino" not in side]


def measure(task: Task, folder: Path, arguments: argparse.Namespace) -> None:
    """Print a table for a task."""
    sides = list_sides(arguments)
    rounds: list[dict[str, Measured]] = []
    for number in range(arguments.rounds):
        order = sides if number % 2 == 0 else sides[::-1]
        found = {}
        for side in order:
            output = folder / "predicted" / side
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir(parents=True)
            result = folder / "result.json"
            command = list_command(side, task, folder, output, result, arguments)
            found[side] = run_measured(command, result, folder / "log.txt")
            print(f"{task.name}, {side}: {found[side]}", file=sys.stderr, flush=True)
        rounds.append(found)
    print(f"\n{task.name}: {len(list(task.images.iterdir()))} images\n")
    print("| side | seconds | times volseg's | peak MB | times volseg's | same labels |")
    print("|---|---|---|---|---|---|")
    for side in sides:
        seconds = statistics.median(found[side].seconds for found in rounds)
        ratio = statistics.median(f[side].seconds / f["volseg"].seconds for f in rounds)
        peak = statistics.median(found[side].peak_mb for found in rounds)
        more = statistics.median(f[side].peak_mb / f["volseg"].peak_mb for f in rounds)
        same = compare_labels(folder / "predicted", side)
        print(
            f"| {side} | {seconds:.1f} | {ratio:.2f} | {peak:.0f} | {more:.2f} | {same:.4%} |",
            flush=True,
        )


def prepare(task: Task, folder: Path, arguments: argparse.Namespace) -> None:
    """The same model for all sides."""
    # It brings MONAI, which the processes of the other sides have not.
    from volseg.bundle import export_bundle

    write_nnunet_model(task, folder / "nnunet")
    script = Path(__file__).with_name("nnunet_predict.py")
    weights = folder / "weights.pt"
    words = ["make", str(folder / "made.json"), "--model", str(folder / "nnunet")]
    words += ["--images", str(task.images), "--labels", str(task.labels)]
    words += ["--steps", str(arguments.steps), "--threads", str(torch.get_num_threads())]
    subprocess.run(
        [str(arguments.peer_python), str(script), *words, "--weights", str(weights)], check=True
    )
    write_run(task, weights, folder / "run")
    exported, bundle = folder / "bundle_of_volseg", folder / "bundle"
    for path in (exported, bundle):
        shutil.rmtree(path, ignore_errors=True)
    export_bundle(folder / "run", exported)
    inferer = {
        "_target_": "SlidingWindowInferer",
        "roi_size": list(task.plan.patch),
        "overlap": 0.5,
        "mode": "gaussian",
        "device": "@device",
    }
    change_workflow(exported, {"inferer": inferer})
    # What volseg would read is about its own network.
    patterns = ("docs", BUNDLE_FILE.name, "*.sha256")
    shutil.copytree(exported, bundle, ignore=shutil.ignore_patterns(*patterns))
    give_monai_network(task, torch.load(weights, weights_only=True), bundle)


def change_workflow(bundle: Path, entries: Mapping[str, Any]) -> None:
    config = bundle / "configs" / "inference.json"
    write_json(config, {**json.loads(config.read_text()), **entries})


def give_monai_network(task: Task, weights: Sequence[torch.Tensor], bundle: Path) -> None:
    """Put MONAI's edition of nnU-Net's U-Net into a bundle, with the weights."""
    from monai.networks.nets import DynUNet

    planned = task.plan.network
    options = {
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": task.classes.num_outputs,
        "kernel_size": [list(kernel) for kernel in planned.kernel_sizes],
        "strides": [list(stride) for stride in planned.strides],
        "upsample_kernel_size": [list(stride) for stride in planned.strides[1:]],
        "filters": list(planned.channels),
        "trans_bias": True,
    }
    network = DynUNet(**options).eval()
    take_weights(network, weights, task.plan.patch, lacks_biases=True)
    torch.save(network.state_dict(), bundle / "models" / "model.pt")
    change_workflow(bundle, {"network_def": {"_target_": "DynUNet", **options}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--peer-python", type=Path, help="python with nnunetv2")
    parser.add_argument("--hippocampus", type=Path, help="MSD's Task04_Hippocampus")
    parser.add_argument("--steps", type=int, default=0, help="of training; 0 for random weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="of all sides: cpu, cuda or cuda:N")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    # Of a process that this program has started:
    for word in ("--side", "--model", "--images", "--result"):
        parser.add_argument(word, help=argparse.SUPPRESS)
    parser.add_argument("--output", dest="predicted", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.side and "volseg" not in arguments.sides:
        parser.error("--sides lacks volseg, which the others are compared with")
    if arguments.side:
        model, images, output = (
            Path(path) for path in (arguments.model, arguments.images, arguments.predicted)
        )
        torch.set_num_threads(arguments.threads)
        if arguments.side.startswith("MONAI"):
            seconds = predict_monai(model, images, output, arguments.device)
        else:
            seconds = predict_volseg(model, images, output, arguments.side, arguments.device)
        write_json(Path(arguments.result), {"seconds": seconds})
        return
    print(
        *(f"{key}: {value}" for key, value in describe_machine(arguments.device).items()), sep="\n"
    )
    tasks = [make_ct(arguments.output / "CT")]
    if arguments.hippocampus:
        folder = arguments.output / "hippocampus"
        tasks.insert(0, make_hippocampus(arguments.hippocampus, folder))
    for task in tasks:
        folder = arguments.output / task.name
        prepare(task, folder, arguments)
        measure(task, folder, arguments)


if __name__ == "__main__":
    main()
