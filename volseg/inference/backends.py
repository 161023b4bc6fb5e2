"""What computes a network, and in which number format.

That is torch, or a runtime that makes a program of its own from the network. A runtime is compared
with torch on noise before it is used, and refused with the figure if it gives something else; 16
bits are taken only where they give the labels of float32. Nothing falls back silently.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import math
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from volseg.allocation import give_back_mapped
from volseg.atomic import atomic_folder, remove_temporary
from volseg.errors import MachineError
from volseg.inference.members import Network, compute_logits
from volseg.inference.precision import PrecisionName, choose_fastest
from volseg.inference.remembered import (
    describe_network,
    keep,
    make_folder,
    make_key,
    make_network_key,
    recall,
    remember,
)
from volseg.networks import SegmentationNetwork
from volseg.networks.weights import hash_file

logger = logging.getLogger(__name__)

BackendName = Literal["auto", "torch", "openvino", "onnxruntime", "tensorrt"]

TOLERANCE = 5e-3
"""Difference to torch at most, as a share of the logits' spread. Rounding makes up 1e-5 of it, and
convolutions by transformed tiles (Winograd) of random weights 2e-3."""
SAME_LABELS = 0.995
"""Share of the voxels of noise whose class 16 bits must not change. Trained networks keep more than
0.999 there, and 0.9998 on images; a network whose scores are close together everywhere does not."""
_HALVES = 2.0
"""In 16 bits a runtime may differ by so many times what torch differs by in them besides."""
_ROUNDS = 3
_WORTH_IT = 0.95
"""A runtime is chosen if it takes at most this share of torch's time."""


