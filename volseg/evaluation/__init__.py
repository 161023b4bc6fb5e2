"""How well predictions agree with references: numbers here, figures in `pictures`."""

from __future__ import annotations

from volseg.evaluation.evaluate import Evaluation, evaluate
from volseg.evaluation.metrics import compute_dice

__all__ = ["Evaluation", "compute_dice", "evaluate"]
