"""From scores on the network's grid to classes on the grid of the source file.

Scores are interpolated before the classes are compared: the boundary then lies where two classes
are equal, between voxels of the coarser grid, which resampled labels could not say.

They come part by part along one axis, and nothing of the size classes x volume is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from volseg.data.cases import Classes
from volseg.data.content import Box
from volseg.data.preprocessing import Placement
from volseg.data.resampling import find_neighbours
from volseg.errors import MachineError
from volseg.inference.decoding import to_class_scores
from volseg.inference.uncertainty import UncertaintyName, entropy

_CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**28}
"""Of one class on the source's grid: what stays in a CPU's cache, or is enough work for a GPU."""
_BLOCK = 8
"""Voxels of the network's grid along the edge of a block in which a class is ruled out or not; but
along the axis of the parts as many as are decided on at a time."""


class NativeGrid:
    """A segmentation on the grid of its source, filled region by region.

    Interpolation is linear along each axis, and source and network share their outer voxel edges.

    Attributes:
        labels: label values ``(*source shape)``; background outside the content.
        probabilities: ``(K, *source shape)`` float32 of the classes, of which one is there, or of
            the regions, each of which may be; None unless asked for. Certain background outside.
        uncertainty: maps ``(*source shape)`` float16 from 0 to 1 by name.
    """

    def __init__(
        self,
        placement: Placement,
        classes: Classes,
        *,
        probabilities: bool = False,
        uncertainty: Sequence[UncertaintyName] = (),
    ) -> None:
        """Start with background everywhere.

        Args:
            placement: where the network's grid lies in its source.
            classes: of the model.
            probabilities: also interpolate the probability of each output of the network.
            uncertainty: also these maps. For disagreement the scores have a channel more.
        """
        self.placement, self.classes = placement, classes
        shape = placement.source.shape
        # In the order of files, whose first axis is the fastest: they are written without a copy.
        self.labels = np.full(shape, classes.values[0], classes.dtype, order="F")
        self.probabilities: NDArray[np.float32] | None = None
        if probabilities:
            certain = np.zeros((*shape, classes.num_outputs), np.float32, order="F")
            if not classes.regions:
                certain[..., 0] = 1
            self.probabilities = np.moveaxis(certain, -1, 0)
        self.uncertainty = {name: np.zeros(shape, np.float16, order="F") for name in uncertainty}

    @property
    def map_bytes(self) -> int:
        """Of what is kept besides the labels; the system gives it page by page as it is filled."""
        maps: list[NDArray[Any]] = list(self.uncertainty.values())
        if self.probabilities is not None:
            maps.append(self.probabilities)
        return sum(map_.nbytes for map_ in maps)

    def open(self, region: Box, axis: int) -> Filling:
        """Begin to fill the voxels of the source that lie between those of a region.

        Args:
            region: of the network's grid.
            axis: along which its scores follow each other.
        """
        sizes = zip(self.placement.shape, self.placement.box.shape, strict=True)
        lines, target = [], []
        for (source, result), start, length in zip(sizes, region.start, region.shape, strict=True):
            line, results = Line.between(source, result).within(start, start + length)
            lines.append(line)
            target.append(results)
        kept = self.probabilities
        return Filling(
            lines,
            self.classes,
            axis,
            self._content(self.labels)[tuple(target)],
            None if kept is None else self._content(kept)[(slice(None), *target)],
            {name: self._content(map_)[tuple(target)] for name, map_ in self.uncertainty.items()},
        )

    def _content(self, array: NDArray[Any]) -> NDArray[Any]:
        """The part of ``(..., *source shape)`` that the network has seen, its axes canonical."""
        canonical, _ = self.placement.source.to_canonical(array)
        place: tuple[Any, ...] = (..., *self.placement.box.slices)
        content: NDArray[Any] = canonical[place]
        return content


class Filling:
    """A region of a `NativeGrid`, which takes its scores part by part."""

    def __init__(
        self,
        lines: Sequence[Line],
        classes: Classes,
        axis: int,
        labels: NDArray[Any],
        probabilities: NDArray[np.float32] | None,
        uncertainty: Mapping[UncertaintyName, NDArray[np.float16]],
    ) -> None:
        """See `NativeGrid.open`; the arrays are views of what is filled."""
        self.lines, self.classes, self.axis = list(lines), classes, axis
        self.labels, self.probabilities, self.uncertainty = labels, probabilities, uncertainty
        self._taken = self._done = 0
        self._last: Tensor | None = None

    def add(self, scores: Tensor) -> None:
        """Bring the next scores ``(K, *part)`` to the source's grid, as far as they reach.

        A voxel between this part and the next one waits for that; the last row is kept for it.
        """
        dim, number = self.axis + 1, scores.shape[self.axis + 1]
        self.lines = [line.to(scores.device) for line in self.lines]
        if self._last is not None:
            self._reach(torch.cat([self._last, scores.narrow(dim, 0, 1)], dim), self._taken - 1)
        self._reach(scores, self._taken)
        self._taken += number
        self._last = scores.narrow(dim, number - 1, 1).clone()

    def _reach(self, scores: Tensor, first: int) -> None:
        """Fill what lies between the rows of `scores`, of which the first is number `first`."""
        line = self.lines[self.axis]
        end = int(torch.searchsorted(line.high, first + scores.shape[self.axis + 1]))
        row_bytes = 4 * self.labels.size // max(1, self.labels.shape[self.axis])
        size = max(1, _CHUNK_BYTES[scores.device.type] // max(1, row_bytes))
        for start in range(self._done, end, size):
            self._fill(scores, first, slice(start, min(start + size, end)))
        self._done = max(self._done, end)

    def _fill(self, scores: Tensor, first: int, rows: slice) -> None:
        """Decide on some rows of the source, all of them between those of `scores`."""
        lines, start = list(self.lines), int(self.lines[self.axis].low[rows.start])
        lines[self.axis] = along = lines[self.axis].cut(rows)
        scores = scores.narrow(self.axis + 1, start - first, along.sources)
        place = tuple(rows if axis == self.axis else slice(None) for axis in range(len(lines)))
        for target, values in self._list_maps(scores):
            target[place] = _interpolate(values, lines, _everywhere(lines)).cpu().numpy()
        scores = to_class_scores(scores[: self.classes.num_outputs], self.classes)
        self.labels[place] = self.classes.decode(_decide(scores, lines).cpu().numpy())

    def _list_maps(self, scores: Tensor) -> Iterator[tuple[NDArray[Any], Tensor]]:
        """Where maps besides the labels go, and their values ``(*S)`` on the network's grid."""
        outputs, is_overlapping = scores[: self.classes.num_outputs], bool(self.classes.regions)
        for name, target in self.uncertainty.items():
            is_entropy = name == "entropy"
            yield target, entropy(outputs, overlapping=is_overlapping) if is_entropy else scores[-1]
        if self.probabilities is not None:
            inside = outputs.sigmoid() if is_overlapping else outputs.softmax(0)
            yield from zip(self.probabilities, inside, strict=True)


