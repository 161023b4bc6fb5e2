"""Steps per second of a training, by number format and by what else is chosen, beside nnU-Net's.

``python benchmarks/step_speed.py --device cuda --peer-python NNUNET_ENVIRONMENT/bin/python``

A step is the trainer's own, from a batch that lies on the device to changed weights: no patch is
cut or changed in it. The network is nnU-Net's of the hippocampus: four levels, each with twice the
channels of the one above, instance normalisation, deep supervision. On a GPU width and batch are
those of nnU-Net's plan, on a CPU of volseg's.

nnU-Net's side (``--peer-python``, where nnunetv2 is installed; left out without it) is its
trainer's step on the same patch, batch and widths: in float32 on a CPU, compiled and in float16 on
a GPU, with cuDNN tuned.

Rates are of the convolutions, forward and backward, as torch counts them; for nnU-Net the same
number is taken. The share is of a matrix product in the same format, measured in the same process.

Each variant runs in a process of its own, since memory is handed out per process; the variants take
turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from ignite.engine import Events
from machine import describe_machine
from network_rate import measure_matrix_rate
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from volseg.allocation import keep_freed_memory
from volseg.config import OptimizerConfig
from volseg.losses import DiceCrossEntropy, MultiLevelLoss
from volseg.networks import build_network, prefer_speed_
from volseg.training.budget import Budget
from volseg.training.engine import Learner, compute_gradients, create_trainer, make_learner
from volseg.training.precision import CompiledNetwork

PEER = Path(__file__).with_name("nnunet_peer.py")
NNUNET = "nnU-Net"
VARIANTS = {
    "cpu": {
        "float32": [],
        "float32, memory kept": ["--keep"],
        "bfloat16": ["--precision", "bfloat16"],
        "bfloat16, memory kept": ["--precision", "bfloat16", "--keep"],
    },
    "cuda": {
        "float32": [],
        "float16": ["--precision", "float16"],
        "bfloat16": ["--precision", "bfloat16"],
        "bfloat16, compiled": ["--precision", "bfloat16", "--compile"],
        "bfloat16, compiled, cuDNN tuned": ["--precision", "bfloat16", "--compile", "--tune"],
    },
}
LEVELS, CLASSES = 4, 3
WARM_UP = 5
DEFAULTS = {
    "cpu": {"width": 16, "batch": 2, "steps": 8, "matrix": 2048},
    "cuda": {"width": 32, "batch": 7, "steps": 100, "matrix": 8192},
}


@dataclass(frozen=True)
class Speed:
    """Of one process; rates in operations per second, None where they were not measured."""

    steps_per_second: float
    rate: float | None = None
    matrix_rate: float | None = None


def make(arguments: argparse.Namespace, device: torch.device) -> Learner:
    """What volseg trains, as its training command makes it."""
    torch.manual_seed(0)
    network = build_network(
        "unet",
        spatial_dims=len(arguments.patch),
        in_channels=1,
        out_channels=CLASSES,
        channels=[arguments.width * 2**level for level in range(LEVELS)],
        deep_supervision=True,
    ).train()
    prefer_speed_(network)
    loss = MultiLevelLoss(DiceCrossEntropy(), "halving")
    budget = Budget(WARM_UP + arguments.steps)
    precision = getattr(torch, arguments.precision)
    learner = make_learner(network, loss, device, budget, OptimizerConfig(), 0, precision)
    if arguments.compile:
        learner.forward = CompiledNetwork(learner.forward)
    return learner


def measure(arguments: argparse.Namespace) -> Speed:
    """volseg's training step on a batch that lies on the device."""
    device = torch.device(arguments.device)
    learner = make(arguments, device)
    shape = (arguments.batch, 1, *arguments.patch)
    batch = torch.randn(shape, device=device), torch.randint(0, CLASSES, shape, device=device)[:, 0]
    work = count_operations(arguments, batch)
    speed = time_steps(learner, batch, arguments.steps)
    matrix_rate = measure_matrix_rate(device, learner.precision, arguments.matrix)
    return Speed(speed, work * speed, matrix_rate)


def count_operations(arguments: argparse.Namespace, batch: tuple[Tensor, Tensor]) -> int:
    """Of the forward and backward pass of a batch, by a learner that is not compiled."""
    plain = argparse.Namespace(**{**vars(arguments), "compile": False})
    with FlopCounterMode(display=False) as counter:
        compute_gradients(make(plain, batch[0].device), *batch)
    return int(counter.get_total_flops())


def time_steps(learner: Learner, batch: tuple[Tensor, Tensor], steps: int) -> float:
    """Steps per second, all together after a warm-up."""
    trainer, clock = create_trainer(learner), list[float]()

    @trainer.on(Events.ITERATION_COMPLETED(once=WARM_UP))
    @trainer.on(Events.ITERATION_COMPLETED(once=WARM_UP + steps))
    def look() -> None:
        if learner.device.type == "cuda":
            torch.cuda.synchronize(learner.device)
        clock.append(time.perf_counter())

    trainer.run(itertools.repeat(batch), max_epochs=1, epoch_length=WARM_UP + steps)
    start, end = clock
    return steps / (end - start)


