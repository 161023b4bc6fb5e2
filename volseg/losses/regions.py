"""A loss on regions: unions of classes, which may overlap."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import nn

from volseg.errors import ConfigError
from volseg.losses.targets import look_up, make_candidates, to_channels, with_channel_axis


class RegionLoss(nn.Module):
    """Compare one channel of logits per region with a reference of classes.

    The brain tumour challenge (BraTS) scores the whole tumour, its core and its enhancing part,
    which lie within each other: ``RegionLoss(BinaryCrossEntropyDice(), [[1, 2, 3], [1, 3], [3]])``.

    Attributes:
        num_classes: of a soft target, at least.

    References:
        B. H. Menze et al.: The Multimodal Brain Tumor Image Segmentation Benchmark (BRATS), 2015,
        doi 10.1109/TMI.2014.2377694.
    """

    def __init__(
        self,
        loss: nn.Module,
        regions: Sequence[Sequence[int]],
        num_classes: int | None = None,
        candidates: Sequence[Sequence[int]] = (),
    ) -> None:
        """Wrap a loss.

        Args:
            loss: of logits (B, R, *S) and a target (B, R, *S) in [0, 1]; one with a sigmoid, since
                a voxel may be in several regions or in none.
            regions: per channel of the logits, the classes that it stands for; 1 or above.
            num_classes: background counted; by default one more than the highest of any region.
            candidates: what the integer targets from `num_classes` on stand for: the classes that
                such a voxel may be. Where they leave a region open, the loss gets a share of -1.

        Raises:
            ConfigError: no region, or one that is empty, names a class twice or the background; a
                loss with softmax.
        """
        super().__init__()
        if not isinstance(regions, Sequence):
            raise ConfigError(f"regions {regions!r}; expected a list of lists of classes.")
        for classes in regions:
            _check_region(classes)
        if getattr(loss, "activation", None) == "softmax" or getattr(loss, "softmax", None) is True:
            raise ConfigError(
                f"{type(loss).__name__} with softmax; expected a loss with activation 'sigmoid': a "
                "voxel may be in several regions. BinaryCrossEntropyDice is one."
            )
        if not regions:
            raise ConfigError("no regions; expected one or more lists of classes.")
        self.loss = loss
        self.regions = tuple(tuple(int(c) for c in classes) for classes in regions)
        self.num_classes = num_classes or 1 + max(map(max, self.regions))
        self.candidates = tuple(tuple(classes) for classes in candidates)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compare logits with the reference.

        Args:
            logits: (B, R, *S).
            target: (B, *S) or (B, 1, *S), integer class indices, of which any may be in no region;
                or (B, K, *S), shares of the classes in [0, 1], with K at least `num_classes`.

        Returns:
            A scalar.

        Raises:
            ConfigError: shapes that do not belong together.
        """
        is_soft = target.is_floating_point()
        target = with_channel_axis(target, logits.dim())
        fits = target.shape[1] >= self.num_classes if is_soft else target.shape[1] == 1
        if logits.shape[1] != len(self.regions) or not fits:
            raise ConfigError(
                f"logits {tuple(logits.shape)} and {target.dtype} target {tuple(target.shape)}; "
                f"expected one channel of logits for each of {len(self.regions)} regions, and an "
                f"integer target of one channel or a floating one of {self.num_classes} or more."
            )
        loss: torch.Tensor = self.loss(logits, self._make_shares(target))
        return loss

    def _make_shares(self, target: torch.Tensor) -> torch.Tensor:
        """Per region (B, R, *S): how much of it is in a voxel, -1 where that is not known."""
        if not target.is_floating_point() and self.candidates:
            may_be = make_candidates(self.num_classes, self.candidates).float()
            members = torch.zeros(self.num_classes, len(self.regions))
            for region, classes in enumerate(self.regions):
                members[list(classes), region] = 1
            share = may_be @ members / may_be.sum(1, keepdim=True)
            return look_up(target, torch.where((share > 0) & (share < 1), -1.0, share))
        shares = target
        if not target.is_floating_point():
            shares = to_channels(target, self.num_classes)
        return torch.stack([shares[:, list(classes)].sum(1) for classes in self.regions], 1)


def _check_region(classes: Sequence[int]) -> None:
    is_list = isinstance(classes, Sequence) and not isinstance(classes, str)
    are_classes = is_list and all(
        isinstance(c, numbers.Integral) and not isinstance(c, bool) and c > 0 for c in classes
    )
    if not are_classes or not classes or len(set(classes)) < len(classes):
        raise ConfigError(
            f"region {classes!r}; expected one or more different classes from 1, as a list."
        )
