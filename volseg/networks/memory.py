"""Less memory in training: feature maps that are computed twice instead of kept."""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from volseg.networks.encoder import ResidualBlock
from volseg.networks.hypercolumn_unet import ResidualStage
from volseg.networks.laddernet import SharedBlock
from volseg.networks.layers import ConvStack
from volseg.networks.resnet_unet import PreActivationUnit

BLOCKS = (ConvStack, ResidualBlock, ResidualStage, SharedBlock, PreActivationUnit)


def can_recompute(network: nn.Module) -> bool:
    """Whether the network has blocks that `recompute_` knows."""
    return any(isinstance(module, BLOCKS) for module in network.modules())


def recompute_(network: nn.Module) -> None:
    """Let the blocks of a network keep their inputs alone for the backward pass.

    The gradients are the same; a step takes about a third longer. Running statistics of batch
    normalisation are updated twice per step, and so follow the data faster.

    Args:
        network: changed in place, also amid a training; weights and their names stay.
    """
    for module in network.modules():
        if isinstance(module, BLOCKS):
            module.forward = functools.partial(  # type: ignore[method-assign]
                checkpoint, module.forward, use_reentrant=False
            )