@dataclass(frozen=True, eq=False)
class Line:
    """Linear interpolation along one axis: each result lies between two sources.

    Attributes:
        sources: their number.
        low: (N) index of the source below.
        high: (N) index of the source above, at most one more.
        share: (N) float32, of the source above.
        is_identity: whether every result is its own source.
        edges: first result of each block of sources, and the number of results.
        block: sources along the edge of a block in which a class is ruled out or not.
    """

    sources: int
    low: Tensor
    high: Tensor
    share: Tensor
    is_identity: bool
    edges: tuple[int, ...] = ()
    block: int = _BLOCK

    @classmethod
    def between(cls, sources: int, results: int) -> Line:
        """From a number of voxels to another with the same outer edges."""
        return cls(sources, *find_neighbours(sources, results), sources == results)

    def within(self, start: int, stop: int) -> tuple[Line, slice]:
        """The same from the sources from `start` to `stop` alone, and which results it gives."""
        first = int(torch.searchsorted(self.low, start))
        end = max(first, int(torch.searchsorted(self.high, stop)))
        kept = slice(first, end)
        low, high = self.low[kept] - start, self.high[kept] - start
        blocks = torch.arange(0, stop - start + _BLOCK, _BLOCK)
        edges = tuple(torch.searchsorted(low, blocks).tolist())
        return Line(stop - start, low, high, self.share[kept], self.is_identity, edges), kept

    def cut(self, results: slice) -> Line:
        """The same for some results and the sources that they lie between, as a single block."""
        low, high = self.low[results], self.high[results]
        start, number = int(low[0]), int(high[-1] - low[0]) + 1
        return replace(
            self,
            sources=number,
            low=low - start,
            high=high - start,
            share=self.share[results],
            edges=(0, len(low)),
            block=number,
        )

    def to(self, device: torch.device) -> Line:
        """With its tensors on `device`."""
        low, high, share = (tensor.to(device) for tensor in (self.low, self.high, self.share))
        return replace(self, low=low, high=high, share=share)

    def apply(self, array: Tensor, dim: int, results: slice, offset: int = 0) -> Tensor:
        """Some results along a dimension of `array`, whose first source is number `offset`."""
        if self.is_identity:
            return array.narrow(dim, results.start - offset, results.stop - results.start)
        low, high = (array.index_select(dim, i[results] - offset) for i in (self.low, self.high))
        return torch.lerp(low, high, self.share[results].view(-1, *[1] * (array.dim() - dim - 1)))