def make_plans(patch: Sequence[int], batch: int, width: int) -> dict[str, object]:
    """What nnU-Net's trainer needs to know for steps on patches that are there already."""
    dims = len(patch)
    kernels = [[3] * dims] * LEVELS
    arguments = {
        "n_stages": LEVELS,
        "features_per_stage": [width * 2**level for level in range(LEVELS)],
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": kernels,
        "strides": [[1] * dims, *[[2] * dims] * (LEVELS - 1)],
        "n_conv_per_stage": [2] * LEVELS,
        "n_conv_per_stage_decoder": [2] * (LEVELS - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    configuration = {
        "data_identifier": "data",
        "patch_size": list(patch),
        "batch_size": batch,
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": arguments,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    return {
        "dataset_name": "Dataset001_Steps",
        "plans_name": "steps",
        "image_reader_writer": "SimpleITKIO",
        "configurations": {"3d_fullres": configuration},
    }


def measure_nnunet(arguments: argparse.Namespace) -> Speed:
    """Its trainer's step, in its own environment."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        plans, result = folder / "plans.json", folder / "result.json"
        plans.write_text(json.dumps(make_plans(arguments.patch, arguments.batch, arguments.width)))
        variables = {f"nnUNet_{part}": name for part in ("raw", "preprocessed", "results")}
        words = ["--plans", str(plans), "--device", arguments.device]
        words += ["--steps", str(arguments.steps), "--threads", str(torch.get_num_threads())]
        # Not resolved: where the link of an environment lies decides what it imports.
        command = [str(arguments.peer_python.absolute()), str(PEER), "step", str(result), *words]
        run(command, os.environ | variables)
        return Speed(json.loads(result.read_text())["steps_per_second"])


def measure_variant(options: Sequence[str], arguments: argparse.Namespace) -> Speed:
    """In a process of its own."""
    given = ("device", "patch", "width", "batch", "steps", "matrix")
    words = [(f"--{key}", getattr(arguments, key)) for key in given]
    values = [[key, *map(str, v if isinstance(v, list) else [v])] for key, v in words]
    command = [sys.executable, __file__, *itertools.chain(*values), "--here", *options]
    return Speed(**json.loads(run(command, os.environ)))


def run(command: Sequence[str], environment: dict[str, str] | os._Environ[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"`{' '.join(command)}` ended with:\n{done.stderr}")
    return done.stdout.strip().rpartition("\n")[2]


def format_rows(rounds: Sequence[dict[str, Speed]]) -> str:
    """Medians over the rounds; ratios are of the steps per second within a round."""
    first = next(iter(rounds[0]))
    work = statistics.median(
        (each[first].rate or math.nan) / each[first].steps_per_second for each in rounds
    )
    lines = [
        f"| variant | steps per second | times {first} | Tflop/s | matrix product | share |",
        "|---|---|---|---|---|---|",
    ]

    def take(name: str, figure: Callable[[Speed, Speed], float]) -> float:
        return statistics.median(figure(each[name], each[first]) for each in rounds)

    for name in rounds[0]:
        speed = take(name, lambda own, _: own.steps_per_second)
        ratio = take(name, lambda own, other: own.steps_per_second / other.steps_per_second)
        line = f"| {name} | {speed:.3g} | {ratio:.2f} | {speed * work / 1e12:.3g} "
        if rounds[0][name].matrix_rate:
            most = take(name, lambda own, _: own.matrix_rate or math.nan)
            share = take(
                name, lambda own, _: (own.rate or math.nan) / (own.matrix_rate or math.nan)
            )
            line += f"| {most / 1e12:.3g} | {share:.0%} |"
        else:
            line += "| | |"
        lines.append(line)
    return "\n".join(lines)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--patch", nargs="+", type=int, default=[40, 56, 40])
    parser.add_argument("--width", type=int, help="channels of the first level")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of a turn")
    parser.add_argument("--matrix", type=int, help="edge of the matrix")
    parser.add_argument("--peer-python", type=Path, help="of an environment with nnunetv2")
    for name in ("here", "keep", "compile", "tune"):
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="float32", help=argparse.SUPPRESS)
    kind = torch.device(parser.parse_args(words).device).type
    parser.set_defaults(**DEFAULTS[kind])
    return parser.parse_args(words)


def main() -> None:
    arguments = parse_arguments()
    if arguments.here:
        if arguments.keep:
            keep_freed_memory()
        torch.backends.cudnn.benchmark = arguments.tune
        # Matrices in the format that convolutions have.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
        print(json.dumps(asdict(measure(arguments))))
        return
    kind = torch.device(arguments.device).type
    print(*(f"{key}: {value}" for key, value in describe_machine(kind).items()), sep="\n")
    rounds = []
    for _ in range(arguments.rounds):
        speeds = {name: measure_variant(o, arguments) for name, o in VARIANTS[kind].items()}
        if arguments.peer_python:
            speeds[NNUNET] = measure_nnunet(arguments)
        rounds.append(speeds)
    print(f"\n{format_rows(rounds)}")


if __name__ == "__main__":
    main()
