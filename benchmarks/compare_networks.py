"""What volseg's networks cost beside the plainest transcription of their source.

``python benchmarks/compare_networks.py --dims 3``

A step is the forward pass in training mode, the sum of squares of all logits, and the backward
pass. The two networks of a pair take their steps in turns on the same images, so that whatever
else the machine does meets both. Of memory it counts

- kept: what autograd holds between forward and backward pass, parameters left out;
- peak: the most that torch has allocated at any moment of a step;
- resident (``--memory``, slow): what the first step adds to the peak of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transcriptions as plain
from machine import describe_machine
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from volseg.networks import build_network

BATCH, CHANNELS, CLASSES = 2, 1, 3
WIDTHS = (8, 16, 32, 64, 128)
RESNET = {"channels": (8, 8, 16, 32, 64), "decoder_channels": (32, 16, 8, 4, 4)}
WARM_UP = 2
PROCESSES = 3
MB = 1e6


@dataclass(frozen=True)
class Pair:
    """A network of volseg, and what builds its transcription for a number of axes.

    Images have `edges[0]` pixels along every axis in 2D, `edges[1]` in 3D.
    """

    transcription: Callable[[int], nn.Module]
    name: str
    options: dict[str, Any] = field(default_factory=lambda: {"channels": WIDTHS})
    edges: tuple[int, int] = (256, 48)

    def build(self, side: str, dims: int, device: str) -> nn.Module:
        """Build the side called "plain" or "volseg"."""
        if side == "plain":
            network = self.transcription(dims)
        else:
            network = build_network(
                self.name,
                spatial_dims=dims,
                in_channels=CHANNELS,
                out_channels=CLASSES,
                **self.options,
            )
        return network.to(device).train()

    def draw_images(self, dims: int, device: str) -> Tensor:
        return torch.randn(BATCH, CHANNELS, *[self.edges[dims - 2]] * dims, device=device)


@dataclass(frozen=True)
class Cost:
    """Of one pair: `seconds` and megabytes as (plain, volseg), `ratios` volseg / plain by round."""

    name: str
    size: list[int]
    seconds: list[float]
    ratios: list[float]
    kept: list[float]
    peak: list[float]
    resident: list[float]


def plainly(
    cls: type[nn.Module], widths: Sequence[int] = WIDTHS, **options: Any
) -> Callable[[int], nn.Module]:
    return lambda dims: cls(dims, CHANNELS, CLASSES, widths, **options)


def planned(cls: type[nn.Module], **options: Any) -> Callable[[int], nn.Module]:
    """nnU-Net's networks name stride and kernel per level and axis."""

    def build(dims: int) -> nn.Module:
        strides = [[2 if level else 1] * dims for level in range(len(WIDTHS))]
        ends = {"in_channels": CHANNELS, "out_channels": CLASSES}
        return cls(WIDTHS, strides, [[3] * dims] * len(WIDTHS), dims=dims, **ends, **options)

    return build


PAIRS = {
    "laddernet": Pair(
        lambda dims: plain.LadderNet(dims, CHANNELS, CLASSES, layers=3, filters=8),
        "laddernet",
        {"channels": WIDTHS[:4]},
    ),
    "unet_original": Pair(plainly(plain.LabmlUNet), "unet_original"),
    "unet_keras": Pair(
        plainly(plain.KerasUNet), "unet_keras", {"channels": WIDTHS, "penultimate": 2}
    ),
    "unet3d_original": Pair(
        # The transcription counts a level's first convolution, volseg its second.
        plainly(plain.CicekUNet, WIDTHS[:4]),
        "unet3d_original",
        {"channels": WIDTHS[1:]},
        (192, 32),
    ),
    "unet3d_deep_supervision": Pair(
        plainly(plain.ZengUNet, WIDTHS[:4]),
        "unet3d_deep_supervision",
        {"channels": WIDTHS[1:]},
        (192, 32),
    ),
    "dsn3d": Pair(plainly(plain.DeeplySupervised3d, WIDTHS[:4]), "dsn3d", {"channels": WIDTHS[:4]}),
    "unet_summed_logits": Pair(plainly(plain.SummedLogitsUNet), "unet_summed_logits"),
    "unetplusplus, pytorch": Pair(
        plainly(plain.NestedUNet, deep_supervision=True), "unetplusplus", edges=(192, 32)
    ),
    "unetplusplus, keras": Pair(
        plainly(plain.NestedUNetKeras, deep_supervision=True),
        "unetplusplus",
        {"channels": WIDTHS, "form": "keras"},
        (192, 32),
    ),
    "resnet_unet": Pair(
        plainly(plain.ResNet34UNet, RESNET["channels"], decoder_widths=RESNET["decoder_channels"]),
        "resnet_unet",
        RESNET,
        (256, 64),
    ),
    "hypercolumn_unet": Pair(plainly(plain.HypercolumnUNet), "hypercolumn_unet", edges=(192, 32)),
    "unet, plain": Pair(planned(plain.PlanUNet), "unet"),
    "unet, supervised": Pair(
        planned(plain.PlanUNet, deep_supervision=True),
        "unet",
        {"channels": WIDTHS, "deep_supervision": True},
    ),
    "unet, residual": Pair(
        planned(plain.ResEncUNet, blocks=(1, 3, 4, 6, 6)),
        "unet",
        {"channels": WIDTHS, "encoder": "residual"},
    ),
}


