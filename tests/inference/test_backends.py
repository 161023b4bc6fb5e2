"""Runtimes give what torch gives, or are refused with the figure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import volseg
from volseg.errors import MachineError
from volseg.inference import Options, backends
from volseg.inference.backends import (
    Place,
    WindowShape,
    choose_backend,
    choose_precision,
    prepare_backend,
    prepare_backends,
)
from volseg.networks import build_network

CPU = Place(torch.device("cpu"))
SHAPE = WindowShape(2, 1, (16, 16, 16))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    options = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8, 16]}
    return build_network("unet", **options).eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_runtime_gives_what_torch_gives(name: str, network: nn.Module) -> None:
    runtime = prepare_backend(name, network, SHAPE, CPU)
    assert runtime is not network
    for number in (2, 1):
        windows = torch.randn(number, 1, 16, 16, 16)
        torch.testing.assert_close(runtime(windows), network(windows), atol=1e-4, rtol=1e-4)


def test_a_runtime_that_disagrees_is_refused(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(original: nn.Module, example: torch.Tensor, place: Place):
        return lambda windows: original(windows) * 1.1

    monkeypatch.setitem(backends._BUILDERS, "openvino", (build, ("cpu",)))
    with pytest.raises(MachineError, match=r"openvino differs from torch by 0\.\d+ of the logits"):
        prepare_backend("openvino", network, SHAPE, CPU)


def test_agreement_is_remembered_with_the_weights(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compare, compared = backends._compare, []

    def watch(*arguments: object) -> str:
        compared.append(arguments[0])
        return compare(*arguments)

    monkeypatch.setattr(backends, "_compare", watch)
    for weights, number in (("a", 2), ("a", 2), ("b", 4)):
        prepare_backends("openvino", (network, network), SHAPE, CPU, weights=weights)
        assert len(compared) == number
    # What differs is compared again, and refused again.
    monkeypatch.setitem(
        backends._BUILDERS, "openvino", (lambda n, *_: lambda windows: 2 * n(windows), ("cpu",))
    )
    for _ in range(2):
        with pytest.raises(MachineError, match="openvino differs from torch by"):
            prepare_backends("openvino", (network,), SHAPE, CPU, weights="c")


def test_a_runtime_that_gives_nan_is_refused(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(original: nn.Module, example: torch.Tensor, place: Place):
        return lambda windows: original(windows) * torch.nan

    monkeypatch.setitem(backends._BUILDERS, "openvino", (build, ("cpu",)))
    with pytest.raises(MachineError, match="differs from torch by nan"):
        prepare_backend("openvino", network, SHAPE, CPU)


def test_what_is_not_there_is_refused(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(original: nn.Module, example: torch.Tensor, place: Place):
        raise ImportError("No module named 'openvino'")

    monkeypatch.setitem(backends._BUILDERS, "openvino", (missing, ("cpu",)))
    with pytest.raises(MachineError, match=r"pip install volseg\[openvino\]"):
        prepare_backend("openvino", network, SHAPE, CPU)
    with pytest.raises(MachineError, match="--backend tensorrt on cpu; expected cuda"):
        prepare_backend("tensorrt", network, SHAPE, CPU)


class Eigenvalues(nn.Module):
    """What OpenVINO has no operation for."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return windows + torch.linalg.eigvalsh(windows @ windows.transpose(-1, -2))[..., None]


def test_what_a_runtime_cannot_take_is_for_torch(
    network: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caplog.set_level("INFO")
    other = Eigenvalues().eval()
    with pytest.raises(MachineError, match="openvino cannot take this network"):
        prepare_backend("openvino", other, SHAPE, CPU)
    assert prepare_backends("auto", (other,), SHAPE, CPU) == (other,)
    assert "torch computes the network: openvino cannot take" in caplog.text
    # One that goes well beside one that does not.
    monkeypatch.setattr(backends, "_measure", lambda *_: "0.5")
    caplog.clear()
    assert prepare_backends("auto", (network, other), SHAPE, CPU) == (network, other)
    assert caplog.records[-1].levelname == "WARNING"


def test_the_choice_is_measured_once(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def measure(*arguments: object) -> str:
        calls.append(arguments)
        return "0.5"

    monkeypatch.setattr(backends, "_measure", measure)
    assert choose_backend(network, SHAPE, CPU) == "openvino"
    assert choose_backend(network, SHAPE, CPU) == "openvino"
    assert len(calls) == 1
    assert choose_backend(network, WindowShape(1, 1, (16, 16, 16)), CPU) == "openvino"
    half = Place(CPU.device, torch.bfloat16)
    assert choose_backend(network, SHAPE, half) == "openvino"
    assert len(calls) == 3
    (written,) = tmp_path.rglob("backends.json")
    known = json.loads(written.read_text())
    assert len(known) == 3
    for damaged in ("{", "[]", json.dumps(dict.fromkeys(known, "no number"))):
        written.write_text(damaged)
        calls.clear()
        assert choose_backend(network, SHAPE, CPU) == "openvino"
        assert len(calls) == 1
    written.write_text(json.dumps(dict.fromkeys(known, "0.99")))
    assert choose_backend(network, SHAPE, CPU) == "torch"


def test_torch_and_openvino_are_measured(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chosen = choose_backend(network, SHAPE, CPU)
    (ratio,) = json.loads(next(tmp_path.rglob("backends.json")).read_text()).values()
    assert chosen == ("openvino" if float(ratio) <= 0.95 else "torch")


def test_nobody_has_a_home(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(backends, "_measure", lambda *_: "0.5")
    assert choose_backend(network, SHAPE, CPU) == "openvino"


class Close(nn.Module):
    """Two scores that differ less than 16 bits can tell in a share of the voxels."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        kept = torch.nn.functional.conv3d(windows, torch.full((1, 1, 1, 1, 1), 1.0))
        is_half = kept.dtype != torch.float32
        changed = torch.arange(windows.numel()).view_as(windows) < self.share * windows.numel()
        return torch.cat([torch.zeros_like(windows), changed.float() * (is_half - 0.5)], 1)


def test_16_bits_are_for_networks_whose_labels_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caplog.set_level("INFO")
    monkeypatch.setattr(backends, "choose_fastest", lambda device: torch.bfloat16)

    def choose(name: str, share: float, *, overlapping: bool = False) -> torch.dtype:
        arguments = (name, (Close(0.0), Close(share)), SHAPE, CPU.device)
        return choose_precision(*arguments, weights=f"{share}", overlapping=overlapping)

    assert choose("auto", 0.004) == torch.bfloat16
    assert choose("auto", 0.0, overlapping=True) == torch.bfloat16
    assert not caplog.records
    assert choose("auto", 0.01) == torch.float32
    assert "1.00% of the voxels of noise change" in caplog.text
    assert choose("float32", 0.0) == torch.float32
    # Known from now on, and told again.
    monkeypatch.setattr(backends, "compute_logits", None)
    caplog.clear()
    assert choose("auto", 0.01) == torch.float32
    assert "1.00% of the voxels" in caplog.text


def test_labels_of_a_runtime_are_those_of_torch(run: Path, balls: Path) -> None:
    image = sorted((balls / "imagesTr").iterdir())[0]
    torchs, theirs = (
        volseg.Predictor.load(
            run, device="cpu", options=Options(backend=name, precision="float32")
        )(image).labels
        for name in ("torch", "openvino")
    )
    assert torchs.any()
    assert (torchs != theirs).mean() < 1e-4
    assert torchs.dtype == theirs.dtype == np.uint8
