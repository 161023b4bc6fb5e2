"""How large a volume may be: time per voxel and peak memory as volumes grow, with 117 classes.

``python benchmarks/memory_wall.py OUTPUT``

File to file, with a network that costs nothing (that of ``without_network.py``), in windows of 96
voxels at the spacing of the file or at ``--spacing-mm``, each volume in a process of its own.
Windows overlap by half, so that a voxel in the middle of a large volume is in eight of them and one
at the border in fewer: the last column is the time per voxel of the windows.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from machine import describe_machine
from predict_files import make_plan, name_classes
from sides import run_measured
from without_network import CT, SPACING_MM, Slopes, make_volume

from volseg.atomic import write_json

SHAPES = ((128, 128, 128), (256, 256, 256), (512, 512, 200), (512, 512, 1000))
WINDOW = (96, 96, 96)


def predict(
    path: Path, number: int, output: Path, spacing_mm: Sequence[float], memory_gb: float
) -> float:
    from volseg.inference import Options, Predictor
    from volseg.inference.model import Model, ModelFacts

    plan = make_plan(tuple(spacing_mm), WINDOW, (8, 16), CT)
    facts = ModelFacts(plan=plan, classes=name_classes(number))
    model = Model((Slopes(number),), facts, torch.device("cpu"), digest=f"{number} slopes")
    predictor = Predictor(model, Options(memory_gb=memory_gb, precision="float32"))
    start = time.perf_counter()
    predictor(path).save(output / "ct.nii.gz")
    return time.perf_counter() - start


def count_window_voxels(shape: Sequence[int], spacing_mm: Sequence[float]) -> int:
    """Of all windows over a volume of `shape` that is brought to a spacing."""
    from volseg.data.resampling import resampled_shape
    from volseg.inference.windows import list_starts

    axes = zip(resampled_shape(shape, SPACING_MM, spacing_mm), WINDOW, strict=True)
    return math.prod(len(list_starts(max(n, w), w)) * w for n, w in axes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--classes", type=int, default=117)
    parser.add_argument("--memory", type=float, default=8.0, help="GB that a prediction may take")
    parser.add_argument(
        "--spacing-mm", type=float, nargs=3, default=SPACING_MM, help="that the network sees"
    )
    # Of a process that this program has started:
    for word in ("--image", "--result"):
        parser.add_argument(word, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    number, spacing_mm = arguments.classes, arguments.spacing_mm
    if arguments.image:
        image, output = Path(arguments.image), arguments.output
        seconds = predict(image, number, output, spacing_mm, arguments.memory)
        write_json(Path(arguments.result), {"seconds": seconds})
        return
    print(*(f"{key}: {value}" for key, value in describe_machine("cpu").items()), sep="\n")
    at = " x ".join(f"{value:g}" for value in spacing_mm)
    print(f"\n{number} classes, at most {arguments.memory:g} GB, network at {at} mm\n")
    print("| voxels | seconds | peak GB | µs per voxel | ns per voxel of the windows |")
    print("|---|---|---|---|---|")
    for shape in SHAPES:
        name = "x".join(map(str, shape))
        path, result = arguments.output / f"{name}.nii.gz", arguments.output / "result.json"
        if not path.exists():
            make_volume(path, shape)
        words = ["--image", str(path), "--result", str(result), "--memory", str(arguments.memory)]
        words += ["--classes", str(number), "--spacing-mm", *map(str, spacing_mm)]
        command = [sys.executable, __file__, str(arguments.output), *words]
        found = run_measured(command, result, arguments.output / "log.txt")
        per_voxel = 1e6 * found.seconds / math.prod(shape)
        in_windows = 1e9 * found.seconds / count_window_voxels(shape, spacing_mm)
        row = f"{name} | {found.seconds:.1f} | {found.peak_mb / 1e3:.2f}"
        print(f"| {row} | {per_voxel:.2f} | {in_windows:.0f} |", flush=True)


if __name__ == "__main__":
    main()
