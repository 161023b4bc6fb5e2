"""Measure how fast this machine trains, for the planner."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from volseg.cores import count_beside
from volseg.inference.memory import free_bytes
from volseg.networks import build_network, prefer_speed_
from volseg.planning.cost import compute_cost
from volseg.planning.machine import Machine, describe_cpu, memory_gb
from volseg.planning.plan import NetworkPlan

_PROBE_PATCH = {2: (512, 512), 3: (64, 64, 64)}
_PROBE_WIDTHS = (16, 32)
_PROBE_LEVELS = 4
_GPU_PROBE_PATCH = {2: (1024, 1024), 3: (96, 96, 96)}
_GPU_PROBE_WIDTHS = (32, 64)
"""On a fast GPU steps of a smaller network would tell of little but the start of its kernels."""
_GPU_PROBE_BYTES = 6e9
"""Free memory that they want."""


def measure_machine(
    device: torch.device, spatial_dims: int, precision: torch.dtype = torch.float32
) -> Machine:
    """Time training steps of a narrow and a wide U-Net in `precision`; a few seconds.

    The narrow one is bound by memory, the wide one by arithmetic; together they give the two
    rates of a `Machine`.
    """
    costs, seconds = [], []
    patch, widths = _choose_probe(device, spatial_dims)
    for width in widths:
        network = _probe_network(width, spatial_dims)
        cost = compute_cost(network, patch, 1, 2)
        costs.append((cost.gflop, cost.feature_mvoxels))
        seconds.append(_time_step(network, patch, device, precision))
    # A negative rate is noise of the timing; the other rate then explains both steps.
    rates = np.linalg.lstsq(np.array(costs), np.array(seconds), rcond=None)[0]
    if rates.min() <= 0:
        guess = describe_cpu()
        shape = np.array([guess.seconds_per_gflop, guess.seconds_per_mvoxel])
        rates = shape * np.median(np.array(seconds) / (np.array(costs) @ shape))
    return Machine(
        device=str(device),
        name=_device_name(device),
        memory_gb=_device_memory_gb(device),
        seconds_per_gflop=float(rates[0]),
        seconds_per_mvoxel=float(rates[1]),
        is_measured=True,
    )


def _choose_probe(
    device: torch.device, spatial_dims: int
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Patch and widths of the steps that are timed."""
    if device.type == "cuda" and free_bytes(device) >= _GPU_PROBE_BYTES:
        return _GPU_PROBE_PATCH[spatial_dims], _GPU_PROBE_WIDTHS
    return _PROBE_PATCH[spatial_dims], _PROBE_WIDTHS


def _probe_network(width: int, spatial_dims: int) -> NetworkPlan:
    ones, twos, threes = ((n,) * spatial_dims for n in (1, 2, 3))
    return NetworkPlan(
        name="unet",
        channels=tuple(width * 2**level for level in range(_PROBE_LEVELS)),
        strides=(ones, *[twos] * (_PROBE_LEVELS - 1)),
        kernel_sizes=(threes,) * _PROBE_LEVELS,
        deep_supervision=False,
    )


def _time_step(
    plan: NetworkPlan, patch: Sequence[int], device: torch.device, precision: torch.dtype
) -> float:
    """Seconds of a forward and backward pass, the best of two after a warm-up."""
    options = {"spatial_dims": len(patch), "in_channels": 1, "out_channels": 2}
    network = build_network(plan.name, **options, **plan.keywords()).to(device)
    prefer_speed_(network)
    image = torch.zeros((1, 1, *patch), device=device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss = network(image).float().square().mean()
        loss.backward()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def _device_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return memory_gb() / count_beside()
