"""Losses on logits: what a training minimises.

Logits ``(B, K, *S)`` and an integer class target go in, a scalar comes out.
"""

from __future__ import annotations

from volseg.losses.dice_cross_entropy import DiceCrossEntropy
from volseg.losses.multi_level import MultiLevelLoss

__all__ = ["DiceCrossEntropy", "MultiLevelLoss"]
