"""What prediction costs besides the network: file to file with one that costs nothing.

``python benchmarks/without_network.py OUTPUT --classes 3 25 117 --peer-python NNUNET/bin/python``

A volume like a CT of 512 x 512 x 200 voxels of 0.8 x 0.8 x 1.5 mm goes to 1.5 mm and back. The
network is a table of slopes: the scores of a voxel follow from its value alone. volseg and a MONAI
bundle's workflow read the file, prepare it, slide windows of 96 voxels, bring the scores back and
write the label map; nnU-Net prepares the same volume and exports scores of the same size, and so
does volseg in a row of its own, which does not count how the scores come about either. Every side
runs in a process of its own, in turns, and may take as much memory as is free at the start, or
``--memory`` GB. One that takes more is stopped, and one whose scores alone take more is not begun;
the table says so, and the others go on.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from machine import describe_machine
from predict_files import Task, make_plan, name_classes, write_nnunet_model
from sides import Measured, OutOfMemory, run_measured
from torch import Tensor, nn

from volseg.atomic import write_json
from volseg.images import read_header
from volseg.inference.memory import free_bytes
from volseg.inference.windows import choose_axis

SHAPE, SPACING_MM = (512, 512, 200), (0.8, 0.8, 1.5)
SIDES = ("volseg", "volseg's export", "MONAI", "nnU-Net's export")
SCORE_BYTES = {"MONAI": 4, "nnU-Net's export": 2}
"""Of sides that hold the scores of all classes on the grid of the file, per score, at least."""
SPARE = 0.9
"""Share of the free memory that a side may take."""
CT = {
    "channel": "CT",
    "scheme": "ct",
    "clip_low": -1000.0,
    "clip_high": 1000.0,
    "mean": 0.0,
    "std": 500.0,
}
PLAN = make_plan((1.5,) * 3, (96,) * 3, (8, 16), CT)


class Slopes(nn.Module):
    """Scores ``(B, K, *S)`` of values ``(B, 1, *S)``: parabolas with their tops side by side."""

    def __init__(self, number: int) -> None:
        super().__init__()
        tops = torch.linspace(-2, 2, number).view(1, -1, 1, 1, 1)
        self.register_buffer("slope", 2 * tops)
        self.register_buffer("offset", -tops.square())

    def forward(self, image: Tensor) -> Tensor:
        return torch.addcmul(self.offset, self.slope, image)


def make_volume(path: Path, shape: Sequence[int]) -> None:
    """An ellipse of soft tissue with organs in air; little noise, as after a network."""
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    volume = np.full(shape, -1000, np.int16)
    volume[axes[0] ** 2 / 0.8 + axes[1] ** 2 / 0.5 + 0 * axes[2] < 1] = 40
    for _ in range(60):
        centre, radius = rng.uniform(-0.6, 0.6, 3), rng.uniform(0.05, 0.2)
        distance = sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True))
        volume[distance < radius**2] = rng.integers(-900, 900)
    volume += rng.normal(0, 2, shape).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume, np.diag([*SPACING_MM, 1.0])), path)


def predict_volseg(path: Path, number: int, output: Path, memory_gb: float) -> float:
    from volseg.inference import Options, Predictor
    from volseg.inference.model import Model, ModelFacts

    facts = ModelFacts(plan=PLAN, classes=name_classes(number))
    model = Model((Slopes(number),), facts, torch.device("cpu"), digest=f"{number} slopes")
    predictor = Predictor(model, Options(memory_gb=memory_gb))
    start = time.perf_counter()
    predictor(path).save(output / "ct.nii.gz")
    return time.perf_counter() - start


def export_volseg(path: Path, number: int, output: Path) -> float:
    """As `predict_volseg`, of scores that are there already: those of half a window at a time."""
    from volseg.data.content import Box
    from volseg.data.preprocessing import prepare
    from volseg.images import read_image
    from volseg.inference.native_grid import NativeGrid
    from volseg.inference.predictor import Segmentation

    classes, network = name_classes(number), Slopes(number)
    start = time.perf_counter()
    prepared = prepare(read_image(path), PLAN)
    grid = NativeGrid(prepared.placement, classes)
    shape = prepared.placement.shape
    filling = grid.open(Box((0,) * 3, shape), choose_axis(shape, PLAN.patch))
    not_counted = 0.0
    with torch.inference_mode():
        for part in prepared.image.split(PLAN.patch[filling.axis] // 2, filling.axis + 1):
            scoring = time.perf_counter()
            scores = network(part[None])[0]
            not_counted += time.perf_counter() - scoring
            filling.add(scores)
    Segmentation(grid.labels, prepared.placement.source, classes).save(output / "ct.nii.gz")
    return time.perf_counter() - start - not_counted


def predict_monai(path: Path, number: int, output: Path) -> float:
    from monai.inferers import SlidingWindowInferer
    from monai.transforms import (
        AsDiscreted,
        Compose,
        EnsureChannelFirstd,
        Invertd,
        LoadImaged,
        NormalizeIntensityd,
        Orientationd,
        SaveImaged,
        ScaleIntensityRanged,
        Spacingd,
    )

    before = Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="RAS"),
            Spacingd("image", pixdim=(1.5, 1.5, 1.5), mode="bilinear"),
            ScaleIntensityRanged("image", -1000, 1000, -1000, 1000, clip=True),
            NormalizeIntensityd("image", subtrahend=0.0, divisor=500.0),
        ]
    )
    after = Compose(
        [
            Invertd("pred", before, orig_keys="image", nearest_interp=False, to_tensor=True),
            AsDiscreted("pred", argmax=True),
            SaveImaged(
                "pred",
                output_dir=str(output),
                output_postfix="",
                separate_folder=False,
                resample=False,
                output_dtype=np.uint8,
                print_log=False,
            ),
        ]
    )
    network, inferer = Slopes(number), SlidingWindowInferer((96,) * 3, 1, 0.5, mode="gaussian")
    start = time.perf_counter()
    with torch.inference_mode():
        data = before({"image": str(path)})
        data["pred"] = inferer(data["image"][None], network)[0]
        after(data)
    return time.perf_counter() - start


def list_command(
    side: str, path: Path, number: int, output: Path, result: Path, arguments: argparse.Namespace
) -> list[str]:
    words = ["--side", side, "--image", str(path), "--result", str(result)]
    words += ["--threads", str(torch.get_num_threads()), "--classes", str(number)]
    if side == "volseg":
        words += ["--memory", str(arguments.memory)]
    if side == "nnU-Net's export":
        script = Path(__file__).with_name("nnunet_export.py")
        return [str(arguments.peer_python), str(script), str(output), *words[2:]]
    return [sys.executable, __file__, str(output), *words]


def check_memory(side: str, path: Path, number: int, limit_gb: float) -> None:
    """Refuse a side whose scores alone are too large.

    Raises:
        OutOfMemory: says how large they are.
    """
    needed_gb = 1e-9 * SCORE_BYTES.get(side, 0) * number * math.prod(read_header(path)[0].shape)
    if needed_gb > limit_gb:
        raise OutOfMemory(f"needs {needed_gb:.1f} GB at least")


def run_side(
    side: str, path: Path, number: int, arguments: argparse.Namespace
) -> Measured | SystemExit:
    """One round of a side, or what ended it."""
    output, result = arguments.output / side, arguments.output / "result.json"
    output.mkdir(parents=True, exist_ok=True)
    try:
        check_memory(side, path, number, arguments.memory)
        command = list_command(side, path, number, output, result, arguments)
        return run_measured(command, result, arguments.output / "log.txt", arguments.memory)
    except SystemExit as end:
        return end


def measure(number: int, path: Path, arguments: argparse.Namespace) -> None:
    """Print the rows of a number of classes; a side that did not end is not tried again."""
    sides = [side for side in SIDES if side in arguments.sides]
    found: dict[str, list[Measured]] = {side: [] for side in sides}
    ended: dict[str, SystemExit] = {}
    for place in range(arguments.rounds):
        for side in sides if place % 2 == 0 else sides[::-1]:
            if side in ended:
                continue
            what = run_side(side, path, number, arguments)
            print(f"{number} classes, {side}: {what}", file=sys.stderr, flush=True)
            if isinstance(what, Measured):
                found[side].append(what)
            else:
                ended[side] = what
    for side in sides:
        if side in ended:
            why = ended[side] if isinstance(ended[side], OutOfMemory) else "did not end"
            print(f"| {number} | {side} | {why} | | | |", flush=True)
        else:
            ours = [] if "volseg" in ended else found.get("volseg", [])
            print(format_row(number, side, found[side], ours), flush=True)


def format_row(number: int, side: str, rounds: Sequence[Measured], ours: Sequence[Measured]) -> str:
    """Medians of a side, and of its ratios to volseg round by round, if volseg ended."""
    seconds = statistics.median(each.seconds for each in rounds)
    peak = statistics.median(each.peak_mb for each in rounds)
    ratio = more = ""
    if ours:
        pairs = list(zip(rounds, ours, strict=True))
        ratio = f"{statistics.median(a.seconds / b.seconds for a, b in pairs):.1f}"
        more = f"{statistics.median(a.peak_mb / b.peak_mb for a, b in pairs):.1f}"
    return f"| {number} | {side} | {seconds:.1f} | {ratio} | {peak:.0f} | {more} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--peer-python", type=Path, help="python with nnunetv2")
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 25, 117])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE, help="voxels of the volume")
    free_gb = SPARE * free_bytes(torch.device("cpu")) / 1e9
    parser.add_argument("--memory", type=float, default=free_gb, help="GB that a side may take")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    # Of a process that this program has started:
    for word in ("--side", "--image", "--result"):
        parser.add_argument(word, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        torch.set_num_threads(arguments.threads)
        case = Path(arguments.image), arguments.classes[0], arguments.output
        predict = {
            "volseg": partial(predict_volseg, memory_gb=arguments.memory),
            "volseg's export": export_volseg,
            "MONAI": predict_monai,
        }
        seconds = predict[arguments.side](*case)
        write_json(Path(arguments.result), {"seconds": seconds})
        return
    print(*(f"{key}: {value}" for key, value in describe_machine("cpu").items()), sep="\n")
    path = arguments.output / f"{'x'.join(map(str, arguments.shape))}.nii.gz"
    if not path.exists():
        make_volume(path, arguments.shape)
    print("\n| classes | side | seconds | times volseg's | peak MB | times volseg's |")
    print("|---|---|---|---|---|---|")
    for number in arguments.classes:
        task = Task("CT", path.parent, path.parent, PLAN, name_classes(number))
        write_nnunet_model(task, path.with_name(f"nnunet_{number}"))
        measure(number, path, arguments)


if __name__ == "__main__":
    main()
