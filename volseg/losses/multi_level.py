"""One loss for all outputs of a network with deep supervision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from volseg.errors import ConfigError, check_choice
from volseg.losses.coarsening import average, pick_foreground, subsample
from volseg.losses.regions import RegionLoss
from volseg.losses.scheduled import ScheduledTerm
from volseg.losses.targets import check_weights, is_number, with_channel_axis

WeightScheme = Literal["halving", "exp", "two", "same", "dsn"]

_WEIGHTS: dict[str, Callable[[int], list[float]]] = {
    "halving": lambda n: [0.5**level for level in range(n)],
    "exp": lambda n: [max(0.5**level, 0.0625) for level in range(n)],
    "two": lambda n: [1.0] + [0.5] * (n - 1),
    "same": lambda n: [1.0] * n,
    "dsn": lambda n: [1.0, 0.2, 0.4],
}
_TARGETS = ("nearest-exact", "area", "max")
_RESOLUTIONS = ("native", "full")
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class MultiLevelLoss(nn.Module):
    """Weighted sum of one loss over several logits, of one resolution or of several.

    A second term may be added, on the main output alone: coarser ones have no boundary to speak of.

    Attributes:
        progress: of the training, from 0 to 1; `decay` and the second term's weight follow it. The
            training sets it.

    References:
        C.-Y. Lee et al.: Deeply-Supervised Nets, 2015, doi 10.48550/arXiv.1409.5185.
        F. Isensee et al.: nnU-Net, 2021, doi 10.1038/s41592-020-01008-z (``"halving"``).
        M. J. Cardoso et al.: MONAI, 2022, doi 10.48550/arXiv.2211.02701 (``"exp"``, ``"two"``).
        Q. Dou et al.: 3D deeply supervised network for automated segmentation of volumetric
        medical images, 2017, doi 10.1016/j.media.2017.05.001 (``"dsn"``).
        Q. Dou et al.: 3D Deeply Supervised Network for Automatic Liver Segmentation from CT
        Volumes, 2016, doi 10.1007/978-3-319-46723-8_18 (decay).
    """

    def __init__(
        self,
        loss: nn.Module,
        weights: WeightScheme | Sequence[float] = "halving",
        *,
        target: Literal["nearest-exact", "area", "max"] = "nearest-exact",
        resolution: Literal["native", "full"] = "native",
        decay: float = 1.0,
        normalise: bool = False,
        boundary: ScheduledTerm | None = None,
    ) -> None:
        """Wrap a loss.

        Args:
            loss: of logits (B, K, *S) and a target (B, *S) or (B, 1, *S), integer, or (B, K, *S),
                floating.
            weights: one per output, main output first, used as they are; or a rule.
                ``"halving"``: halved from output to output, with sum 1. ``"exp"``: the same from
                1, and at least 1/16. ``"two"``: 1, then 1/2. ``"same"``: 1. ``"dsn"``: 1, 0.2, 0.4
                for a main output, a finer auxiliary one and a coarser one.
            target: what a coarser output is compared with, per block of voxels.
                ``"nearest-exact"``: the voxel in its middle. ``"area"``: the share of each class.
                ``"max"``: the most frequent foreground class, background only where there is no
                other. Full resolution needs none of them.
            resolution: ``"native"`` brings the target to each output, ``"full"`` each output to
                the target by linear interpolation.
            decay: what the weights of all outputs but the first are multiplied with at the end of
                the training, above 0 and at most 1; on the way, ``decay ** progress``. Five per
                cent less every ten of E epochs is ``0.95 ** (E / 10)``.
            normalise: scale the weights to sum 1 at the start of the training.
            boundary: a term that is added on the main output, with a weight of its own.

        Raises:
            ConfigError: an unknown name, weights that are negative or all zero, or `decay` out of
                range.
        """
        super().__init__()
        check_choice("target", target, _TARGETS)
        check_choice("resolution", resolution, _RESOLUTIONS)
        if not is_number(decay) or not 0 < decay <= 1:
            raise ConfigError(f"decay {decay!r}; expected above 0 and at most 1, a number.")
        _check_weights(weights)
        self.loss = loss
        self.weights = weights if isinstance(weights, str) else tuple(weights)
        self.target = target
        self.resolution = resolution
        self.decay = decay
        self.normalise = normalise
        self.boundary = boundary
        self.progress = 0.0

    def forward(
        self, logits: torch.Tensor | Sequence[torch.Tensor], target: torch.Tensor
    ) -> torch.Tensor:
        """Compare all logits with the reference.

        Args:
            logits: per output (B, K, *S_output), the main one first and the others from fine to
                coarse; or one tensor, with weight 1.
            target: (B, *S) or (B, 1, *S), integer class indices at full resolution; or (B, K, *S),
                shares in [0, 1].

        Returns:
            A scalar.

        Raises:
            ConfigError: no output, another number of weights than of outputs, an output whose
                native size does not divide the target's, or ``"max"`` of a target that is not
                integer.
        """
        if isinstance(logits, torch.Tensor):
            loss: torch.Tensor = self.loss(logits, target)
            return self._add_boundary(loss, logits, target)
        weights = self._weights(len(logits))
        losses = [self._compare(self.loss, output, target) for output in logits]
        total = torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()
        return self._add_boundary(total, logits[0], target)

    def _add_boundary(
        self, loss: torch.Tensor, main: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        weight = 0.0 if self.boundary is None else self.boundary.weigh(self.progress)
        # Distances take time; at the start of a schedule nothing would come of them.
        if self.boundary is None or weight == 0:
            return loss
        return loss + weight * self._compare(self.boundary.loss, main, target)

    def check_outputs(self, num_outputs: int) -> None:
        """Refuse a number of outputs that the weights are not for.

        Raises:
            ConfigError: another number of weights.
        """
        self._weights(num_outputs)

    def _weights(self, num_outputs: int) -> list[float]:
        if isinstance(self.weights, str):
            weights = _WEIGHTS[self.weights](num_outputs)
        else:
            weights = list(self.weights)
        if not num_outputs or len(weights) != num_outputs:
            raise ConfigError(
                f"{len(weights)} weights ({self.weights}) for {num_outputs} outputs in training; "
                "expected one weight per output."
            )
        total = sum(weights) if self.normalise or self.weights == "halving" else 1.0
        fade = self.decay**self.progress
        main, *auxiliary = (weight / total for weight in weights)
        return [main, *(weight * fade for weight in auxiliary)]

    def _compare(
        self, compare: nn.Module, logits: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        axes = logits.dim() - 2
        size = target.shape[target.dim() - axes :]
        if logits.shape[2:] != size and self.resolution == "full":
            logits = functional.interpolate(
                logits, size=tuple(size), mode=_LINEAR[axes], align_corners=False
            )
        elif logits.shape[2:] != size:
            target = self._coarsen(target, logits)
        loss: torch.Tensor = compare(logits, target)
        return loss

    def _coarsen(self, target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        size = logits.shape[2:]
        if self.target == "nearest-exact":
            return subsample(target, size)
        # The channels of a RegionLoss are not classes.
        num_channels = (
            self.loss.num_classes if isinstance(self.loss, RegionLoss) else logits.shape[1]
        )
        target = with_channel_axis(target, logits.dim())
        if self.target == "area":
            return average(target, size, num_channels)
        if target.is_floating_point():
            raise ConfigError(f"target 'max' of {target.dtype}; expected integer class indices.")
        return pick_foreground(target, size, num_channels)


def _check_weights(weights: str | Sequence[float]) -> None:
    if isinstance(weights, str):
        check_choice("weights", weights, _WEIGHTS)
        return
    values: object = weights
    if not isinstance(values, Sequence):
        raise ConfigError(f"weights {values!r}; expected a rule, or a list of one per output.")
    check_weights(f"weights {list(weights)}", weights)
