"""How far each voxel is from the boundary of a mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from volseg.errors import ConfigError


def measure_distances(masks: torch.Tensor, spacing: Sequence[float] | None = None) -> torch.Tensor:
    """Euclidean distance to the nearest voxel of the other side, negative inside.

    Computed on the CPU, without a gradient.

    Args:
        masks: (B, K, *S), bool.
        spacing: size of a voxel per axis, in any unit; 1 each by default.

    Returns:
        (B, K, *S), float32, on the device of `masks`; 0 everywhere where a mask is empty or full
        and has no boundary.

    Raises:
        ConfigError: another number of axes.

    >>> measure_distances(torch.tensor([[[True, True, False, False]]])).tolist()
    [[[-2.0, -1.0, 1.0, 2.0]]]
    """
    if spacing is not None and len(spacing) != masks.dim() - 2:
        raise ConfigError(
            f"spacing {tuple(spacing)}; expected {masks.dim() - 2} values, one per spatial axis."
        )
    inside = masks.detach().cpu().numpy()
    distances = np.zeros(inside.shape, dtype=np.float32)
    for place in np.ndindex(*inside.shape[:2]):
        mask = inside[place]
        if mask.any() and not mask.all():
            outer = ndimage.distance_transform_edt(~mask, sampling=spacing)
            distances[place] = outer - ndimage.distance_transform_edt(mask, sampling=spacing)
    return torch.from_numpy(distances).to(masks.device)
