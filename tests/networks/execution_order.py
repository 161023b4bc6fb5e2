"""Weights by order of execution, so that networks without a common name can be compared.

An owner is a module with tensors of its own. Owners are counted in the order in which they first
run; a module that runs twice is one owner and two calls, which is how shared weights show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Run:
    """What one forward pass did."""

    owners: list[nn.Module]
    calls: list[int]
    outputs: list[torch.Tensor]


def run(network: nn.Module, image: torch.Tensor) -> Run:
    """Run in the mode that the network is in, without gradient."""
    places: dict[nn.Module, int] = {}
    calls: list[int] = []

    def note(module: nn.Module, _: object) -> None:
        calls.append(places.setdefault(module, len(places)))

    hooks = [m.register_forward_pre_hook(note) for m in network.modules() if own_tensors(m)]
    with torch.no_grad():
        outputs = network(image)
    for hook in hooks:
        hook.remove()
    return Run([*places], calls, outputs if isinstance(outputs, list) else [outputs])


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, then buffers; counters are left out."""
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None and tensor.dim()}


def eval_all_heads_(network: nn.Module) -> nn.Module:
    """Nothing is random, and yet all outputs that training has are given."""
    network.eval()
    network.training = True
    return network


@torch.no_grad()
def fill_(owners: list[nn.Module], gain: float = 1.0) -> None:
    """Values that depend on nothing but the place of an owner and the shapes of its tensors."""
    for place, owner in enumerate(owners):
        generator = torch.Generator().manual_seed(1000 + place)
        for name, tensor in own_tensors(owner).items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(_values(owner, name, noise, gain))


@torch.no_grad()
def copy_weights_(source: Run, target: Run) -> None:
    """Owner by owner; both must have run alike."""
    assert source.calls == target.calls
    for theirs, ours in zip(source.owners, target.owners, strict=True):
        theirs, ours = own_tensors(theirs), own_tensors(ours)
        assert {n: t.shape for n, t in theirs.items()} == {n: t.shape for n, t in ours.items()}
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])


def _values(owner: nn.Module, name: str, noise: torch.Tensor, gain: float) -> torch.Tensor:
    if name == "running_var":
        return 1 + 0.25 * noise.abs()
    if noise.dim() == 1:
        return (1 if name == "weight" else 0) + 0.1 * noise
    fan_in = noise[0].numel()
    if isinstance(owner, TRANSPOSED):
        fan_in = noise.shape[0] * math.prod(noise.shape[2:]) / math.prod(owner.stride)
    return gain * noise * math.sqrt(2 / fan_in)