@dataclass(frozen=True)
class _Part:
    """Where a class may win: voxels of the network's grid, and those of the source among them."""

    sources: tuple[slice, ...]
    results: tuple[slice, ...]


def _decide(scores: Tensor, lines: Sequence[Line]) -> Tensor:
    """Class with the largest interpolated score per voxel, of scores ``(K, *S)``.

    A running maximum: on a CPU several times faster than argmax over a channel axis, and it never
    holds more than one class at full size. Ties go to the class that comes first. Each class is
    interpolated only in a part outside of which another one is larger whatever lies between.
    """
    shape = [len(line.low) for line in lines]
    best = torch.full(shape, -math.inf, device=scores.device)
    dtype = torch.uint8 if len(scores) <= 256 else torch.int16
    winner = torch.zeros(shape, dtype=dtype, device=scores.device)
    for index, part in _find_candidates(scores, lines):
        values = _interpolate(scores[index], lines, part)
        here = best[part.results]
        winner[part.results].masked_fill_(values > here, index)
        torch.maximum(here, values, out=here)
    if best.numel() and not _is_finite(best):
        raise MachineError(
            "the network gives scores that are not finite; expected numbers. Try --precision "
            "float32, and look for extreme intensities in the image."
        )
    return winner


def _is_finite(values: Tensor) -> bool:
    """Whether all are finite, in one pass: NaN is minimum and maximum of what holds it."""
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _find_candidates(scores: Tensor, lines: Sequence[Line]) -> Iterator[tuple[int, _Part]]:
    """Classes that may win somewhere, and where.

    In a block a class is ruled out if its largest score there is below the smallest of another
    one: interpolation stays between them.
    """
    upper = lower = scores
    # The axis with the fewest blocks first: it leaves the least for the others.
    for axis, line in sorted(enumerate(lines), key=lambda pair: len(pair[1].edges)):
        if len(line.edges) == 2:
            upper, lower = upper.amax(axis + 1, keepdim=True), lower.amin(axis + 1, keepdim=True)
            continue
        # A block and the first voxels of the next one, since results lie between them.
        places = torch.arange((len(line.edges) - 1) * line.block + 1, device=scores.device)
        places.clamp_(max=line.sources - 1)
        upper, lower = (
            values.index_select(axis + 1, places).unfold(axis + 1, line.block + 1, line.block)
            for values in (upper, lower)
        )
        upper, lower = upper.amax(-1), lower.amin(-1)
    may_win = (upper >= lower.amax(0)).cpu().numpy()
    for index, blocks in enumerate(may_win):
        if blocks.any():
            yield index, _enclose(blocks, lines)


def _enclose(blocks: NDArray[np.bool_], lines: Sequence[Line]) -> _Part:
    """The smallest part that holds some blocks."""
    sources, results = [], []
    for axis, line in enumerate(lines):
        others = tuple(other for other in range(blocks.ndim) if other != axis)
        filled = np.flatnonzero(blocks.any(axis=others))
        first, end = int(filled[0]), int(filled[-1]) + 1
        sources.append(slice(first * line.block, min(end * line.block + 1, line.sources)))
        results.append(slice(line.edges[first], line.edges[end]))
    return _Part(tuple(sources), tuple(results))


def _everywhere(lines: Sequence[Line]) -> _Part:
    return _Part(
        tuple(slice(0, line.sources) for line in lines),
        tuple(slice(0, len(line.low)) for line in lines),
    )


def _interpolate(values: Tensor, lines: Sequence[Line], part: _Part) -> Tensor:
    """Interpolate a part of ``(*S)`` along all axes; the last one first: it costs most."""
    values = values[part.sources]
    for axis in reversed(range(values.dim())):
        first = part.sources[axis].start
        values = lines[axis].apply(values, axis, part.results[axis], first)
    return values
