"""What each part of the training recipe brings: one thing changed at a time.

``python benchmarks/ablate_recipe.py DATASET OUTPUT --minutes 5``

Each training is planned, run on fold 0, and scored on the cases that it has not seen, by the
commands that a user types. Nothing else should run beside it. What OUTPUT holds already is not run
again.
"""

from __future__ import annotations

from training_runs import run_all

STILL = [
    f"augmentation.{change}=0"
    for change in (
        "rotate",
        "scale",
        "noise",
        "blur",
        "brightness",
        "contrast",
        "gamma",
        "low_resolution",
    )
]
RUNS = {
    "recipe": [],
    "seed 1": ["training.seed=1"],
    "seed 2": ["training.seed=2"],
    "learning rate 1e-3": ["optimizer.learning_rate=1.0e-3"],
    "learning rate 6e-3": ["optimizer.learning_rate=6.0e-3"],
    "weight decay 1e-3": ["optimizer.weight_decay=1.0e-3"],
    "weight decay 5e-2": ["optimizer.weight_decay=5.0e-2"],
    "no moving average": ["optimizer.ema=0"],
    "moving average 0.1": ["optimizer.ema=0.1"],
    "no warm-up": ["optimizer.warmup=0"],
    "no augmentation": STILL,
    "rotation 0.6": ["augmentation.rotate=0.6"],
    "no deep supervision": ["network.deep_supervision=false"],
    "Dice alone": ["loss.cross_entropy_weight=0"],
    "cross-entropy alone": ["loss.dice_weight=0"],
    "batch of 4": ["plan.batch_size=4"],
    "batch of 1": ["plan.batch_size=1"],
    "foreground 0.33": ["training.foreground=0.33"],
    "foreground 1": ["training.foreground=1"],
    "pocket, width 24": ["plan.pocket=true", "plan.width=24"],
    "pocket, width 32": ["plan.pocket=true", "plan.width=32"],
    "width 24": ["plan.width=24"],
    "width 8": ["plan.width=8"],
    "descent with momentum": [
        "optimizer.name=sgd",
        "optimizer.learning_rate=1.0e-2",
        "optimizer.weight_decay=3.0e-5",
    ],
}

if __name__ == "__main__":
    run_all(RUNS, "What each part of the training recipe brings.")
