"""How fast the machine trains, measured."""

from __future__ import annotations

import pytest
import torch

from volseg.training import machine as machine_module
from volseg.training.machine import measure_machine


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_measured_machine_predicts_steps(
    spatial_dims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("volseg.training.machine._PROBE_PATCH", {2: (64, 64), 3: (16, 16, 16)})
    machine = measure_machine(torch.device("cpu"), spatial_dims)
    assert machine.is_measured
    assert machine.device == "cpu"
    assert machine.seconds_per_gflop > 0
    assert machine.seconds_per_mvoxel > 0
    assert machine.memory_gb > 0.5


def test_processes_share_the_memory_of_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("volseg.training.machine.memory_gb", lambda: 16.0)
    assert machine_module._device_memory_gb(torch.device("cpu")) == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine_module._device_memory_gb(torch.device("cpu")) == 4


def test_a_gpu_with_room_times_larger_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"bytes": 8e9}
    monkeypatch.setattr(machine_module, "free_bytes", lambda device: free["bytes"])
    gpu = torch.device("cuda")
    assert machine_module._choose_probe(gpu, 3) == ((96, 96, 96), (32, 64))
    assert machine_module._choose_probe(torch.device("cpu"), 3) == ((64, 64, 64), (16, 32))
    free["bytes"] = 4e9
    assert machine_module._choose_probe(gpu, 2) == ((512, 512), (16, 32))
