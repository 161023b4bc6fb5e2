"""Dice on validation cases during training, on the network's grid, with sliding windows."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from volseg.data.cache import CachedCase
from volseg.data.cases import Classes
from volseg.data.content import Box
from volseg.errors import is_out_of_memory
from volseg.inference.decoding import to_indices
from volseg.inference.members import Members
from volseg.inference.memory import plan_strips, stays_on
from volseg.inference.windows import CPU, choose_axis, count_at_once, stream_scores
from volseg.planning.plan import Plan
from volseg.training.parallel import add_up, count_processes, get_rank, open_meeting

logger = logging.getLogger(__name__)


def validate(
    network: nn.Module,
    cases: Sequence[CachedCase],
    plan: Plan,
    classes: Classes,
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> list[float]:
    """Mean Dice per region, or per foreground class, over `cases`; nan where no case has it.

    A case counts for a class unless reference and prediction are both empty, as in
    `volseg.evaluation`. Leaves the network in the mode it was in. Of several processes each takes
    its share of the cases, and all get the result.
    """
    was_training = network.training
    network.eval()
    own = cases[get_rank() :: count_processes()]
    number = classes.num_outputs - (0 if classes.regions else 1)
    dice = np.full((len(own), number), math.nan)
    with open_meeting() as meet:
        for row, case in zip(dice, own, strict=True):
            row[:] = _case_dice(network, case, plan, classes, device, precision)
        meet()
    network.train(was_training)
    counted = np.isfinite(dice)
    sums = np.stack([np.where(counted, dice, 0).sum(0), counted.sum(0)])
    total, count = add_up(torch.from_numpy(sums)).numpy()
    with np.errstate(invalid="ignore"):
        return [float(value) for value in total / count]


def _case_dice(
    network: nn.Module,
    case: CachedCase,
    plan: Plan,
    classes: Classes,
    device: torch.device,
    precision: torch.dtype,
) -> NDArray[np.float64]:
    members = Members([network], device, precision=precision)
    image = torch.from_numpy(case.image.astype(np.float32))
    size = tuple(image.shape[1:])
    whole = Box((0,) * len(size), size)
    blend_bytes = plan_strips(whole, size, plan.patch, classes.num_outputs).blend_bytes
    # Twice, since what decides on them takes room, too.
    place = device if stays_on(device, 2 * blend_bytes) else CPU
    at_once = count_at_once(plan.patch, device)
    predicted = None
    try:
        predicted = _predict(members, image, plan, classes, at_once, place)
    except Exception as error:
        if not is_out_of_memory(error) or (at_once, place) == (1, CPU):
            raise
    if predicted is None:
        # Behind the handler, whose error keeps the feature maps alive.
        logger.warning("out of memory: validation takes its windows one by one")
        if device.type == "cuda":
            torch.cuda.empty_cache()
        predicted = _predict(members, image, plan, classes, 1, CPU)
    # How often each pair of reference and prediction occurs, from which every union follows.
    number, rows = classes.num_classes, classes.num_indices
    pairs = np.bincount(case.label.ravel() * np.int64(number) + predicted.ravel())
    pairs = np.pad(pairs, (0, rows * number - len(pairs))).reshape(rows, number)
    unions = classes.region_indices or tuple((index,) for index in range(1, number))
    return np.array([_dice(pairs, list(indices), classes) for indices in unions])


def _predict(
    members: Members,
    image: Tensor,
    plan: Plan,
    classes: Classes,
    at_once: int,
    place: torch.device,
) -> NDArray[np.integer]:
    """Label indices ``(*S)`` of an image ``(C, *S)``, with scores blended on `place`."""
    axis = choose_axis(image.shape[1:], plan.patch)
    parts = stream_scores(members, image, plan.patch, at_once=at_once, axis=axis, device=place)
    indices: NDArray[np.integer] = torch.cat([to_indices(p, classes) for p in parts], axis).numpy()
    return indices


def _dice(pairs: NDArray[np.int64], indices: list[int], classes: Classes) -> float:
    """Of a union of classes; nan where it is nowhere, or the case says too little of it."""
    is_open = [False] * classes.num_classes
    for candidates in classes.candidates:
        inside = set(candidates) & set(indices)
        is_open.append(bool(inside) and inside != set(candidates))
    for candidates, count in zip(classes.candidates, pairs[classes.num_classes :], strict=True):
        is_partial = candidates in classes.unsure and set(candidates) & set(indices)
        if is_partial and count.sum():
            return math.nan
    known = pairs[~np.array(is_open)]
    both = pairs[np.ix_(indices, indices)].sum()
    total = pairs[indices].sum() + known[:, indices].sum()
    return float(2 * both / total) if total else math.nan
