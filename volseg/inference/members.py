"""The networks of a model as one: windows go in, one score per class or region comes out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from volseg.data.mirroring import Mirroring
from volseg.inference.uncertainty import disagreement, entropy

Network = Callable[[Tensor], Tensor]
"""Windows (B, C, *W) to logits (B, K, *W): a module in eval mode, or what a backend makes of it."""


@dataclass(frozen=True, eq=False)
class Members:
    """What is averaged in a window: networks, and mirror images of the window.

    Attributes:
        networks: one per fold.
        device: where they run.
        overlapping: whether their outputs are regions (sigmoid) and not classes (softmax).
        mirroring: logits are averaged over the window and all its mirror images along these axes,
            but those of a single voxel.
        shows_disagreement: whether a last channel says how much the networks disagree.
        precision: of convolutions and the like.
    """

    networks: Sequence[Network]
    device: torch.device
    overlapping: bool = False
    mirroring: Mirroring | None = None
    shows_disagreement: bool = False
    precision: torch.dtype = torch.float32

    def __call__(self, windows: Tensor) -> Tensor:
        """Scores (B, K, *W) float32, on `device`, of windows (B, C, *W) on any device.

        One network gives its logits. Of several, whose logits have no common scale, the
        probabilities are averaged; the scores are then logits of the mean.
        """
        windows = windows.to(self.device)
        if len(self.networks) == 1:
            return self._logits(self.networks[0], windows)
        mean = _Mean(overlapping=self.overlapping, shows_disagreement=self.shows_disagreement)
        for network in self.networks:
            mean.add(self._logits(network, windows))
        return mean.finish()

    def _logits(self, network: Network, windows: Tensor) -> Tensor:
        if self.mirroring is None:
            return compute_logits(network, windows, self.precision)
        outputs = list(self.mirroring.outputs)

        def look(axes: tuple[int, ...]) -> Tensor:
            dims = [axis + 2 for axis in axes]
            logits = compute_logits(network, windows.flip(dims), self.precision).flip(dims)
            # What the mirror shows as left is right.
            return logits[:, outputs] if 0 in axes else logits

        first, *others = list_mirrorings(self.mirroring, windows.shape[2:])
        total = look(first)
        for axes in others:
            # By no name, so that only their sum is held while the next are computed.
            total += look(axes)
        return total.div_(1 + len(others))


class _Mean:
    """The mean probability of several networks, of which one at a time is held."""

    def __init__(self, *, overlapping: bool, shows_disagreement: bool) -> None:
        self.overlapping, self.shows_disagreement = overlapping, shows_disagreement
        self.number = 0
        self.sums: list[Tensor] = []
        self.entropies: Tensor | None = None

    def add(self, logits: Tensor) -> None:
        """Take the logits (B, K, *W) of one more."""
        if self.shows_disagreement:
            own = entropy(logits, overlapping=self.overlapping, dim=1)
            self.entropies = own if self.entropies is None else self.entropies.add_(own)
        if self.overlapping:
            logs = [logsigmoid(logits), logsigmoid(-logits)]
        else:
            logs = [logits.log_softmax(1)]
        if self.sums:
            for total, own in zip(self.sums, logs, strict=True):
                torch.logaddexp(total, own, out=total)
        else:
            self.sums = logs
        self.number += 1

    def finish(self) -> Tensor:
        """Logits of the mean, and the disagreement as a last channel if it is wanted."""
        # The number of members cancels out of a sigmoid's logits, and is a constant in a softmax's.
        if self.overlapping:
            mean = self.sums[0] - self.sums[1]
        else:
            mean = self.sums[0] - math.log(self.number)
        if self.entropies is None:
            return mean
        apart = disagreement(mean, self.entropies / self.number, overlapping=self.overlapping)
        return torch.cat([mean, apart[:, None]], 1)


def list_mirrorings(mirroring: Mirroring, window: Sequence[int]) -> list[tuple[int, ...]]:
    """Every set of axes to mirror, none among them; an axis of a single voxel is in none."""
    axes = [axis for axis in mirroring.axes if window[axis] > 1]
    sets = (itertools.combinations(axes, number) for number in range(len(axes) + 1))
    return list(itertools.chain.from_iterable(sets))


def compute_logits(network: Network, windows: Tensor, precision: torch.dtype) -> Tensor:
    """Logits float32 of windows; a runtime other than torch was built for its precision."""
    with torch.autocast(windows.device.type, precision, enabled=precision != torch.float32):
        logits = network(windows)
    if not isinstance(logits, Tensor):
        raise TypeError("the network returned no single tensor in eval mode")
    return logits.float()
