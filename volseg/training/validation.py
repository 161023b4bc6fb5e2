"""Dice on validation cases during training, on the network's grid, with sliding windows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from volseg.data.cache import CachedCase
from volseg.data.cases import Classes
from volseg.inference.windows import predict_scores, to_class_scores
from volseg.planning.plan import Plan


def validate(
    network: nn.Module,
    cases: Sequence[CachedCase],
    plan: Plan,
    classes: Classes,
    device: torch.device,
) -> list[float]:
    """Mean Dice per region, or per foreground class, over `cases`; nan where no case has it.

    A case counts for a class unless reference and prediction are both empty, as in
    `volseg.evaluation`. Leaves the network in the mode it was in.
    """
    was_training = network.training
    network.eval()
    rows = [_case_dice(network, case, plan, classes, device) for case in cases]
    network.train(was_training)
    dice = np.stack(rows)
    counted = np.isfinite(dice)
    total = np.where(counted, dice, 0).sum(0)
    with np.errstate(invalid="ignore"):
        return [float(value) for value in total / counted.sum(0)]


def _case_dice(
    network: nn.Module, case: CachedCase, plan: Plan, classes: Classes, device: torch.device
) -> NDArray[np.float64]:
    image = torch.from_numpy(case.image.astype(np.float32))
    scores = predict_scores([network], image, plan.patch, device)
    predicted = to_class_scores(scores, classes).argmax(0).numpy()
    # How often each pair of reference and prediction occurs, from which every union follows.
    number = classes.num_classes
    pairs = np.bincount(case.label.ravel() * np.int64(number) + predicted.ravel())
    # Ignored voxels come behind all classes.
    pairs = pairs[: number**2]
    pairs = np.pad(pairs, (0, number**2 - len(pairs))).reshape(number, number)
    members = classes.region_indices or [(index,) for index in range(1, number)]
    both = np.array([pairs[np.ix_(m, m)].sum() for m in members], dtype=np.float64)
    sums = np.array([pairs[list(m)].sum() + pairs[:, list(m)].sum() for m in members])
    with np.errstate(invalid="ignore"):
        return 2 * both / sums
