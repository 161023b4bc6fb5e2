"""Weights of ImageNet ResNets for `ResNetUNet`, as far as the two structures agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def load_resnet(network: ResNetUNet, path: Path, blocks: Sequence[int]) -> PretrainedReport:
    """Copy a torchvision ResNet's weights into the encoder of `network`.

    Convolutions go one to one. A post-activation ResNet normalises behind each convolution, this
    encoder in front of the next one: all norms but the last of each unit have a counterpart. 2D
    kernels are inflated to 3D along the axis where the kernel is 1, or else the last, with their
    sum kept (Carreira and Zisserman, 2017, doi 10.1109/CVPR.2017.502); for images of other than
    three channels the first convolution's kernels are averaged over channels, with their sum kept.

    Args:
        network: changed in place, or left as it is if the file is refused.
        path: state dict with torchvision's names, of the same depth.
        blocks: units per stage of a ResNet of this depth.

    Raises:
        DataError: the file cannot be read, holds more than tensors, or is of another depth or
            width.
    """
    state = _read(path)
    found: dict[str, tuple[str, torch.Tensor, torch.Tensor]] = {}
    for source, name, tensor in _places(network):
        value = _adapt(state[source], tensor.shape) if source in state else None
        if value is not None:
            found[source] = (name, tensor, value)
    # Statistics without the convolution that they are of would be wrong.
    found = {source: place for source, place in found.items() if _convolution(source) in found}
    stages: Any = network.stages
    expected = [count * len(stages[0].first.convs) for count in blocks]
    if _count_convs(state) != expected:
        raise DataError(
            f"{path} does not fit; expected the state dict of a torchvision ResNet-{network.depth}."
        )
    # The first unit's other convolution also sees the stem, whose width may be its own.
    if (name := "layer1.0.conv2.weight") not in found:
        has = list(state[name].shape) if name in state else "no such tensor"
        wants = list(stages[0].first.convs[1].conv.weight.shape)
        raise DataError(
            f"{path} does not fit: {name} is {has}; expected {wants}. Give the network the widths "
            "and kernels of the file."
        )
    with torch.no_grad():
        for _, tensor, value in found.values():
            tensor.copy_(value)
    return _report(network, path, state, found)


def _report(
    network: ResNetUNet,
    path: Path,
    state: dict[str, torch.Tensor],
    found: dict[str, tuple[str, torch.Tensor, torch.Tensor]],
) -> PretrainedReport:
    same = {
        source for source, (_, tensor, _) in found.items() if state[source].shape == tensor.shape
    }
    taken = {name for name, _, _ in found.values()}
    encoder = (
        name
        for name, _ in network.named_parameters()
        if name.startswith(("stem.", "stages.", "final."))
    )
    return PretrainedReport(
        path,
        loaded=tuple(source for source in found if source in same),
        adapted=tuple(source for source in found if source not in same),
        unused=tuple(key for key in state if key not in found and "num_batches" not in key),
        fresh=tuple(name for name in encoder if name not in taken),
    )


def _convolution(source: str) -> str:
    """The convolution whose output an entry is about; itself if it is of one."""
    place, _, _ = source.rpartition(".")
    return f"{place.replace('bn', 'conv')}.weight" if "bn" in place else f"{place}.weight"


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; expected a state dict.") from None
    except Exception as error:  # What torch raises on a strange file depends on its first bytes.
        raise DataError(
            f"{path} cannot be loaded as plain tensors; expected what torch.save writes for a "
            "state dict. Save it again with `torch.save(model.state_dict(), path)`."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise DataError(f"{path} is no state dict; expected names with tensors.")
    return state


def _count_convs(state: dict[str, torch.Tensor]) -> list[int]:
    """Per stage; no two depths have the same."""
    return [
        sum(key.startswith(f"layer{stage}.") and ".conv" in key for key in state)
        for stage in (1, 2, 3, 4)
    ]


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
        # A kernel of 1 lies across the planes that the weights are for.
        axis = next((axis for axis in (2, 3) if shape[axis] == 1), 4)
        copies = [-1] * len(shape)
        copies[axis] = shape[axis]
        value = value.unsqueeze(axis).expand(copies) / shape[axis]
    if value.dim() >= 4 and value.shape[1] == 3 and value.shape[1] != shape[1]:
        value = value.sum(1, keepdim=True).expand(-1, shape[1], *value.shape[2:]) / shape[1]
    return value if value.shape == shape else None


def _shorten(names: tuple[str, ...], most: int = 3) -> str:
    shown = ", ".join(names[:most]) or "none"
    return shown if len(names) <= most else f"{shown}, ..."
