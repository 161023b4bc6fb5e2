"""How sure a prediction is, per voxel, from 0 to 1."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

UncertaintyName = Literal["entropy", "disagreement"]


def entropy(scores: Tensor, *, overlapping: bool, dim: int = 0) -> Tensor:
    """Entropy of the classes' probabilities as a share of the largest possible one.

    Args:
        scores: logits of classes, or of regions, along `dim`.
        overlapping: whether they are regions, of whose entropies this is the mean.
        dim: which dimension goes away.
    """
    if overlapping:
        inside, logs = scores.sigmoid(), logsigmoid(scores)
        outside, other_logs = 1 - inside, logsigmoid(-scores)
        return -(inside * logs + outside * other_logs).mean(dim) / math.log(2)
    logs = scores.log_softmax(dim)
    return -(logs.exp() * logs).sum(dim) / math.log(scores.shape[dim])


def disagreement(mean: Tensor, mean_entropy: Tensor, *, overlapping: bool) -> Tensor:
    """What the members of an ensemble know and do not agree upon, (B, *W).

    The entropy of their mean less the mean of their entropies (mutual information): high where they
    are sure of different classes, low where all are unsure.

    Args:
        mean: scores (B, K, *W) of the mean probability.
        mean_entropy: (B, *W) mean of the members' entropies.
        overlapping: see `entropy`.
    """
    return (entropy(mean, overlapping=overlapping, dim=1) - mean_entropy).clamp(min=0)
