"""From a dataset to a run folder: plan, cache, engine, checkpoints, history."""

from volseg.training.train import has_ended, train

__all__ = ["has_ended", "train"]
