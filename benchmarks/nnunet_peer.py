"""nnU-Net's side of ``train_against_nnunet.py``; runs in nnU-Net's own environment, without volseg.

The folders come from nnU-Net's environment variables, as its commands take them. Each command
writes what it found to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprints,
    plan_experiments,
    preprocess,
)
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

CONFIGURATION = "3d_fullres"
PLANS = "nnUNetPlans"
WARM_UP = 5


class TimeIsUp(Exception):
    """The training has had its time."""


class TimedTrainer(nnUNetTrainer):
    """nnU-Net's trainer as it is, with a clock that ends it after a step.

    `stepped_s` counts steps alone, and `waited_s` of it what they waited for their batches.
    """

    limit_s = 0.0
    elapsed_s = 0.0
    steps = 0
    stepped_s = 0.0
    waited_s = 0.0
    _start: float | None = None
    _ready = 0.0

    def on_epoch_start(self) -> None:
        if self._start is None:
            self._start = time.monotonic()
        super().on_epoch_start()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._ready = time.monotonic()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        # Between two steps of an epoch the trainer does nothing but fetch a batch.
        self.waited_s += time.monotonic() - self._ready
        result = super().train_step(batch)
        self.stepped_s += time.monotonic() - self._ready
        self._ready = time.monotonic()
        self.steps += 1
        self._look_at_the_clock()
        return result

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        result = super().validation_step(batch)
        self._look_at_the_clock()
        return result

    def _look_at_the_clock(self) -> None:
        self.elapsed_s = time.monotonic() - self._start
        if self.elapsed_s >= self.limit_s:
            raise TimeIsUp

    def run_training(self) -> None:
        try:
            super().run_training()
        except TimeIsUp:
            self.on_train_end()


class FittedTrainer(TimedTrainer):
    """nnU-Net's trainer with a learning rate that ends with the time, and all time for its steps.

    Its polynomial decay goes by epochs. Here an epoch has `STEPS` steps instead of 250, and after
    each the number of epochs is set to what the time allows at the speed so far. Left out are the
    50 validation batches of an epoch, its picture and its checkpoint of the best: the last weights
    are the ones that are scored, as nnU-Net does by default.
    """

    STEPS = 5

    def on_train_start(self) -> None:
        self.num_iterations_per_epoch = self.STEPS
        self.num_val_iterations_per_epoch = 0
        self.num_epochs = sys.maxsize
        super().on_train_start()

    def on_train_epoch_start(self) -> None:
        if self.current_epoch:
            self.lr_scheduler.max_steps = self.current_epoch * self.limit_s / self.elapsed_s
        super().on_train_epoch_start()

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        pass

    def on_epoch_end(self) -> None:
        self.current_epoch += 1


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fingerprint, plan and preprocess as ``nnUNetv2_plan_and_preprocess`` does."""
    start = time.monotonic()
    number, processes = int(arguments.dataset[7:10]), torch.get_num_threads()
    extract_fingerprints([number], num_processes=processes)
    plan_experiments([number])
    preprocess([number], PLANS, (CONFIGURATION,), (processes,))
    plans = Path(nnUNet_preprocessed.get(), arguments.dataset, f"{PLANS}.json")
    return {"seconds": time.monotonic() - start, "plans": json.loads(plans.read_text())}


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train on fold 0 and predict its validation cases as ``nnUNetv2_train`` does."""
    # As its training command does on a GPU.
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(arguments.seed)
    np.random.seed(arguments.seed)
    random.seed(arguments.seed)
    plans = json.loads(arguments.plans.read_text())
    description = Path(nnUNet_preprocessed.get(), arguments.dataset, "dataset.json")
    trainer = (FittedTrainer if arguments.fitted else TimedTrainer)(
        plans={**plans, "continue_training": False},
        configuration=CONFIGURATION,
        fold=0,
        dataset_json=json.loads(description.read_text()),
        device=torch.device(arguments.device),
    )
    trainer.limit_s = 60 * arguments.minutes
    start = time.monotonic()
    trainer.run_training()
    trained = time.monotonic()
    trainer.perform_actual_validation()
    return {
        "minutes": trainer.elapsed_s / 60,
        "preparation_s": trained - start - trainer.elapsed_s,
        "prediction_s": time.monotonic() - trained,
        "steps": trainer.steps,
        "steps_per_second": trainer.steps / trainer.stepped_s,
        "waiting": trainer.waited_s / trainer.stepped_s,
        "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        "parameters": sum(parameter.numel() for parameter in trainer.network.parameters()),
        "predicted": str(Path(trainer.output_folder, "validation")),
    }


def step(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time its trainer's step on a batch of noise that lies on the device, after a warm-up."""
    torch.backends.cudnn.benchmark = True
    plans = json.loads(arguments.plans.read_text())
    configuration = plans["configurations"][CONFIGURATION]
    data = Path(nnUNet_preprocessed.get(), plans["dataset_name"], configuration["data_identifier"])
    data.mkdir(parents=True)
    # By its suffix the trainer knows its loader, which is not used.
    (data / "none.b2nd").touch()
    labels = {"background": 0, "a": 1, "b": 2}
    trainer = nnUNetTrainer(
        plans={**plans, "continue_training": False},
        configuration=CONFIGURATION,
        fold=0,
        dataset_json={"channel_names": {"0": "MR"}, "labels": labels, "file_ending": ".nii.gz"},
        device=torch.device(arguments.device),
    )
    trainer.initialize()
    trainer.network.train()
    lead, patch = (configuration["batch_size"], 1), configuration["patch_size"]
    sizes = [
        np.multiply(patch, s).round().astype(int) for s in trainer._get_deep_supervision_scales()
    ]
    targets = [
        torch.randint(0, len(labels), (*lead, *size), device=trainer.device).float()
        for size in sizes
    ]
    batch = {"data": torch.randn(*lead, *patch, device=trainer.device), "target": targets}
    for number in range(WARM_UP + arguments.steps):
        if number == WARM_UP:
            start = _look(trainer.device)
        trainer.train_step(batch)
    return {"steps_per_second": arguments.steps / (_look(trainer.device) - start)}


def _look(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    packages = ("nnunetv2", "torch", "dynamic-network-architectures", "batchgeneratorsv2")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("describe", "prepare", "train", "step"))
    parser.add_argument("result", type=Path, help="JSON file to write")
    parser.add_argument("--dataset", help="its name in nnU-Net's folders")
    parser.add_argument("--plans", type=Path, help="the file")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fitted", action="store_true", help="the schedule ends with the time")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    commands = {"describe": describe, "prepare": prepare, "train": train, "step": step}
    found = commands[arguments.command](arguments)
    arguments.result.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
