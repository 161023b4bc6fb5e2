"""Seconds of a training step on this machine, by number format and by how memory is handed out.

``python benchmarks/step_speed.py --patch 40 56 40``

Each variant runs in a process of its own, since memory is handed out per process; the variants take
turns. The network is the default U-Net as it is planned for the hippocampus.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
from compare_networks import describe_machine

from volseg.allocation import keep_freed_memory
from volseg.losses import DiceCrossEntropy, MultiLevelLoss
from volseg.networks import build_network, prefer_speed_

VARIANTS = {
    "float32": [],
    "float32, memory kept": ["--keep"],
    "bfloat16": ["--bfloat16"],
    "bfloat16, memory kept": ["--bfloat16", "--keep"],
}
WARM_UP, STEPS = 3, 8


def time_steps(patch: list[int], width: int, bfloat16: bool, keep: bool) -> float:
    """Median seconds of a step on a batch of two."""
    if keep:
        keep_freed_memory()
    torch.manual_seed(0)
    network = build_network(
        "unet",
        spatial_dims=len(patch),
        in_channels=1,
        out_channels=3,
        channels=[width * 2**level for level in range(4)],
        deep_supervision=True,
    ).train()
    prefer_speed_(network)
    image, target = torch.randn(2, 1, *patch), torch.randint(0, 3, (2, 1, *patch))
    loss = MultiLevelLoss(DiceCrossEntropy(), "halving")
    optimizer = torch.optim.AdamW(network.parameters())
    seconds = []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = network(image)
        loss(logits, target).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:])


def run_variant(options: list[str], arguments: argparse.Namespace) -> float:
    words = ["--patch", *map(str, arguments.patch), "--width", str(arguments.width), "--here"]
    command = [sys.executable, __file__, *words, *options]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return float(json.loads(output.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patch", nargs="+", type=int, default=[40, 56, 40])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bfloat16", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(time_steps(arguments.patch, arguments.width, arguments.bfloat16, arguments.keep))
        return
    print(*(f"{key}: {value}" for key, value in describe_machine("cpu").items()), sep="\n")
    rounds = [
        {name: run_variant(options, arguments) for name, options in VARIANTS.items()}
        for _ in range(arguments.rounds)
    ]
    print(f"\n{'variant':24} seconds  ratio to float32")
    for name in VARIANTS:
        seconds = statistics.median(each[name] for each in rounds)
        ratio = statistics.median(each[name] / each["float32"] for each in rounds)
        print(f"{name:24} {seconds:7.3f}  {ratio:.3f}")


if __name__ == "__main__":
    main()
