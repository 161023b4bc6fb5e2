"""From scores of a network's outputs to scores of the classes, which files have values for."""

from __future__ import annotations

import torch
from torch import Tensor

from volseg.data.cases import Classes
from volseg.data.resampling import reduce_to_indices


def to_class_scores(scores: Tensor, classes: Classes) -> Tensor:
    """Scores ``(K, *S)`` of the classes from those of the network's outputs.

    The likelihood of a class is that of its regions being there and the others not, so that up to
    a constant its logarithm is the sum of its regions' logits; that of the background is zero.
    The class with the largest score is thus the most likely one that the regions allow.

    Args:
        scores: logits (R, *S) of the regions, or scores of the classes, which are returned.
        classes: of the model.
    """
    if not classes.regions:
        return scores
    weights, offsets = region_decoding(classes)
    offset = torch.tensor(offsets, device=scores.device).reshape(-1, *[1] * (scores.dim() - 1))
    combined: Tensor = torch.tensordot(torch.tensor(weights, device=scores.device), scores, 1)
    return combined + offset


def to_indices(scores: Tensor, classes: Classes) -> Tensor:
    """Most likely class ``(*S)`` by the scores ``(K, *S)`` of a network's outputs, on the CPU."""
    dtype = torch.uint8 if classes.num_classes <= 256 else torch.int32
    return reduce_to_indices(enumerate(to_class_scores(scores, classes)), dtype).cpu()


def region_decoding(classes: Classes) -> tuple[list[list[float]], list[float]]:
    """Weight of each region's logit (K x R) in the score of each class, and what is added (K).

    A class in no region is never predicted. Its offset is finite, since scores are interpolated.
    """
    weights = [
        [float(index in indices) for indices in classes.region_indices]
        for index in range(classes.num_classes)
    ]
    offsets = [0.0 if index == 0 or any(row) else -1e4 for index, row in enumerate(weights)]
    return weights, offsets
