"""How near a network comes to the machine: its operations per second against a matrix product's.

``python benchmarks/network_rate.py``

The network is nnU-Net's U-Net of a CT (five levels of 32 to 320 channels) on a window of 96 voxels.
The matrix product is torch's, of square matrices in the same number format, with the same threads.
Both are timed in turns; operations of the network are counted by torch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from machine import describe_machine
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from volseg.errors import MachineError
from volseg.inference.backends import BackendName, Place, WindowShape, prepare_backend
from volseg.inference.members import Network, compute_logits
from volseg.inference.precision import choose_fastest
from volseg.networks import build_network, prefer_speed_

SIZE = 4096
WINDOW = (96, 96, 96)
BACKENDS: dict[str, tuple[BackendName, ...]] = {
    "cpu": ("torch", "openvino"),
    "cuda": ("torch", "tensorrt"),
}


def time_call(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_matrix_rate(device: torch.device, precision: torch.dtype, size: int = SIZE) -> float:
    """Operations per second of the product of square matrices, the median after a warm-up."""
    matrix = torch.randn(size, size, device=device, dtype=precision)
    seconds = [time_call(lambda: matrix @ matrix, device) for _ in range(6)][1:]
    return 2 * size**3 / statistics.median(seconds)


def time_pairs(
    network: Network, windows: Tensor, precision: torch.dtype, rounds: int
) -> list[tuple[float, float]]:
    """Seconds of the network and of the matrix product, in turns, after a warm-up."""
    device = windows.device
    matrix = torch.randn(SIZE, SIZE, device=device, dtype=precision)

    def once() -> tuple[float, float]:
        ours = time_call(lambda: compute_logits(network, windows, precision), device)
        return ours, time_call(lambda: matrix @ matrix, device)

    return [once() for _ in range(rounds + 1)][1:]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128, 256, 320])
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(*(f"{key}: {value}" for key, value in describe_machine(device.type).items()), sep="\n")
    options = {"spatial_dims": 3, "in_channels": 1, "out_channels": 5}
    network = build_network("unet", **options, channels=arguments.channels).to(device).eval()
    prefer_speed_(network)
    windows = torch.randn(1, 1, *WINDOW, device=device)
    with FlopCounterMode(display=False) as counter:
        network(windows)
    work = counter.get_total_flops()
    print(f"\n{work / 1e9:.0f} Gflop a window of {WINDOW[0]} voxels\n")
    print("| format | computed by | seconds a window | Tflop/s | matrix product, Tflop/s | share |")
    print("|---|---|---|---|---|---|")
    for precision in dict.fromkeys([torch.float32, choose_fastest(device)]):
        for name in BACKENDS[device.type]:
            label = f"{str(precision)[6:]} | {name}"
            try:
                place = Place(device, precision)
                candidate = prepare_backend(name, network, WindowShape(1, 1, WINDOW), place)
            except MachineError as error:
                print(f"| {label} | {error} | | | |")
                continue
            pairs = time_pairs(candidate, windows, precision, arguments.rounds)
            seconds = statistics.median(ours for ours, _ in pairs)
            rate = work / seconds / 1e12
            most = 2 * SIZE**3 / statistics.median(product for _, product in pairs) / 1e12
            share = statistics.median(work * p / (ours * 2 * SIZE**3) for ours, p in pairs)
            print(
                f"| {label} | {seconds:.2f} | {rate:.3f} | {most:.3f} | {share:.0%} |", flush=True
            )


if __name__ == "__main__":
    main()
