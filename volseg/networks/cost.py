"""What a network costs, counted on tensors without values: nothing is computed or allocated."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from volseg.networks.network import SegmentationNetwork


@dataclass(frozen=True)
class NetworkCost:
    """One image through a network.

    Attributes:
        parameters: numbers that are learnt.
        gflop: multiplications and additions of all convolutions, forward, in 10^9.
        training_mb: feature maps in float32 that a training step keeps for its backward pass.
    """

    parameters: int
    gflop: float
    training_mb: float


def count_cost(network: SegmentationNetwork, size: Sequence[int]) -> NetworkCost:
    """Count parameters, operations and memory for one image.

    Args:
        network: stays as it is.
        size: of the image, voxels per axis.

    Raises:
        ConfigError: a size that the network cannot take.

    >>> from volseg.networks import UNet
    >>> count_cost(UNet(2, 1, 2, channels=(8, 16)), (32, 32)).parameters
    6562
    """
    shadow = copy.deepcopy(network).to("meta").train()
    # Two images, since a normalisation may refuse a single value in training.
    image = torch.zeros(2, network.in_channels, *size, device="meta")
    kept: dict[int, torch.UntypedStorage] = {}
    own = {parameter.untyped_storage()._cdata for parameter in shadow.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    counter = FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counter:
        shadow(image)
    return NetworkCost(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        gflop=counter.get_total_flops() / len(image) / 1e9,
        training_mb=sum(storage.nbytes() for storage in kept.values()) / len(image) / 1e6,
    )
