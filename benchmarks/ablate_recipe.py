"""What each part of the training recipe brings: one thing changed at a time.

``python benchmarks/ablate_recipe.py DATASET DATASET OUTPUT --minutes 5 --seeds 0 1 2
--config configs/nnunet.yaml``

Each training is run on fold 0 and scored on the cases that it has not seen, by the commands that a
user types. All have the plan that is made for the dataset, the machine and the time, so that a row
differs by what it names alone; ``--config`` adds rows for whole recipes. Every row is trained with
one seed before any is with the next, so that the machine's moods meet all of them. Nothing else
should run beside it. What OUTPUT holds already is not run again.
"""

from __future__ import annotations

from training_runs import run_all

SPATIAL = ("rotate", "scale", "flip")
INTENSITY = ("noise", "blur", "brightness", "contrast", "gamma", "low_resolution")


def without(names: tuple[str, ...]) -> list[str]:
    """Settings that switch these augmentations off."""
    return [f"augmentation.{name}=0" for name in names]


RUNS = {
    "recipe": [],
    "learning rate 3e-3": ["optimizer.learning_rate=3.0e-3"],
    "learning rate 2e-2": ["optimizer.learning_rate=2.0e-2"],
    "AdamW": ["optimizer.name=adamw"],
    "descent with momentum": ["optimizer.name=sgd"],
    "no weight decay": ["optimizer.weight_decay=0"],
    "weight decay 0.1": ["optimizer.weight_decay=0.1"],
    "weight decay 1": ["optimizer.weight_decay=1"],
    "no warm-up": ["optimizer.warmup=0"],
    "no moving average": ["optimizer.ema=0"],
    "moving average 0.1": ["optimizer.ema=0.1"],
    "no augmentation": without(SPATIAL + INTENSITY),
    "spatial augmentation alone": without(INTENSITY),
    "intensity augmentation alone": without(SPATIAL),
    "rotation 0.6": ["augmentation.rotate=0.6"],
    "mirrored": ["augmentation.flip=0.5"],
    "foreground 0": ["training.foreground=0"],
    "foreground 0.33": ["training.foreground=0.33"],
    "foreground 1": ["training.foreground=1"],
    "cross-entropy alone": ["loss.dice_weight=0"],
    "Dice alone": ["loss.cross_entropy_weight=0"],
    "Dice and focal loss": ["loss.name=dice_focal"],
    "Tversky loss": ["loss.name=tversky"],
    "with a surface term": ["loss.boundary=surface"],
    "no deep supervision": ["network.deep_supervision=false"],
    "pocket, width 24": ["plan.pocket=true", "plan.width=24"],
    "pocket, width 32": ["plan.pocket=true", "plan.width=32"],
    "batch of 1": ["plan.batch_size=1"],
    "batch of 4": ["plan.batch_size=4"],
}

if __name__ == "__main__":
    run_all(RUNS, "What each part of the training recipe brings.", shares_plan=True)
