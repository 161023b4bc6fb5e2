"""Weights of ImageNet ResNets for `ResNetUNet`, as far as the two structures agree."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from volseg.errors import DataError

if TYPE_CHECKING:
    from volseg.networks.resnet_unet import ResNetUNet


@dataclass(frozen=True)
class PretrainedReport:
    """What became of a pretrained state dict.

    Attributes:
        source: the file.
        loaded: entries of the file that were taken as they are.
        adapted: entries that were inflated to 3D or brought to another number of channels.
        unused: entries of the file that have no place in the network.
        fresh: parameters of the network's encoder that the file says nothing of.
    """

    source: Path
    loaded: tuple[str, ...]
    adapted: tuple[str, ...]
    unused: tuple[str, ...]
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        """One line for a log."""
        return (
            f"pretrained weights from {self.source}: {len(self.loaded)} entries loaded, "
            f"{len(self.adapted)} adapted ({_shorten(self.adapted)}), {len(self.unused)} not used "
            f"({_shorten(self.unused)}), {len(self.fresh)} encoder parameters left as initialised "
            f"({_shorten(self.fresh)})"
        )


def load_resnet(network: ResNetUNet, path: Path) -> PretrainedReport:
    """Copy a torchvision ResNet's weights into the encoder of `network`.

    Convolutions go one to one. A post-activation ResNet normalises behind each convolution, this
    encoder in front of the next one: all norms but the last of each unit have a counterpart. 2D
    kernels are inflated to 3D along the last axis with their sum kept (Carreira and Zisserman,
    2017, doi 10.1109/CVPR.2017.502); for images of other than three channels the first
    convolution's kernels are averaged over channels, with their sum kept.

    Args:
        network: changed in place.
        path: state dict with torchvision's names, of the same depth.

    Raises:
        DataError: the file cannot be read, holds more than tensors, or is not of this depth.
    """
    state = _read(path)
    loaded: list[str] = []
    adapted: list[str] = []
    taken: set[str] = set()
    with torch.no_grad():
        for source, name, parameter in _places(network):
            if source not in state:
                continue
            value = _adapt(state[source], parameter.shape)
            if value is None:
                continue
            parameter.copy_(value)
            taken.add(name)
            same = state[source].shape == parameter.shape
            (loaded if same else adapted).append(source)
    if not any(name.startswith("layer1.") for name in loaded + adapted):
        raise DataError(
            f"{path} fits nowhere; expected the state dict of a torchvision ResNet-{network.depth}."
        )
    used = {*loaded, *adapted}
    encoder = (
        name
        for name, _ in network.named_parameters()
        if name.startswith(("stem.", "stages.", "final."))
    )
    return PretrainedReport(
        path,
        tuple(loaded),
        tuple(adapted),
        tuple(key for key in state if key not in used and "num_batches" not in key),
        tuple(name for name in encoder if name not in taken),
    )


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; expected a state dict.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise DataError(
            f"{path} cannot be loaded as plain tensors; expected what torch.save writes for a "
            "state dict. Save it again with `torch.save(model.state_dict(), path)`."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise DataError(f"{path} is no state dict; expected names with tensors.")
    return state


def _places(network: ResNetUNet) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Name in the file, name in the network, and the network's own tensor."""
    names = {id(module): name for name, module in network.named_modules()}
    for source, module in _modules(network):
        for entry in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(module, entry, None)
            if isinstance(tensor, torch.Tensor):
                yield f"{source}.{entry}", f"{names[id(module)]}.{entry}", tensor


def _modules(network: ResNetUNet) -> Iterator[tuple[str, nn.Module]]:
    stem: Any = network.stem[1]
    stages: Any = network.stages
    yield "conv1", stem.conv
    yield "bn1", getattr(stem, "norm", nn.Identity())
    for number, stage in enumerate(stages, start=1):
        for index, unit in enumerate([stage.first, *stage.units]):
            prefix = f"layer{number}.{index}"
            yield f"{prefix}.downsample.0", unit.projection
            yield f"{prefix}.conv1", unit.convs[0]
            for place, later in enumerate(list(unit.convs)[1:], start=1):
                yield f"{prefix}.bn{place}", getattr(later, "norm", nn.Identity())
                yield f"{prefix}.conv{place + 1}", later.conv


def _adapt(value: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    """Bring a 2D kernel to more axes or other input channels; None if that does not lead there."""
    if value.dim() >= 4 and len(shape) == value.dim() + 1:
        depth = shape[-1]
        value = value[..., None].expand(*value.shape, depth) / depth
    if value.dim() >= 4 and value.shape[1] == 3 and value.shape[1] != shape[1]:
        value = value.sum(1, keepdim=True).expand(-1, shape[1], *value.shape[2:]) / shape[1]
    return value if value.shape == shape else None


def _shorten(names: tuple[str, ...], most: int = 3) -> str:
    shown = ", ".join(names[:most]) or "none"
    return shown if len(names) <= most else f"{shown}, ..."
