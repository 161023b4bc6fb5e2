"""What a planned network costs: operations and feature maps; counted, not measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from volseg.planning.architectures import find_architecture
from volseg.planning.machine import Machine
from volseg.planning.plan import NetworkPlan

NUM_CONVS = 2
"""Convolutions per level, in the encoder and in the decoder."""


@dataclass(frozen=True)
class Cost:
    """One image of the given size through the network, forward."""

    gflop: float
    feature_mvoxels: float
    """Outputs of all convolutions, in millions of elements."""

    def step_seconds(self, machine: Machine, batch_size: int) -> float:
        """Time of one training step, forward and backward."""
        one = self.gflop * machine.seconds_per_gflop
        return batch_size * (one + self.feature_mvoxels * machine.seconds_per_mvoxel)

    def training_gb(self, batch_size: int) -> float:
        """Memory of one training step: convolution, norm and gradient of each feature map."""
        copies, bytes_per_element = 3, 4
        return batch_size * self.feature_mvoxels * copies * bytes_per_element / 1e3


def compute_cost(
    network: NetworkPlan, patch: Sequence[int], in_channels: int, num_classes: int
) -> Cost:
    """Count a U-Net's multiplications and feature maps on one patch, and scale to the network's."""
    flop, elements = 0.0, 0.0
    size = list(patch)
    previous = in_channels
    for level, channels in enumerate(network.channels):
        size = [n // s for n, s in zip(size, network.strides[level], strict=True)]
        voxels = math.prod(size)
        kernel = math.prod(network.kernel_sizes[level])
        inputs = previous + (NUM_CONVS - 1) * channels
        flop += 2 * voxels * kernel * inputs * channels
        elements += NUM_CONVS * voxels * channels
        if level < len(network.channels) - 1:
            coarser = network.channels[level + 1]
            # Decoder: transposed convolution, then convolutions on [up, skip], then the head.
            flop += 2 * voxels * coarser * channels
            flop += 2 * voxels * kernel * (NUM_CONVS + 1) * channels * channels
            flop += 2 * voxels * channels * num_classes
            elements += (NUM_CONVS + 1) * voxels * channels + voxels * num_classes
        previous = channels
    operations, memory = find_architecture(network.name).scale(network.options)
    return Cost(gflop=flop / 1e9 * operations, feature_mvoxels=elements / 1e6 * memory)