def run_forward(network: nn.Module, images: Tensor) -> Tensor:
    outputs = network(images)
    logits = outputs if isinstance(outputs, list) else [outputs]
    return torch.stack([level.square().sum() for level in logits]).sum()


def time_step(network: nn.Module, images: Tensor) -> float:
    network.zero_grad()
    wait_for(images)
    start = time.perf_counter()
    run_forward(network, images).backward()
    wait_for(images)
    return time.perf_counter() - start


def wait_for(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def measure_kept(network: nn.Module, images: Tensor) -> float:
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_forward(network, images)
    return sum(storage.nbytes() for storage in kept.values()) / MB


def measure_peak(network: nn.Module, images: Tensor) -> float:
    network.zero_grad()
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        run_forward(network, images).backward()
        return (torch.cuda.max_memory_allocated(images.device) - before) / MB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run_forward(network, images).backward()
    with TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
    # Steps that were profiled before leave their gradients in the total.
    return (max(totals) - totals[0]) / MB


def measure_resident(name: str, dims: int) -> list[float]:
    # A process inherits the peak of the one that started it, unless that is a fork server.
    context = multiprocessing.get_context("forkserver")
    medians = []
    for side in ("plain", "volseg"):
        peaks = []
        for _ in range(PROCESSES):
            with ProcessPoolExecutor(1, context) as pool:
                peaks.append(pool.submit(step_here, name, side, dims).result())
        medians.append(statistics.median(peaks))
    return medians


def step_here(name: str, side: str, dims: int) -> float:
    network = PAIRS[name].build(side, dims, "cpu")
    images = PAIRS[name].draw_images(dims, "cpu")
    before = read_resident_peak()
    time_step(network, images)
    return (read_resident_peak() - before) / MB


def read_resident_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compare(name: str, dims: int, rounds: int, device: str, with_resident: bool) -> Cost:
    images = PAIRS[name].draw_images(dims, device)
    networks = [PAIRS[name].build(side, dims, device) for side in ("plain", "volseg")]
    for network in networks * WARM_UP:
        time_step(network, images)
    times: list[list[float]] = [[], []]
    for number in range(rounds):
        # Who goes first changes with every round.
        for side in (0, 1) if number % 2 else (1, 0):
            times[side].append(time_step(networks[side], images))
    return Cost(
        name,
        size=list(images.shape),
        seconds=[statistics.median(steps) for steps in times],
        ratios=[volseg / other for other, volseg in zip(*times, strict=True)],
        kept=[measure_kept(network, images) for network in networks],
        peak=[measure_peak(network, images) for network in networks],
        resident=measure_resident(name, dims) if with_resident else [],
    )


BOTH = " plain volseg"
HEADER = f"""
{"":21} {"seconds":^13} {"volseg / plain":^20} {"kept MB":^13} {"peak MB":^13} {"resident MB":>12}
{"network":21} {BOTH} {"median":>6} {"quartiles":>13} {BOTH} {BOTH} {BOTH}"""


def format_row(cost: Cost) -> str:
    low, median, high = statistics.quantiles(cost.ratios, n=4, method="inclusive")
    megabytes = [*cost.kept, *cost.peak, *cost.resident]
    return " ".join(
        [
            f"{cost.name:21}",
            *(f"{seconds:6.3f}" for seconds in cost.seconds),
            f"{median:6.3f} {low:.3f} - {high:.3f}",
            *(f"{number:6.1f}" for number in megabytes),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dims", type=int, choices=(2, 3), default=3)
    parser.add_argument("--names", nargs="+", choices=PAIRS, default=list(PAIRS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each side; 2 or more")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--memory", action="store_true", help="resident memory too, on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    arguments = parser.parse_args()
    if arguments.memory and arguments.device != "cpu":
        parser.error("--memory is for --device cpu; the peak says it all for cuda")
    # Without this the profiler reports its own starts and stops between the rows.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    about = describe_machine(arguments.device)
    print(*(f"{key}: {value}" for key, value in about.items()), sep="\n")
    print(HEADER)
    costs = []
    for name in arguments.names:
        cost = compare(name, arguments.dims, arguments.rounds, arguments.device, arguments.memory)
        print(format_row(cost), flush=True)
        costs.append(asdict(cost))
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "costs": costs}, indent=1))


if __name__ == "__main__":
    main()
