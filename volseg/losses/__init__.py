"""Losses on logits: what a training minimises.

Logits ``(B, K, *S)`` and a target go in, a scalar comes out. The target is integer class indices
``(B, *S)`` or ``(B, 1, *S)``, or soft: the share of each channel in each voxel, ``(B, K, *S)``.
"""

from __future__ import annotations

from volseg.losses.binary_cross_entropy_dice import BinaryCrossEntropyDice
from volseg.losses.boundary import BoundaryLoss
from volseg.losses.centreline_dice import CentrelineDice
from volseg.losses.dice_cross_entropy import DiceCrossEntropy
from volseg.losses.dice_focal import DiceFocal
from volseg.losses.hausdorff import HausdorffLoss
from volseg.losses.multi_level import MultiLevelLoss
from volseg.losses.own import OwnLoss
from volseg.losses.regions import RegionLoss
from volseg.losses.registry import (
    build_boundary_term,
    build_loss,
    list_boundary_terms,
    list_losses,
)
from volseg.losses.scheduled import ScheduledTerm
from volseg.losses.soft_dice import SoftDice
from volseg.losses.surface import SurfaceLoss
from volseg.losses.tversky import Tversky

__all__ = [
    "BinaryCrossEntropyDice",
    "BoundaryLoss",
    "CentrelineDice",
    "DiceCrossEntropy",
    "DiceFocal",
    "HausdorffLoss",
    "MultiLevelLoss",
    "OwnLoss",
    "RegionLoss",
    "ScheduledTerm",
    "SoftDice",
    "SurfaceLoss",
    "Tversky",
    "build_boundary_term",
    "build_loss",
    "list_boundary_terms",
    "list_losses",
]
