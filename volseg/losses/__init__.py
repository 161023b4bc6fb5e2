"""Losses on logits: what a training minimises.

Logits ``(B, K, *S)`` and a target go in, a scalar comes out. The target is integer class indices
``(B, *S)`` or ``(B, 1, *S)``, or soft: the share of each channel in each voxel, ``(B, K, *S)``.
"""

from __future__ import annotations

from volseg.losses.binary_cross_entropy_dice import BinaryCrossEntropyDice
from volseg.losses.dice_cross_entropy import DiceCrossEntropy
from volseg.losses.multi_level import MultiLevelLoss
from volseg.losses.own import OwnLoss
from volseg.losses.regions import RegionLoss
from volseg.losses.registry import build_loss, list_losses
from volseg.losses.soft_dice import SoftDice

__all__ = [
    "BinaryCrossEntropyDice",
    "DiceCrossEntropy",
    "MultiLevelLoss",
    "OwnLoss",
    "RegionLoss",
    "SoftDice",
    "build_loss",
    "list_losses",
]
