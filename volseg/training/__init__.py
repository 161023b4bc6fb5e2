"""From a dataset to a run folder: plan, cache, engine, checkpoints, history."""

from volseg.training.history import has_ended
from volseg.training.train import train

__all__ = ["has_ended", "train"]
