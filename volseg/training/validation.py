"""Dice on validation cases during training, on the network's grid, with sliding windows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from volseg.data.cache import CachedCase
from volseg.inference.windows import predict_scores
from volseg.planning.plan import Plan


def validate(
    network: nn.Module, cases: Sequence[CachedCase], plan: Plan, device: torch.device
) -> list[float]:
    """Mean Dice per foreground class over `cases`; nan for a class that no case has.

    A case counts for a class unless reference and prediction are both empty, as in
    `volseg.evaluation`. Leaves the network in the mode it was in.
    """
    was_training = network.training
    network.eval()
    rows = [_case_dice(network, case, plan, device) for case in cases]
    network.train(was_training)
    dice = np.stack(rows)
    counted = np.isfinite(dice)
    total = np.where(counted, dice, 0).sum(0)
    with np.errstate(invalid="ignore"):
        return [float(value) for value in total / counted.sum(0)]


def _case_dice(
    network: nn.Module, case: CachedCase, plan: Plan, device: torch.device
) -> NDArray[np.float64]:
    image = torch.from_numpy(case.image.astype(np.float32))
    scores = predict_scores([network], image, plan.patch, device)
    predicted = scores.argmax(0).numpy()
    num_classes = len(scores)
    counts = [
        np.bincount(array.ravel(), minlength=num_classes)[1:]
        for array in (case.label, predicted, case.label[case.label == predicted])
    ]
    reference, prediction, both = (count.astype(np.float64) for count in counts)
    with np.errstate(invalid="ignore"):
        return 2 * both / (reference + prediction)
