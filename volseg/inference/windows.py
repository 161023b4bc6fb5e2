"""Overlapping windows over a prepared image: logits from patches that the network can take."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from volseg.data.cases import Classes
from volseg.data.mirroring import Mirroring

OVERLAP = 0.5
SIGMA_SCALE = 0.125
"""Width of the Gaussian weight as a share of the window, as in nnU-Net and MONAI."""
SLICE_PIXELS = 512**2
"""Of the slices that go through a network together, where each is a window."""


@torch.inference_mode()
def predict_scores(
    networks: Sequence[nn.Module],
    image: Tensor,
    window: Sequence[int],
    device: torch.device,
    *,
    overlapping: bool = False,
    mirroring: Mirroring | None = None,
) -> Tensor:
    """Scores ``(K, *S)`` float32 for a prepared image ``(C, *S)``, on the CPU.

    One network gives its logits. Of several, whose logits have no common scale, the probabilities
    are averaged; the scores are then logits of the mean.

    Args:
        networks: in eval mode on `device`.
        image: normalised, at the plan's spacing; an axis shorter than the window is zero-padded.
        window: voxels per axis.
        device: where the windows run.
        overlapping: whether the outputs are regions (sigmoid) and not classes (softmax).
        mirroring: logits are averaged over the window and all its mirror images along these axes,
            but those of a single voxel.
    """
    members = [_predict(network, image, window, device, mirroring) for network in networks]
    if len(members) == 1:
        return members[0]
    # The number of members cancels out of a sigmoid's logits, and is a constant in a softmax's.
    stacked = torch.stack(members)
    if overlapping:
        return logsigmoid(stacked).logsumexp(0) - logsigmoid(-stacked).logsumexp(0)
    return stacked.log_softmax(1).logsumexp(0) - math.log(len(members))


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
    offset = torch.tensor(offsets).reshape(-1, *[1] * (scores.dim() - 1))
    combined: Tensor = torch.tensordot(torch.tensor(weights), scores, 1)
    return combined + offset


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


def count_at_once(window: Sequence[int], usual: int) -> int:
    """Windows per call of the network: single slices are too little work to go one by one."""
    return max(usual, SLICE_PIXELS // math.prod(window)) if 1 in window else usual


def list_mirrorings(mirroring: Mirroring, window: Sequence[int]) -> list[tuple[int, ...]]:
    """Every set of axes to mirror, none among them; an axis of a single voxel is in none."""
    axes = [axis for axis in mirroring.axes if window[axis] > 1]
    sets = (itertools.combinations(axes, number) for number in range(len(axes) + 1))
    return list(itertools.chain.from_iterable(sets))


def choose_half(device: torch.device) -> torch.dtype:
    """16 bits for the arithmetic of a GPU: with the range of float32 where it has them.

    What a network computes in bfloat16 may be too large for float16. GPUs that would only emulate
    bfloat16 do not have it.
    """
    with torch.cuda.device(device):
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def _predict(
    network: nn.Module,
    image: Tensor,
    window: Sequence[int],
    device: torch.device,
    mirroring: Mirroring | None,
) -> Tensor:
    is_gpu = device.type == "cuda"
    precision = choose_half(device) if is_gpu else torch.float32

    def run(batch: Tensor) -> Tensor:
        with torch.autocast(device.type, precision, enabled=is_gpu):
            logits: Tensor = network(batch)
        return logits.float()

    def forward(batch: Tensor) -> Tensor:
        if mirroring is None:
            return run(batch)
        total, flips = torch.zeros(()), list_mirrorings(mirroring, window)
        for axes in flips:
            dims = [axis + 2 for axis in axes]
            logits = run(batch.flip(dims)).flip(dims)
            # What the mirror shows as left is right.
            total = total + (logits[:, list(mirroring.outputs)] if 0 in axes else logits)
        return total / len(flips)

    logits = sliding_window_inference(
        image[None],
        roi_size=tuple(window),
        sw_batch_size=count_at_once(window, 4 if is_gpu else 1),
        predictor=forward,
        overlap=OVERLAP,
        mode="gaussian",
        sigma_scale=SIGMA_SCALE,
        sw_device=device,
        device=torch.device("cpu"),
    )
    if not isinstance(logits, Tensor):
        raise TypeError("the network returned no single tensor in eval mode")
    return logits[0]
