"""What every network reaches on a dataset in the same few minutes.

``python benchmarks/train_networks.py DATASET OUTPUT --minutes 5``

Each network is planned, trained on fold 0, and scored on the cases that it has not seen, by the
commands that a user types, at the widths that the planner chooses for the machine and the time.
Nothing else should run beside it. What OUTPUT holds already is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from volseg.inference.model import build_planned_network
from volseg.planning.plan import Plan

RUNS = {
    "unet": ["network.name=unet"],
    "unet, single output": ["network.name=unet", "network.deep_supervision=false"],
    "unet_original": ["network.name=unet_original"],
    "unet_keras": ["network.name=unet_keras"],
    "unet3d_original": ["network.name=unet3d_original"],
    "unet3d_deep_supervision": ["network.name=unet3d_deep_supervision"],
    "dsn3d": ["network.name=dsn3d"],
    "dsn3d, single output": ["network.name=dsn3d", "network.deep_supervision=false"],
    "unet_summed_logits": ["network.name=unet_summed_logits"],
    "unetplusplus": ["network.name=unetplusplus"],
    "unetplusplus, single output": ["network.name=unetplusplus", "network.deep_supervision=false"],
    "laddernet": ["network.name=laddernet"],
    "resnet_unet": ["network.name=resnet_unet"],
    "hypercolumn_unet": ["network.name=hypercolumn_unet"],
    "unet, residual encoder": ["network.name=unet", "network.options.encoder=residual"],
    "unet3d_deep_supervision, encoder's levels": [
        "network.name=unet3d_deep_supervision",
        "network.options.supervision=encoder",
    ],
    "unetplusplus, Keras form": ["network.name=unetplusplus", "network.options.form=keras"],
}


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


def volseg(log: Path, *arguments: str) -> None:
    """Run a command; what it prints goes to `log`."""
    command = [sys.executable, "-m", "volseg", *arguments]
    with log.open("a") as file:
        subprocess.run(command, stdout=file, stderr=file, check=True)


def run(label: str, dataset: Path, output: Path, minutes: float) -> Result:
    """Train, predict and score one network, unless it was."""
    folder = output / label.replace(", ", "-").replace(" ", "_").replace("'", "")
    folder.mkdir(parents=True, exist_ok=True)
    training, predicted, scores, log = (
        folder / name for name in ("run", "predicted", "scores", "log.txt")
    )
    if not (scores / "summary.json").exists():
        settings = [word for setting in RUNS[label] for word in ("--set", setting)]
        volseg(
            log, "train", str(dataset), "-o", str(training), "--fold", "0", "--minutes",
            str(minutes), *settings,
        )  # fmt: skip
        volseg(log, "predict", str(training), "--validation", "-o", str(predicted))
        volseg(log, "evaluate", str(predicted), str(dataset), "-o", str(scores))
    return read(label, training, scores)


def read(label: str, training: Path, scores: Path) -> Result:
    plan = Plan.read_yaml(training / "plan.yaml")
    summary = json.loads((scores / "summary.json").read_text())
    last = json.loads((training / "fold_0" / "history.jsonl").read_text().splitlines()[-1])
    network = build_planned_network(plan, num_classes=1 + len(summary["classes"]))
    return Result(
        label=label,
        widths=f"{plan.network.channels[0]} to {plan.network.channels[-1]}",
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        minutes=last["minutes"],
        steps=last["step"],
        dice=summary["mean_dice"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("output", type=Path, help="folder for runs, predictions and scores")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--names", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    arguments = parser.parse_args()
    print("| network | widths | parameters | seconds per step | steps | mean Dice |")
    print("|---|---|---|---|---|---|")
    for label in arguments.names:
        print(run(label, arguments.dataset, arguments.output, arguments.minutes), flush=True)


if __name__ == "__main__":
    main()
