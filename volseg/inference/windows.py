"""Overlapping windows over a prepared image: logits from patches that the network can take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

OVERLAP = 0.5
SIGMA_SCALE = 0.125
"""Width of the Gaussian weight as a share of the window, as in nnU-Net and MONAI."""


@torch.inference_mode()
def predict_scores(
    networks: Sequence[nn.Module], image: Tensor, window: Sequence[int], device: torch.device
) -> Tensor:
    """Scores ``(K, *S)`` float32 for a prepared image ``(C, *S)``, on the CPU.

    One network gives its logits, several the mean of their probabilities: the logits of
    different folds have no common scale.

    Args:
        networks: in eval mode on `device`.
        image: normalised, at the plan's spacing; an axis shorter than the window is zero-padded.
        window: voxels per axis.
        device: where the windows run.
    """
    members = [_predict(network, image, window, device) for network in networks]
    if len(members) == 1:
        return members[0]
    return torch.stack([member.softmax(0) for member in members]).mean(0)


def _predict(
    network: nn.Module, image: Tensor, window: Sequence[int], device: torch.device
) -> Tensor:
    def forward(batch: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=device.type == "cuda"):
            logits: Tensor = network(batch)
        return logits.float()

    logits = sliding_window_inference(
        image[None],
        roi_size=tuple(window),
        sw_batch_size=4 if device.type == "cuda" else 1,
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
