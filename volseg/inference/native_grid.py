"""From scores on the network's grid to classes on the grid of the source file.

Scores are interpolated before the classes are compared: the boundary then lies where two classes
are equal, between voxels of the coarser grid, which resampled labels could not say.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from volseg.data.cases import Classes
from volseg.data.preprocessing import Placement
from volseg.data.resampling import reduce_to_indices, resample


def restore_classes(scores: Tensor, placement: Placement) -> NDArray[Any]:
    """Class indices ``(*source shape)`` from scores ``(K, *S)``; background outside the content.

    Holds one class at source resolution at a time.
    """
    dtype = torch.uint8 if len(scores) <= 256 else torch.int32
    indices = reduce_to_indices(
        (
            (index, resample(scores[index : index + 1], placement.box.shape)[0])
            for index in range(len(scores))
        ),
        dtype,
    ).numpy()
    canonical = np.zeros(placement.canonical_shape, dtype=indices.dtype)
    canonical[placement.box.slices] = indices
    return np.ascontiguousarray(placement.source.from_canonical(canonical))


def restore_probabilities(
    scores: Tensor, placement: Placement, classes: Classes
) -> NDArray[np.float32]:
    """Probabilities ``(K, *source shape)`` from scores ``(K, *S)``; certain background outside.

    K is the number of classes, of which one is there, or of regions, each of which may be.
    """
    probabilities = scores.sigmoid() if classes.regions else scores.softmax(0)
    resampled = resample(probabilities, placement.box.shape).numpy()
    canonical = np.zeros((len(resampled), *placement.canonical_shape), dtype=np.float32)
    if not classes.regions:
        canonical[0] = 1
    canonical[(slice(None), *placement.box.slices)] = resampled
    return np.ascontiguousarray(placement.source.from_canonical(canonical))
