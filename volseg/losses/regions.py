"""A loss on regions: unions of classes, which may overlap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from volseg.errors import ConfigError
from volseg.losses.targets import to_channels, with_channel_axis


class RegionLoss(nn.Module):
    """Compare one channel of logits per region with a reference of classes.

    The brain tumour challenge (BraTS) scores the whole tumour, its core and its enhancing part,
    which lie within each other: ``RegionLoss(BinaryCrossEntropyDice(), [[1, 2, 3], [1, 3], [3]])``.

    Attributes:
        num_classes: of a soft target, at least: one more than the highest class of any region.

    References:
        B. H. Menze et al.: The Multimodal Brain Tumor Image Segmentation Benchmark (BRATS), 2015,
        doi 10.1109/TMI.2014.2377694.
    """

    def __init__(
        self, loss: nn.Module, regions: Sequence[Sequence[int]], ignore: int | None = None
    ) -> None:
        """Wrap a loss.

        Args:
            loss: of logits (B, R, *S) and a target (B, R, *S) in [0, 1]; one with a sigmoid, since
                a voxel may be in several regions or in none.
            regions: per channel of the logits, the classes that it stands for; 1 or above.
            ignore: index in an integer target of voxels that were not annotated; the loss gets a
                share of -1 there.

        Raises:
            ConfigError: no region, or one that is empty, names a class twice or the background; a
                loss with softmax.
        """
        super().__init__()
        for classes in regions:
            _check_region(classes)
        if getattr(loss, "activation", "sigmoid") != "sigmoid":
            raise ConfigError(
                f"{type(loss).__name__} with softmax; expected a loss with activation 'sigmoid': a "
                "voxel may be in several regions. BinaryCrossEntropyDice is one."
            )
        if not regions:
            raise ConfigError("no regions; expected one or more lists of classes.")
        self.loss = loss
        self.regions = tuple(tuple(classes) for classes in regions)
        self.num_classes = 1 + max(map(max, self.regions))
        self.ignore = ignore

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
        shares = target if is_soft else to_channels(target, self.num_classes)
        channels = [shares[:, list(classes)].sum(1) for classes in self.regions]
        wanted = torch.stack(channels, 1)
        if self.ignore is not None and not is_soft:
            wanted = wanted.masked_fill(target == self.ignore, -1)
        loss: torch.Tensor = self.loss(logits, wanted)
        return loss


def _check_region(classes: Sequence[int]) -> None:
    is_list = isinstance(classes, Sequence) and not isinstance(classes, str)
    are_classes = is_list and all(type(c) is int and c > 0 for c in classes)
    if not are_classes or not classes or len(set(classes)) < len(classes):
        raise ConfigError(
            f"region {classes!r}; expected one or more different classes from 1, as a list."
        )