@dataclass(frozen=True)
class WindowShape:
    """What a runtime is built for: windows ``(at_once, channels, *size)``."""

    at_once: int
    channels: int
    size: tuple[int, ...]

    def draw(self) -> Tensor:
        """Noise of this shape, always the same."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn((self.at_once, self.channels, *self.size), generator=generator)


@dataclass(frozen=True)
class Place:
    """Where windows are computed, and in which number format."""

    device: torch.device
    precision: torch.dtype = torch.float32


@torch.inference_mode()
def choose_precision(
    name: PrecisionName,
    networks: Sequence[nn.Module],
    shape: WindowShape,
    device: torch.device,
    *,
    weights: str,
    overlapping: bool = False,
) -> torch.dtype:
    """The number format of convolutions and the like; measured once for weights and a machine.

    Args:
        name: ``auto`` is what the device computes fastest, if the labels of noise stay the same.
        networks: in eval mode on `device`.
        shape: of the windows.
        device: where they are computed.
        weights: digest of the networks' weights.
        overlapping: whether outputs are regions (sigmoid) and not classes (softmax).
    """
    half = choose_fastest(device)
    if name == "float32" or half == torch.float32:
        return torch.float32

    def decide(logits: Tensor) -> Tensor:
        return logits > 0 if overlapping else logits.argmax(1)

    def measure() -> float:
        windows = shape.draw().to(device)
        pairs = (
            [decide(compute_logits(net, windows, p)) for p in (torch.float32, half)]
            for net in networks
        )
        return min(float((a == b).float().mean()) for a, b in pairs)

    place = Place(device, half)
    key = _make_key(networks[0], shape, place, "precision", overlapping, weights)
    same = remember(key, measure)
    if same < SAME_LABELS:
        logger.info(
            "computed in float32: in 16 bits %.2f%% of the voxels of noise change their class",
            100 * (1 - same),
        )
        return torch.float32
    return half


def prepare_backends(
    name: BackendName,
    networks: Sequence[nn.Module],
    shape: WindowShape,
    place: Place,
    *,
    weights: str | None = None,
) -> tuple[tuple[Network, ...], BackendName]:
    """What computes windows of `shape` by the weights of several networks.

    Args:
        name: ``auto`` measures torch and OpenVINO on a CPU, if it is installed, and takes the
            faster one, if it takes all networks and agrees with torch; on a GPU it is torch.
        networks: in eval mode on the device of `place`.
        shape: of the windows; fewer at once are filled up.
        place: where the windows lie. torch itself is told its precision where it is called.
        weights: digest of the networks' weights, under which agreement with torch is remembered.

    Returns:
        One for each network, and what they are by name.

    Raises:
        MachineError: the runtime that was named is not installed, does not work on the device,
            cannot take a network, or disagrees with torch.
    """
    chosen = choose_backend(networks[0], shape, place) if name == "auto" else name
    try:
        prepared = tuple(
            prepare_backend(chosen, network, shape, place, weights and f"{number} of {weights}")
            for number, network in enumerate(networks)
        )
    except MachineError as error:
        if name != "auto":
            raise
        logger.warning("torch computes the network: %s", error)
        return tuple(networks), "torch"
    return prepared, chosen


def prepare_backend(
    name: BackendName,
    network: nn.Module,
    shape: WindowShape,
    place: Place,
    weights: str | None = None,
) -> Network:
    """What computes windows of `shape` by the weights of one network; see `prepare_backends`."""
    if name == "torch":
        return network
    _, devices = _BUILDERS[name]
    if place.device.type not in devices:
        raise MachineError(f"--backend {name} on {place.device}; expected {' or '.join(devices)}.")
    try:
        return _build(name, network, shape, place, weights)
    except MachineError:
        raise
    except ImportError as error:
        raise MachineError(
            f"--backend {name} needs a package that is not there ({error}). Install it with "
            f"`pip install volseg[{name}]`."
        ) from error
    except Exception as error:  # Runtimes have errors of their own, which share no other class.
        reason = str(error).partition("\n")[0]
        raise MachineError(
            f"{name} cannot take this network ({reason}). Use --backend torch."
        ) from error


def _build(
    name: BackendName, network: nn.Module, shape: WindowShape, place: Place, weights: str | None
) -> Network:
    """A runtime that agrees with torch, by what was found before for these weights or now.

    torch answers before the runtime is there, so that memory never holds the work of both.

    Raises:
        MachineError: they differ too much.
    """
    version = _find_version(name)
    facts = (network, shape, place, name, version, weights)
    key = None if weights is None else _make_key(*facts)
    is_known = key is not None and recall(key) is not None
    answer = None if is_known else _ask_torch(network, shape, place)
    candidate = _Filled(_BUILDERS[name][0](network, shape, place), shape.at_once)
    if answer is not None:
        difference = _compare(name, candidate, answer)
        if key is not None:
            keep(key, difference)
    return candidate


@dataclass(frozen=True, eq=False)
class _Answer:
    """What a runtime should give.

    Attributes:
        windows: of noise.
        logits: torch's in float32.
        allowed: difference to them at most, as a share of their spread.
        is_rounded: whether that is the root of the mean square, of the plane of voxels where it is
            largest, instead of the largest one. In 16 bits a single voxel says little: where
            normalisation meets a small spread, its rounding is many times that of the others.
    """

    windows: Tensor
    logits: Tensor
    allowed: float
    is_rounded: bool = False

    def differ(self, logits: Tensor) -> float:
        """Difference of others to these logits, as a share of the spread."""
        difference = (logits - self.logits).abs_()
        size = _find_plane(difference.square_()).sqrt() if self.is_rounded else difference.max()
        return float(size / self.logits.std())


def _find_plane(values: Tensor) -> Tensor:
    """The largest mean of ``(B, C, *S)`` over a plane of voxels, along any axis of `S`."""
    axes = range(values.ndim)
    means = [values.mean([a for a in axes if a != axis]).max() for axis in axes[2:]]
    return torch.stack(means).max()


@torch.inference_mode()
def _ask_torch(network: nn.Module, shape: WindowShape, place: Place) -> _Answer:
    windows = shape.draw().to(place.device)
    answer = _Answer(windows, network(windows).float(), TOLERANCE)
    if place.precision == torch.float32:
        return answer
    answer = replace(answer, is_rounded=True)
    halved = answer.differ(compute_logits(network, windows, place.precision))
    return replace(answer, allowed=TOLERANCE + _HALVES * halved)


@torch.inference_mode()
def _compare(name: BackendName, candidate: Network, answer: _Answer) -> float:
    """The difference to torch in float32, as a share of the logits' spread.

    Raises:
        MachineError: it is too large.
    """
    difference = answer.differ(candidate(answer.windows))
    # Where torch itself leaves the range of its 16 bits, everything would be allowed. A comparison
    # with nan is never true.
    if not (math.isfinite(answer.allowed) and difference <= answer.allowed):
        raise MachineError(
            f"{name} differs from torch by {difference:.2g} of the logits' spread; expected at "
            f"most {answer.allowed:.2g}. Use --backend torch."
        )
    return difference


def choose_backend(network: nn.Module, shape: WindowShape, place: Place) -> BackendName:
    """The fastest of torch and, on a CPU, OpenVINO; measured once for a network and a machine."""
    if place.device.type != "cpu" or not _has_openvino():
        return "torch"
    # How fast a network is does not depend on its weights.
    key = _make_key(network, shape, place, "choice", _find_version("openvino"))
    try:
        ratio = remember(key, lambda: _measure(network, shape, place))
    except MachineError as error:
        logger.info("torch computes the network: %s", error)
        return "torch"
    return "openvino" if ratio <= _WORTH_IT else "torch"


def _measure(network: nn.Module, shape: WindowShape, place: Place) -> float:
    """OpenVINO's time as a share of torch's, which is measured before OpenVINO takes memory."""
    windows = shape.draw()
    ours = _time(network, windows, place.precision)
    candidate = prepare_backend("openvino", network, shape, place)
    return _time(candidate, windows, place.precision) / ours


@torch.inference_mode()
def _time(network: Network, windows: Tensor, precision: torch.dtype) -> float:
    """Seconds for windows, the best of several."""
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        compute_logits(network, windows, precision)
        times.append(time.perf_counter() - start)
    return min(times)


def _make_key(network: nn.Module, shape: WindowShape, place: Place, *facts: object) -> str:
    """What a measurement of a network depends on."""
    described = describe_network(network)
    return make_key(place.device, described, shape, str(place.precision), *facts)


def _find_version(name: BackendName) -> str:
    return str(importlib.import_module(_MODULES[name]).__version__)


def _has_openvino() -> bool:
    try:
        import openvino  # noqa: F401
    except ImportError:
        return False
    return True


class _Filled:
    """Fills groups of windows up to the number that a runtime was built for."""

    def __init__(self, network: Network, at_once: int) -> None:
        self.network, self.at_once = network, at_once

    def __call__(self, windows: Tensor) -> Tensor:
        number = len(windows)
        if number < self.at_once:
            empty = windows.new_zeros((self.at_once - number, *windows.shape[1:]))
            windows = torch.cat([windows, empty])
        return self.network(windows)[:number]


class _OpenVino:
    """A network in OpenVINO, with as many threads as torch has.

    Args:
        network: in eval mode.
        shape: of the windows.
        place: the CPU and a precision.
    """

    def __init__(self, network: nn.Module, shape: WindowShape, place: Place) -> None:
        import openvino

        core = openvino.Core()
        model, weights = _read_or_follow(core, network, shape)
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if place.precision == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._compiled = core.compile_model(model, "CPU", settings)
        if weights is not None:
            # The program has them in the order and the format that it computes in.
            give_back_mapped(weights)
        # A request holds the memory of its results, so that every thread has its own.
        self._own = threading.local()

    def __call__(self, windows: Tensor) -> Tensor:
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        results = self._own.request.infer([windows.contiguous().numpy()], share_inputs=True)
        return torch.from_numpy(results[0])


_FOLLOWING = threading.Lock()
"""Filters of warnings and levels of loggers are those of the whole process."""
_KEPT = Path("openvino", "network.xml")
_LEFT_S = 3600.0
"""After so long a folder on its way is nobody's any more."""


