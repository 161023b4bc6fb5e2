"""From a dataset to a run folder: plan, cache, engine, checkpoints, history."""

from volseg.training.train import train

__all__ = ["train"]
