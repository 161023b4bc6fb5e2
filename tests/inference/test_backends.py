"""Runtimes give what torch gives, or are refused with the figure."""

from __future__ import annotations

import copy
import errno
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import volseg
from volseg import allocation
from volseg.errors import MachineError
from volseg.inference import Options, backends, remembered
from volseg.inference.backends import (
    Place,
    WindowShape,
    choose_backend,
    choose_precision,
    prepare_backend,
    prepare_backends,
)
from volseg.networks import SliceNetwork, build_network, list_networks
from volseg.networks.own import build_own_network

CPU = Place(torch.device("cpu"))
SHAPE = WindowShape(2, 1, (16, 16, 16))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    options = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8, 16]}
    return build_network("unet", **options).eval().requires_grad_(False)


def build_small(name: str, spatial_dims: int) -> nn.Module:
    """Any network, of three narrow levels, for two channels and three classes."""
    options = {"blocks": [1, 2]} if name == "resnet_unet" else {}
    facts = {"spatial_dims": spatial_dims, "in_channels": 2, "out_channels": 3}
    network = build_network(name, **facts, channels=[4, 6, 8], **options)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_runtime_gives_what_torch_gives(name: str, network: nn.Module) -> None:
    runtime = prepare_backend(name, network, SHAPE, CPU)
    assert runtime is not network
    for number in (2, 1):
        windows = torch.randn(number, 1, 16, 16, 16)
        torch.testing.assert_close(runtime(windows), network(windows), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_network_is_followed_without_warnings(
    name: str, recwarn: pytest.WarningsRecorder
) -> None:
    prepare_backend(name, build_small("unet", 3), WindowShape(2, 2, (16, 16, 16)), CPU)
    facts = {"spatial_dims": 3, "in_channels": 2, "out_channels": 3}
    own = build_own_network(Plain, **facts).eval().requires_grad_(False)
    prepare_backend(name, own, WindowShape(2, 2, (16, 16, 16)), CPU)
    assert not recwarn.list


def test_what_torch_says_of_other_packages_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    # It hands nothing on to the root, where pytest listens.
    exporter = logging.getLogger("torch.onnx")
    levels = exporter.level, logging.root.level
    exporter.addHandler(caplog.handler)
    try:
        with backends._quiet():
            exporter.getChild("package").warning("is not there")
            exporter.getChild("package").error("fails")
            logging.root.setLevel(logging.CRITICAL)
    finally:
        exporter.removeHandler(caplog.handler)
    assert [record.message for record in caplog.records] == ["fails"]
    assert (exporter.level, logging.root.level) == levels


class Plain(nn.Module):
    """A network of a user."""

    def __init__(self, **facts: int) -> None:
        super().__init__()
        conv = (nn.Conv2d, nn.Conv3d)[facts["spatial_dims"] - 2]
        self.conv = conv(facts["in_channels"], facts["out_channels"], 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.conv(image)


class Bright(Plain):
    """A network of a user, which does another thing to images that are bright somewhere."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = self.conv(image)
        return -logits if image.max() > 1000 else logits


def test_it_is_said_of_a_users_network_that_it_decides_by_values() -> None:
    facts = {"spatial_dims": 2, "in_channels": 2, "out_channels": 3}
    own = build_own_network(Bright, **facts).eval().requires_grad_(False)
    with pytest.warns(torch.jit.TracerWarning, match="Python boolean") as told:
        prepare_backend("openvino", own, WindowShape(1, 2, (8, 8)), CPU)
    assert {each.filename for each in told} == {__file__}


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("name", list_networks())
def test_every_network_is_followed_through_a_small_example(name: str, spatial_dims: int) -> None:
    torch.manual_seed(0)
    sizes = []
    network = build_small(name, spatial_dims)
    # In a trace sizes are tensors.
    network.register_forward_hook(
        lambda module, inputs, _: sizes.append(tuple(int(n) for n in inputs[0].shape[2:]))
    )
    # Ten voxels at the coarsest level along one axis, three along the others.
    strides = network.total_stride
    size = tuple(s * n for s, n in zip(strides, (10, 3, 3), strict=False))
    shape = WindowShape(2, 2, size)
    runtime = prepare_backend("openvino", network, shape, CPU)
    divides = any(divisor > 1 for divisor in network.divisor)
    assert divides == (name not in ("unet_original", "unet_keras"))
    assert {*sizes} == {size, tuple(2 * s for s in strides) if divides else size}
    windows = torch.randn(2, 2, *size)
    torch.testing.assert_close(runtime(windows), network(windows), atol=1e-4, rtol=1e-3)


def test_what_a_network_does_to_odd_sizes_is_followed() -> None:
    shape = WindowShape(1, 2, (13, 11))
    for name in ("unet_original", "unet_keras"):
        network = build_small(name, 2)
        runtime = prepare_backend("openvino", network, shape, CPU)
        torch.testing.assert_close(runtime(shape.draw()), network(shape.draw()))


class Thirds(nn.Module):
    """A network of a user, which does another thing to sizes that three does not divide."""

    def __init__(self, **facts: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(facts["in_channels"], facts["out_channels"], 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = self.conv(image)
        return logits if image.shape[2] % 3 else 2 * logits


def test_networks_of_users_and_on_slices_are_followed_through_what_they_may_look_at() -> None:
    facts = {"spatial_dims": 2, "in_channels": 2, "out_channels": 3}
    own = build_own_network(Thirds, **facts).eval().requires_grad_(False)
    slices = SliceNetwork(build_small("unet", 2), slice_axis=1).eval()
    for network, size, example in (
        (own, (12, 10), (12, 10)),
        (own.network, (12, 10), (12, 10)),
        (slices, (24, 5, 12), (8, 5, 8)),
    ):
        shape = WindowShape(2, 2, size)
        assert backends._shrink(shape, network).size == example
        runtime = prepare_backend("openvino", network, shape, CPU)
        torch.testing.assert_close(
            runtime(shape.draw()), network(shape.draw()), atol=1e-5, rtol=1e-3
        )


def test_a_runtime_that_disagrees_is_refused(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(original: nn.Module, *_: object):
        return lambda windows: original(windows) * 1.1

    monkeypatch.setitem(backends._BUILDERS, "openvino", (build, ("cpu",)))
    with pytest.raises(MachineError, match=r"openvino differs from torch by 0\.\d+ of the logits"):
        prepare_backend("openvino", network, SHAPE, CPU)


def test_in_16_bits_a_voxel_may_differ_and_all_of_them_may_not(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a spread is small its rounding is large, which says nothing of the other voxels."""

    def move_a_voxel(logits: torch.Tensor) -> torch.Tensor:
        logits[0, 0, 3, 4, 5] += logits.std()
        return logits

    def prepare(spoil: Callable[[torch.Tensor], torch.Tensor], place: Place) -> None:
        def build(original: nn.Module, *_: object):
            return lambda windows: spoil(original(windows))

        monkeypatch.setitem(backends._BUILDERS, "openvino", (build, ("cpu",)))
        prepare_backend("openvino", network, SHAPE, place)

    halves = Place(torch.device("cpu"), torch.bfloat16)
    prepare(move_a_voxel, halves)
    for spoil, place in ((move_a_voxel, CPU), (lambda logits: logits * 1.1, halves)):
        with pytest.raises(MachineError, match="openvino differs from torch by"):
            prepare(spoil, place)


def test_agreement_is_remembered_with_the_weights(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compare, compared = backends._compare, []

    def watch(*arguments: object) -> float:
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


def test_a_runtime_follows_a_network_once(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    follow, followed = backends._follow, []
    monkeypatch.setattr(backends, "_follow", lambda *a: followed.append("") or follow(*a))
    windows = torch.randn(2, 1, 16, 16, 16)

    def compute(net: nn.Module = network) -> torch.Tensor:
        # The same digest whatever the weights, as of a file that was replaced meanwhile.
        (runtime,), _ = prepare_backends("openvino", (net,), SHAPE, CPU, weights="a")
        return runtime(windows)

    expected = compute()
    assert torch.equal(compute(), expected)
    assert len(followed) == 1
    other = copy.deepcopy(network)
    next(other.parameters()).mul_(2)
    torch.testing.assert_close(compute(other), other(windows), atol=1e-4, rtol=1e-4)
    assert len(followed) == 2
    # What is broken is made again.
    for suffix in (".bin", ".xml", ".sha256"):
        for path in tmp_path.rglob(f"network{suffix}"):
            path.write_bytes(b"\xff" + path.read_bytes()[1:])
        before = len(followed)
        assert torch.equal(compute(), expected)
        assert torch.equal(compute(), expected)
        assert len(followed) == before + 1


class Twice(nn.Module):
    """A network whose code may be changed without its weights."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return 2 * windows.sum(1, keepdim=True)


def make_own(kind: str, network: nn.Module) -> nn.Module:
    if kind == "class":
        return Twice()
    if kind == "function":
        facts = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}
        return build_own_network(lambda **_: nn.Sequential(nn.Conv3d(1, 3, 1)), **facts).eval()
    changed = copy.deepcopy(network)
    changed.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    return changed


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells where files are mapped")
def test_the_file_of_the_weights_is_not_held_beside_the_program(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = []

    def look(path: Path) -> None:
        sizes = [end - start for start, end in allocation._find_mapped(path)]
        found.append((sizes, path.stat().st_size))

    monkeypatch.setattr(backends, "give_back_mapped", look)
    prepare_backend("openvino", network, SHAPE, CPU)
    # OpenVINO has mapped all of it.
    ((sizes, size),) = found
    assert sum(sizes) >= size


@pytest.mark.parametrize("kind", ["class", "function", "hook"])
def test_a_network_of_unknown_code_is_not_kept(
    kind: str, network: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = make_own(kind, network)
    assert prepare_backends("openvino", (own,), SHAPE, CPU, weights="a")[1] == "openvino"
    assert not list(tmp_path.rglob("network*"))


def test_all_code_that_makes_what_is_kept_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert remembered._hash_code() == remembered._hash_code()
    read = Path.read_bytes
    found = {remembered._hash_code()}
    for changed in ("unet.py", "layers.py", "backends.py"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda p, c=changed: read(p) + b"#" * (p.name == c))
            found.add(remembered._hash_code())
    assert len(found) == 4


def test_a_network_that_cannot_be_kept_is_followed_each_time(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("openvino.save_model", fail)
    for _ in range(2):
        assert prepare_backends("openvino", (network,), SHAPE, CPU, weights="a")[1] == "openvino"
    assert not list(tmp_path.rglob("network*"))


CHANGES = {
    "volseg": ("volseg.inference.remembered.__version__", "9"),
    "torch": ("torch.__version__", "9"),
    "runtime": ("openvino.__version__", "9"),
    "processor": ("volseg.inference.remembered._name_cpu", lambda: "another one"),
    "threads": ("torch.get_num_threads", lambda: 99),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_measured_by_other_versions_or_processors_is_measured_anew(
    change: str, network: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def note(what: str, value: float) -> Callable[..., float]:
        return lambda *_: calls.append(what) or value

    monkeypatch.setattr(backends, "_measure", note("speed", 0.5))
    monkeypatch.setattr(backends, "_compare", note("agreement", 0.0))
    # A runtime that is there at once.
    monkeypatch.setitem(backends._BUILDERS, "openvino", (lambda n, *_: n, ("cpu",)))
    monkeypatch.setattr(backends, "choose_fastest", lambda device: torch.bfloat16)
    monkeypatch.setattr(
        backends, "compute_logits", lambda *_: calls.append("labels") or torch.zeros(2, 3, 1)
    )

    def prepare() -> list[str]:
        calls.clear()
        choose_precision("auto", (network,), SHAPE, CPU.device, weights="a")
        prepare_backends("auto", (network,), SHAPE, CPU, weights="a")
        return sorted({*calls})

    assert prepare() == ["agreement", "labels", "speed"]
    assert prepare() == []
    monkeypatch.setattr(*CHANGES[change])
    everything = ["agreement", "labels", "speed"]
    assert prepare() == [what for what in everything if (change, what) != ("runtime", "labels")]


def test_torch_answers_before_a_runtime_is_built(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, asked = [], []

    def build(original: nn.Module, *_: object):
        built.append(len(asked))
        return lambda windows: original(windows)

    monkeypatch.setitem(backends._BUILDERS, "openvino", (build, ("cpu",)))
    ask = backends._ask_torch
    monkeypatch.setattr(backends, "_ask_torch", lambda *a: asked.append("asked") or ask(*a))
    prepare_backend("openvino", network, SHAPE, CPU)
    assert built == [1]


def test_a_runtime_that_gives_nan_is_refused(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(original: nn.Module, *_: object):
        return lambda windows: original(windows) * torch.nan

    monkeypatch.setitem(backends._BUILDERS, "openvino", (build, ("cpu",)))
    with pytest.raises(MachineError, match="differs from torch by nan"):
        prepare_backend("openvino", network, SHAPE, CPU)


@pytest.mark.parametrize("allowed", [float("inf"), float("nan")])
def test_a_runtime_is_refused_where_torch_has_no_answer(allowed: float) -> None:
    """As in 16 bits that cannot hold its logits."""
    logits = torch.randn(1, 2, 4, 4, 4)
    answer = backends._Answer(logits, logits.clone(), allowed, is_rounded=True)
    with pytest.raises(MachineError, match="openvino differs from torch by 0"):
        backends._compare("openvino", lambda windows: windows, answer)


def test_what_is_not_there_is_refused(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(original: nn.Module, *_: object):
        raise ImportError("No module named 'openvino'")

    monkeypatch.setitem(backends._BUILDERS, "openvino", (missing, ("cpu",)))
    with pytest.raises(MachineError, match=r"pip install volseg\[openvino\]"):
        prepare_backend("openvino", network, SHAPE, CPU)
    with pytest.raises(MachineError, match="--backend tensorrt on cpu; expected cuda"):
        prepare_backend("tensorrt", network, SHAPE, CPU)


def test_a_runtime_without_tensorrt_says_what_to_install(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = []

    class Session:
        """That of the package onnxruntime, which passes over what it has not."""

        def __init__(self, program: bytes, options: object, providers: list[object]) -> None:
            given.extend(providers)

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    with pytest.raises(MachineError, match=r"pip install volseg\[tensorrt\]` in an environment w"):
        backends._build_tensorrt(network, SHAPE, CPU)
    # What is built is kept beside what was measured, for these weights alone.
    folders = [Path(given[0][1]["trt_engine_cache_path"])]
    assert given[0][1]["trt_engine_cache_enable"]
    assert folders[0].is_dir()
    assert folders[0].parent == tmp_path / "volseg"
    given.clear()
    other = copy.deepcopy(network)
    next(other.parameters()).mul_(2)
    for each in (other, network):
        with pytest.raises(MachineError):
            backends._build_tensorrt(each, SHAPE, CPU)
        folders.append(Path(given.pop(0)[1]["trt_engine_cache_path"]))
        given.clear()
    assert folders[0] == folders[2] != folders[1]


def test_a_choice_has_a_name(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backends, "_measure", lambda *_: 0.5)
    assert prepare_backends("auto", (network,), SHAPE, CPU)[1] == "openvino"
    assert prepare_backends("onnxruntime", (network,), SHAPE, CPU)[1] == "onnxruntime"


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
    assert prepare_backends("auto", (other,), SHAPE, CPU) == ((other,), "torch")
    assert "torch computes the network: openvino cannot take" in caplog.text
    # One that goes well beside one that does not.
    monkeypatch.setattr(backends, "_measure", lambda *_: 0.5)
    caplog.clear()
    assert prepare_backends("auto", (network, other), SHAPE, CPU) == ((network, other), "torch")
    assert caplog.records[-1].levelname == "WARNING"


def test_the_choice_is_measured_once(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def measure(*arguments: object) -> float:
        calls.append(arguments)
        return 0.5

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
    written.write_text(json.dumps(dict.fromkeys(known, 0.99)))
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
    monkeypatch.setattr(backends, "_measure", lambda *_: 0.5)
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