def _read_or_follow(core: Any, network: nn.Module, shape: WindowShape) -> tuple[Any, Path | None]:
    """The network as OpenVINO has it, from where it was kept if it was; the file of its weights.

    To follow torch through it takes seconds, and memory that the process does not give back.
    """
    key = make_network_key(network, shape, "openvino", _find_version("openvino"))
    folder = None if key is None else make_folder(key)
    if folder is None:
        return _follow(network, shape), None
    kept = _read_kept(core, folder / _KEPT)
    if kept is None:
        followed = _follow(network, shape)
        _keep_followed(followed, folder / _KEPT)
        # What is compared with torch is what later processes read.
        kept = _read_kept(core, folder / _KEPT) or followed
    return kept, (folder / _KEPT).with_suffix(".bin")


def _follow(network: nn.Module, shape: WindowShape) -> Any:
    """The network for windows of `shape` as OpenVINO has it.

    It follows torch through an example, in float32 and with every feature map, and so through one
    as small as the network can be followed by; windows of `shape` are told to it afterwards.
    """
    import openvino

    example = _shrink(shape, network).draw()
    with _quiet():
        model = openvino.convert_model(network, example_input=example)
    model.reshape([shape.at_once, shape.channels, *shape.size])
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch says of itself and of other packages while it follows a network.

    It warns, too, of what is decided in Python, which is decided once and for all then. volseg
    looks at sizes alone, which stay those of the windows; of a user's code the warning shows.
    """
    exporter, root = logging.getLogger("torch.onnx"), logging.root
    with _FOLLOWING, warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        traced: type[Warning] = torch.jit.TracerWarning  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", category=traced, module=r"(torch|volseg)\.")
        levels = exporter.level, root.level
        exporter.setLevel(max(exporter.level, logging.ERROR))
        try:
            yield
        finally:
            exporter.setLevel(levels[0])
            # OpenVINO silences all warnings while it reads a network, and where it fails for good.
            root.setLevel(levels[1])


def _read_kept(core: Any, path: Path) -> Any:
    """What `_keep_followed` wrote, if it is there and whole; of a file it takes no copy."""
    try:
        digest = path.with_suffix(".sha256").read_bytes()
        return core.read_model(path) if digest == _hash_files(path) else None
    except (OSError, RuntimeError) as error:
        logger.debug("no network is kept (%s)", error)
        return None


def _keep_followed(model: Any, path: Path) -> None:
    """Write graph and weights, with their digest beside them, if there is room for it."""
    import openvino

    try:
        # Of one that is there something is broken, and one on its way was left by a kill.
        shutil.rmtree(path.parent, ignore_errors=True)
        remove_temporary(path.parent.parent, _LEFT_S)
        with atomic_folder(path.parent) as folder:
            openvino.save_model(model, folder / path.name, compress_to_fp16=False)
            digest = _hash_files(folder / path.name)
            (folder / path.name).with_suffix(".sha256").write_bytes(digest)
    except (OSError, RuntimeError, MachineError) as error:
        logger.info("OpenVINO follows the network anew next time (%s)", error)


def _hash_files(path: Path) -> bytes:
    """Of a graph and its weights."""
    return " ".join(hash_file(file) for file in (path, path.with_suffix(".bin"))).encode()


def _shrink(shape: WindowShape, network: nn.Module) -> WindowShape:
    """Windows that a network computes like those of `shape`: two voxels at its coarsest level.

    Along an axis that it does not divide, or of which it says nothing, it may pad or crop by what
    the size leaves over, and the size stays.
    """
    if not isinstance(network, SegmentationNetwork):
        return shape
    facts = zip(shape.size, network.divisor, network.total_stride, strict=True)
    sizes = (n if divisor == 1 else min(n, 2 * stride) for n, divisor, stride in facts)
    return replace(shape, size=tuple(sizes))


class _OnnxRuntime:
    """A network in ONNX Runtime."""

    def __init__(self, program: bytes, providers: Sequence[Any]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(program, options, providers=list(providers))
        wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
        if self._session.get_providers()[0] != wanted:
            raise MachineError(
                f"this ONNX Runtime has no {wanted}; expected the package onnxruntime-gpu and its "
                "libraries. Run `pip install volseg[tensorrt]` in an environment without the "
                "package onnxruntime, or use --backend torch."
            )
        self._input = self._session.get_inputs()[0].name

    def __call__(self, windows: Tensor) -> Tensor:
        array = windows.contiguous().cpu().numpy()
        (logits,) = self._session.run(None, {self._input: array})
        return torch.from_numpy(logits).to(windows.device)


def _to_onnx(network: nn.Module, shape: WindowShape) -> bytes:
    # Unlike OpenVINO's, this way through the network computes shapes alone.
    example = shape.draw().to(next(network.parameters()).device)
    with _quiet():
        program = torch.onnx.export(network, (example,), dynamo=True, verbose=False)
    if program is None:
        raise RuntimeError("torch could not export it to ONNX")
    return bytes(program.model_proto.SerializeToString())


def _build_onnxruntime(network: nn.Module, shape: WindowShape, place: Place) -> Network:
    # On a CPU it computes in float32 in any case.
    return _OnnxRuntime(_to_onnx(network, shape), ["CPUExecutionProvider"])


def _build_tensorrt(network: nn.Module, shape: WindowShape, place: Place) -> Network:
    # The package brings the libraries, which ONNX Runtime finds only once they are loaded.
    with contextlib.suppress(ImportError):
        import tensorrt  # noqa: F401
    gpu = {"device_id": place.device.index or 0}
    half = {
        "trt_fp16_enable": place.precision == torch.float16,
        "trt_bf16_enable": place.precision == torch.bfloat16,
    }
    program = _to_onnx(network, shape)
    options = gpu | half | _keep_engine(program, place)
    providers = [("TensorrtExecutionProvider", options), ("CUDAExecutionProvider", gpu)]
    return _OnnxRuntime(program, providers)


def _keep_engine(program: bytes, place: Place) -> dict[str, Any]:
    """Where TensorRT finds again what it has built from a network, which takes minutes."""
    # ONNX Runtime tells networks apart by their layers alone, not by their weights.
    version = _find_version("tensorrt")
    facts = (hashlib.sha256(program).hexdigest(), version, str(place.precision))
    folder = make_folder(make_key(place.device, *facts))
    if folder is None:
        return {}
    return {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(folder)}


_Builder = Callable[[nn.Module, WindowShape, Place], Network]
_BUILDERS: dict[str, tuple[_Builder, tuple[str, ...]]] = {
    "openvino": (_OpenVino, ("cpu",)),
    "onnxruntime": (_build_onnxruntime, ("cpu",)),
    "tensorrt": (_build_tensorrt, ("cuda",)),
}
_MODULES = {"openvino": "openvino", "onnxruntime": "onnxruntime", "tensorrt": "onnxruntime"}
