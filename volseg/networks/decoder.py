"""From features of falling resolution back to full resolution."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from volseg.errors import check_choice

ALIGNMENTS = ("pad", "crop", "none")


class ConcatLevel(nn.Module):
    """Upsample the coarser features, join the skip connection to them, convolve."""

    def __init__(
        self,
        upsampling: nn.Module,
        convs: nn.Module,
        *,
        skip_first: bool = False,
        align: str = "none",
    ) -> None:
        """Keep the two parts.

        Args:
            upsampling: brings the coarser features to the size of the skip connection.
            convs: take the channels of both together.
            skip_first: whether the skip connection's channels come before the upsampled ones.
            align: where sizes differ, ``"pad"`` the upsampled features behind by repeating their
                border, or ``"crop"`` the skip connection to its centre.

        Raises:
            ConfigError: unknown `align`.
        """
        super().__init__()
        check_choice("align", align, ALIGNMENTS)
        self.upsampling = upsampling
        self.convs = convs
        self.skip_first = skip_first
        self.align = align

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Join the last two features to ``(B, C, *S)``.

        Args:
            features: last of them the coarser ones ``(B, C_coarse, *S_coarse)``, and before them
                those of the skip connection ``(B, C_skip, *S)``. Both are taken from the list, so
                that in a prediction their memory is free while the convolutions work.
        """
        x: torch.Tensor = self.convs(self._join(features))
        return x

    def _join(self, features: list[torch.Tensor]) -> torch.Tensor:
        up: torch.Tensor = self.upsampling(features.pop())
        skip = features.pop()
        if self.align == "pad":
            up = pad_to(up, skip)
        elif self.align == "crop":
            skip = crop_to(skip, up)
        return torch.cat([skip, up] if self.skip_first else [up, skip], 1)


def pad_to(x: torch.Tensor, larger: torch.Tensor) -> torch.Tensor:
    """Repeat the last voxels of ``(B, C, *S)`` until it has the size of `larger`.

    Where pooling dropped an incomplete window, that is where voxels are missing.
    """
    pads: list[int] = []
    for axis in range(x.dim() - 1, 1, -1):
        pads += [0, larger.shape[axis] - x.shape[axis]]
    # Padding by nothing copies all the same.
    return functional.pad(x, pads, mode="replicate") if max(pads) > 0 else x


def crop_to(x: torch.Tensor, smaller: torch.Tensor) -> torch.Tensor:
    """The centre of ``(B, C, *S)`` in the size of `smaller`; an odd margin rounds half to even."""
    for axis in range(2, x.dim()):
        margin = x.shape[axis] - smaller.shape[axis]
        # round(margin / 2), half to even, in integers so that it can be scripted and exported.
        start = margin // 2 + (margin % 2) * (margin // 2 % 2)
        x = x.narrow(axis, start, smaller.shape[axis])
    return x
