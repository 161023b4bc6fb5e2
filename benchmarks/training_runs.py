"""Trainings as a user runs them, one after the other, and what each of them reached."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from volseg.data.cases import Dataset
from volseg.inference.model import build_planned_network
from volseg.planning.plan import Plan

HEADER = """\
| training | widths | parameters | seconds per step | steps | mean Dice |
|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Result:
    """Of one training: `minutes` took all of its `steps` and the validations between them."""

    label: str
    widths: str
    parameters: int
    minutes: float
    steps: int
    dice: float

    def __str__(self) -> str:
        seconds = 60 * self.minutes / self.steps
        return (
            f"| {self.label} | {self.widths} | {self.parameters:,} | {seconds:.2f} "
            f"| {self.steps:,} | {self.dice:.3f} |"
        )


def run_all(runs: Mapping[str, Sequence[str]], description: str) -> None:
    """Train each entry of `runs`, settings by label, and print a row for it.

    Nothing else should run beside it. What the output folder holds already is not run again.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("output", type=Path, help="folder for runs, predictions and scores")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--names", nargs="+", choices=runs, default=list(runs), metavar="NAME")
    arguments = parser.parse_args()
    print(HEADER)
    for label in arguments.names:
        folder = arguments.output / label.replace(", ", "-").replace(" ", "_").replace("'", "")
        train(runs[label], arguments.dataset, folder, arguments.minutes)
        print(read(label, folder), flush=True)


def train(settings: Sequence[str], dataset: Path, folder: Path, minutes: float) -> None:
    """Train on fold 0 and score the cases that the training has not seen, unless it was done."""
    run, predicted, scores = (folder / name for name in ("run", "predicted", "scores"))
    if (scores / "summary.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    words = [word for setting in settings for word in ("--set", setting)]
    length = ("--fold", "0", "--minutes", str(minutes))
    volseg(folder, "train", str(dataset), "-o", str(run), *length, *words)
    volseg(folder, "predict", str(run), "--validation", "-o", str(predicted))
    volseg(folder, "evaluate", str(predicted), str(dataset), "-o", str(scores))


def volseg(folder: Path, *arguments: str) -> None:
    """Run a command; what it prints goes to ``log.txt``."""
    command = [sys.executable, "-m", "volseg", *arguments]
    with (folder / "log.txt").open("a") as file:
        subprocess.run(command, stdout=file, stderr=file, check=True)


def read(label: str, folder: Path) -> Result:
    """Take the figures from the files that the commands have written."""
    run = folder / "run"
    plan = Plan.read_yaml(run / "plan.yaml")
    classes = Dataset.read_json(run / "dataset.json").classes
    summary = json.loads((folder / "scores" / "summary.json").read_text())
    last = json.loads((run / "fold_0" / "history.jsonl").read_text().splitlines()[-1])
    network = build_planned_network(plan, classes.num_outputs)
    return Result(
        label=label,
        widths=f"{plan.network.channels[0]} to {plan.network.channels[-1]}",
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        minutes=last["minutes"],
        steps=last["step"],
        dice=summary["mean_dice"],
    )
