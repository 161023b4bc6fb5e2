"""What a network consists of and how it is wired, found by running it on tensors without values.

The result is what a drawing needs; it has the grain of a paper's figure, not of single layers.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from volseg.networks.network import SegmentationNetwork

_STEPS: dict[str, dict[str, int]] = {
    "conv": {"stride": 3},
    "conv_transpose": {"stride": 3},
    "max_pool": {"stride": 2, "kernel_size": 1},
    "avg_pool": {"stride": 2, "kernel_size": 1},
    "interpolate": {"scale_factor": 2},
}
"""Functions of torch that change the resolution: the argument that says how much, or the one behind
it where that is not given, and its place."""
_UPWARDS = ("conv_transpose", "interpolate")
"""Those that multiply sizes."""


@dataclass(frozen=True)
class Block:
    """A part of a network, the image, or a place where features meet.

    Attributes:
        name: of the module in the network; ``"image"``; empty for a join.
        kind: class of the module, or of what a plain container holds; ``"image"`` or ``"join"``.
        channels: of its output.
        size: of its output, voxels per axis.
        stride: per axis, voxels of the image per voxel of its output.
        join: how several inputs meet in it, by the name of the function (``"cat"``, ``"add"``);
            empty for one input.
    """

    name: str
    kind: str
    channels: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    join: str = ""


@dataclass(frozen=True)
class Edge:
    """Features on their way from block `source` to block `target`, by index.

    Attributes:
        source: gives them.
        target: takes them.
        stride: theirs as they leave the source; other than the source's own where a block gives
            intermediate features too.
    """

    source: int
    target: int
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """Blocks in order of execution, the image first; `outputs` are those that give logits."""

    blocks: tuple[Block, ...]
    edges: tuple[Edge, ...]
    outputs: tuple[int, ...]


def trace_structure(network: SegmentationNetwork, size: Sequence[int]) -> Structure:
    """Find the blocks of a network in training mode, and which takes what from which.

    A block is a part as far outside as possible that holds convolutions. A part that gives a list
    of feature maps is looked into. Pooling and interpolation belong to the way between two blocks,
    and so does a part of a single strided or transposed convolution from which one block alone
    takes. Where features meet outside of any block there is a join, unless one block alone takes
    what comes out, as it is: then they meet in that block. Convolutions, max and average pooling
    and interpolation change strides; padding and cropping change sizes alone.

    Args:
        network: stays as it is.
        size: of the image, voxels per axis.

    Raises:
        ConfigError: a size that the network cannot take.

    >>> from volseg.networks import UNet
    >>> structure = trace_structure(UNet(2, 1, 2, channels=(8, 16)), (32, 32))
    >>> [(block.name, block.channels) for block in structure.blocks[1:]]
    [('encoder.levels.0', 8), ('encoder.levels.1', 16), ('decoder.0', 8), ('heads.0', 2)]
    >>> [(edge.source, edge.target) for edge in structure.edges]
    [(0, 1), (1, 2), (2, 3), (1, 3), (3, 4)]
    """
    shadow = copy.deepcopy(network).to("meta").train()
    # Two images, since a normalisation may refuse a single value in training.
    image = torch.zeros(2, network.in_channels, *size, device="meta")
    makers = _find_list_makers(shadow, image)
    tracer = _Tracer(image)
    for name, module in shadow.named_modules():
        if name and module not in makers and _find_convs(module):
            module.register_forward_pre_hook(functools.partial(tracer.enter, name))
            module.register_forward_hook(tracer.leave)
    with torch.no_grad(), tracer:
        logits = shadow(image)
    return tracer.finish(_find_tensors(logits))


class _Tracer(TorchFunctionMode):
    """Follows every tensor from function to function and notes where it enters a block."""

    def __init__(self, image: torch.Tensor) -> None:
        super().__init__()
        self.spatial_dims = image.dim() - 2
        ones = (1,) * self.spatial_dims
        self.blocks = [Block("image", "image", image.shape[1], tuple(image.shape[2:]), ones)]
        self.edges: dict[Edge, None] = {}
        self.ways: set[int] = set()
        self.current: nn.Module | None = None
        # With the tensors themselves, so that no identity is given away twice.
        self.origins = {id(image): (image, _Origin(0, ones, (0, ones)))}

    def enter(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.current is None:
            self.current = module
            self.ways |= {len(self.blocks)} if _is_way(module) else set()
            self.blocks.append(Block(name, _name_kind(module), 0, (), ()))

    def leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self.current is not module:
            return
        self.current = None
        for tensor in reversed(_find_tensors(output)):
            self._leave_block(tensor, self.origins[id(tensor)][1].stride)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sources = [tensor for tensor in _find_tensors(args) if id(tensor) in self.origins]
        results = _find_tensors(result)
        if sources and results:
            name = func.__name__.strip("_")
            steps = _read_steps(name, args, kwargs or {}, self.spatial_dims)
            self._follow(name, steps, sources, results)
        return result

    def finish(self, logits: list[torch.Tensor]) -> Structure:
        outputs = dict.fromkeys(self.origins[id(tensor)][1].block for tensor in logits)
        structure = Structure(tuple(self.blocks), tuple(self.edges), tuple(outputs))
        return _absorb_joins(_absorb_ways(structure, self.ways))

    def _match_size(
        self, stride: tuple[int, ...], before: torch.Tensor, after: torch.Tensor
    ) -> tuple[int, ...]:
        """Stride behind interpolation to a given size: that of the last features of this size."""
        for tensor, origin in reversed(self.origins.values()):
            if tensor.shape[2:] == after.shape[2:]:
                return origin.stride
        sizes = zip(stride, before.shape[2:], after.shape[2:], strict=True)
        return tuple(round(s * a / b) for s, a, b in sizes)

    def _follow(
        self,
        function: str,
        steps: Sequence[float] | None,
        sources: list[torch.Tensor],
        results: list[torch.Tensor],
    ) -> None:
        origins = [self.origins[id(tensor)][1] for tensor in sources]
        stride = tuple(min(axis) for axis in zip(*(o.stride for o in origins), strict=True))
        if steps is None:
            stride = self._match_size(stride, sources[0], results[0])
        else:
            stride = tuple(round(s * step) for s, step in zip(stride, steps, strict=True))
        entries = {origin.entry for origin in origins}
        is_outside, meets = self.current is None, len(entries) > 1
        if is_outside and meets:
            self.blocks.append(Block("", "join", 0, (), ()))
        if is_outside and not meets:
            origin = replace(origins[0], stride=stride)
        else:
            block = len(self.blocks) - 1
            if meets and not self.blocks[block].join:
                self.blocks[block] = replace(self.blocks[block], join=function)
            for source, left in (origin.entry for origin in origins if origin.block != block):
                self.edges[Edge(source, block, left)] = None
            origin = _Origin(block, stride, (block, stride) if meets else entries.pop())
        self.origins |= {id(tensor): (tensor, origin) for tensor in results}
        if is_outside and meets:
            self._leave_block(results[0], stride)

    def _leave_block(self, output: torch.Tensor, stride: tuple[int, ...]) -> None:
        block = len(self.blocks) - 1
        channels, *size = output.shape[1:]
        self.blocks[block] = replace(
            self.blocks[block], channels=channels, size=tuple(size), stride=stride
        )
        self.origins[id(output)] = (output, _Origin(block, stride, (block, stride)))


@dataclass(frozen=True)
class _Origin:
    """Of a tensor: the block it was made in, its stride, and where all of it entered that from.

    An entry is a block outside with the stride at which the features left it; the block itself
    where those of several have met, or behind it.
    """

    block: int
    stride: tuple[int, ...]
    entry: tuple[int, tuple[int, ...]]


def _absorb_ways(structure: Structure, ways: set[int]) -> Structure:
    """Leave out ways from a block to another; what begins at the image or forks stays."""
    into = {edge.target: edge for edge in structure.edges if edge.target in ways}
    passed = {
        index: into[index]
        for index in ways
        if into[index].source > 0 and len(_find_targets(structure, index)) == 1
    }
    edges: dict[Edge, None] = {}
    for edge in structure.edges:
        target, start = edge.target, edge
        while start.source in passed:
            start = passed[start.source]
        if target not in passed:
            edges[Edge(start.source, target, start.stride)] = None
    kept = [index for index in range(len(structure.blocks)) if index not in passed]
    return _keep(replace(structure, edges=tuple(edges)), kept)


def _absorb_joins(structure: Structure) -> Structure:
    """Give joins to the block behind them where there is only one, of the same resolution."""
    blocks, takers = [*structure.blocks], {}
    for index, block in enumerate(blocks):
        targets = _find_targets(structure, index)
        if block.kind == "join" and len(targets) == 1:
            behind = blocks[targets[0]]
            if behind.kind != "join" and behind.stride == block.stride and not behind.join:
                takers[index] = targets[0]
                blocks[targets[0]] = replace(behind, join=block.join)
    edges = (
        replace(edge, target=takers.get(edge.target, edge.target))
        for edge in structure.edges
        if edge.source not in takers
    )
    kept = [index for index in range(len(blocks)) if index not in takers]
    return _keep(Structure(tuple(blocks), tuple(edges), structure.outputs), kept)


def _find_targets(structure: Structure, index: int) -> list[int]:
    return [edge.target for edge in structure.edges if edge.source == index]


def _keep(structure: Structure, kept: list[int]) -> Structure:
    """The same with these blocks alone, to which all edges lead."""
    edges = (
        Edge(kept.index(edge.source), kept.index(edge.target), edge.stride)
        for edge in structure.edges
    )
    outputs = (kept.index(index) for index in structure.outputs)
    return Structure(tuple(structure.blocks[i] for i in kept), tuple(edges), tuple(outputs))


def _find_list_makers(network: nn.Module, image: torch.Tensor) -> set[nn.Module]:
    found: set[nn.Module] = set()

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, list):
            found.add(module)

    hooks = [module.register_forward_hook(look) for module in network.modules()]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return found


def _find_convs(module: nn.Module) -> list[_ConvNd]:
    return [part for part in module.modules() if isinstance(part, _ConvNd)]


def _is_way(module: nn.Module) -> bool:
    """Whether nothing but a convolution that changes the resolution is in it."""
    convs = _find_convs(module)
    resamples = isinstance(convs[0], _ConvTransposeNd) or max(convs[0].stride) > 1
    return len(convs) == 1 and resamples


def _name_kind(module: nn.Module) -> str:
    """Class of the module; of a plain container, that of the first part with convolutions."""
    while type(module) is nn.Sequential:
        module = next(part for part in module if _find_convs(part))
    return type(module).__name__


def _find_tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _find_tensors(part)]


def _read_steps(
    function: str, args: Sequence[Any], kwargs: Mapping[str, Any], spatial_dims: int
) -> tuple[float, ...] | None:
    """Voxels of its input per voxel of its output, per axis; None where a size is asked for."""
    kind = re.sub(r"[123]d$", "", function)
    if kind not in _STEPS:
        return (1,) * spatial_dims
    given = (
        kwargs.get(name, args[place] if place < len(args) else None)
        for name, place in _STEPS[kind].items()
    )
    value = next((value for value in given if value), None)
    if kind == "interpolate" and value is None:
        return None
    steps = tuple(value) if isinstance(value, Sequence) else (value or 1,) * spatial_dims
    return tuple(1 / step for step in steps) if kind in _UPWARDS else steps
