"""Trainings as a user runs them, one after the other, and what each of them reached."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine

from volseg.atomic import write_json
from volseg.config import TrainingConfig, load_config
from volseg.data.cases import Dataset
from volseg.data.layouts import find_dataset
from volseg.data.splits import Split, choose_splits, write_splits
from volseg.evaluation.evaluate import find_labels
from volseg.inference.model import build_planned_network
from volseg.planning.plan import Plan
from volseg.run_folder import DATASET_FILE, RunFolder

FOLD = 0


@dataclass(frozen=True)
class Recipe:
    """What a training is given: a configuration file, and settings on top of it."""

    settings: tuple[str, ...] = ()
    config: Path | None = None

    def on_plan(self, plan: Plan) -> Recipe:
        """The same on a given plan, but for what the recipe itself says of the plan."""
        own = load_config(self.config, self.settings).plan.model_dump(exclude_none=True)
        fixed = {
            "spacing_mm": list(plan.spacing_mm),
            "patch": list(plan.patch),
            "batch_size": plan.batch_size,
            "width": plan.network.channels[0],
            "pocket": len(set(plan.network.channels)) == 1,
            "num_levels": len(plan.network.channels),
        }
        kept = {key: value for key, value in fixed.items() if key not in own}
        words = tuple(f"plan.{key}={json.dumps(value)}" for key, value in kept.items())
        return Recipe((*words, *self.settings), self.config)

    def words(self) -> list[str]:
        """Of the command line."""
        config = ["--config", str(self.config)] if self.config else []
        return [*config, *(word for setting in self.settings for word in ("--set", setting))]


@dataclass(frozen=True)
class Result:
    """Of one training.

    `minutes` took all of its `steps` and the validations between them. `preparation_s` is the rest
    of the command's time: start, planning, reading, writing. `steps_per_second` is without the
    validations, and `waiting` the share of that time in which steps waited for their batches.
    """

    widths: str
    parameters: int
    minutes: float
    preparation_s: float
    steps: int
    steps_per_second: float
    waiting: float
    dice: float
    dice_by_class: dict[str, float | None]


def run_all(runs: Mapping[str, Sequence[str]], description: str, shares_plan: bool = False) -> None:
    """Train each entry of `runs`, settings by label, and print a row for it.

    With `shares_plan` all follow the plan that is made for the time and the machine without any
    settings, but for what their own settings say of it.
    """
    arguments = parse_arguments(runs, description)
    recipes = {label: Recipe(tuple(runs[label])) for label in arguments.names}
    recipes |= {file.stem: Recipe(config=file) for file in arguments.config}
    results: dict[tuple[Path, str], list[Result]] = {}
    for seed in arguments.seeds:
        for dataset in arguments.datasets:
            place = arguments.output / dataset.name
            plan = make_plan(dataset, place / "plan", arguments) if shares_plan else None
            for label, recipe in recipes.items():
                folder = place / name_folder(label) / f"seed_{seed}"
                fixed = recipe.on_plan(plan) if plan else recipe
                train(fixed, dataset, folder, arguments.minutes, seed, arguments.device)
                result = read(folder)
                results.setdefault((dataset, label), []).append(result)
                report(f"{dataset.name}, {label}, seed {seed}: {result.dice:.3f}")
    machine = describe_machine(torch.device(arguments.device).type)
    print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n")
    print(f"minutes: {arguments.minutes:g}\nseeds: {' '.join(map(str, arguments.seeds))}")
    for dataset in arguments.datasets:
        print(f"\n{dataset.name}\n")
        print(format_table({label: results[dataset, label] for label in recipes}))


def parse_arguments(runs: Mapping[str, Sequence[str]], description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("datasets", type=Path, nargs="+", metavar="DATASET")
    parser.add_argument("output", type=Path, help="folder for runs, predictions and scores")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument("--names", nargs="+", choices=runs, default=list(runs), metavar="NAME")
    parser.add_argument(
        "--config", type=Path, nargs="+", default=[], metavar="FILE", help="further rows"
    )
    parser.add_argument("--device", default="cpu", help="of the trainings")
    return parser.parse_args()


def report(line: str) -> None:
    """To people who wait; tables go to standard output."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def name_folder(label: str) -> str:
    return label.replace(", ", "-").replace(" ", "_").replace("'", "")


def make_plan(dataset: Path, folder: Path, arguments: argparse.Namespace) -> Plan:
    """By ``volseg plan``, from timed steps as in a training, unless it was made."""
    path = RunFolder(folder).plan
    if not path.exists():
        remake(folder)
        words = ("--minutes", str(arguments.minutes), "--device", arguments.device)
        volseg(folder.parent, "plan", str(dataset), "-o", str(folder), *words)
    return Plan.read_yaml(path)


def train(
    recipe: Recipe,
    dataset: Path,
    folder: Path,
    minutes: float,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Train on fold 0 and score the cases that the training has not seen, unless it was done.

    A training that was cut off begins anew: its time was not undisturbed.
    """
    run = folder / "run"
    if not (folder / "training.json").exists():
        remake(run)
        # Another seed must not mean other cases.
        write_splits(RunFolder(run).splits, find_splits(dataset))
        length = ("--fold", str(FOLD), "--minutes", str(minutes), "--device", device)
        words = (*length, *recipe.words(), "--set", f"training.seed={seed}")
        start = time.monotonic()
        volseg(folder, "train", str(dataset), "-o", str(run), *words)
        write_json(folder / "training.json", {"wall_s": time.monotonic() - start})
    if not (folder / "scores").exists():
        remake(folder / "predicted")
        words = ["-o", str(folder / "predicted"), "--device", device]
        # As nnU-Net does, whose recipe mirrors: what has seen mirror images averages over them.
        if np.any(load_config(recipe.config, recipe.settings).augmentation.flip):
            words.append("--mirror")
        volseg(folder, "predict", str(run), "--validation", *words)
        score(folder / "predicted", dataset, folder)


def score(predicted: Path, dataset: Path, folder: Path) -> None:
    """Evaluate into ``scores`` in `folder`, which appears when all cases were scored."""
    unchecked = folder / "unchecked"
    remake(unchecked)
    volseg(folder, "evaluate", str(predicted), str(dataset), "-o", str(unchecked))
    summary = json.loads((unchecked / "summary.json").read_text())
    wanted = set(find_splits(dataset)[FOLD].validation)
    if find_labels(predicted).keys() != wanted or summary["num_cases"] != len(wanted):
        raise SystemExit(f"{predicted} does not hold a label map of each of {sorted(wanted)}.")
    unchecked.rename(folder / "scores")


def remake(folder: Path) -> None:
    """An empty folder: what an earlier attempt left in it is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def find_splits(dataset: Path) -> list[Split]:
    default = TrainingConfig()
    return choose_splits(find_dataset(dataset), default.num_folds, default.seed)


def volseg(folder: Path, *arguments: str) -> None:
    """Run a command; what it prints goes to ``log.txt`` in `folder`."""
    run_logged([sys.executable, "-m", "volseg", *arguments], folder / "log.txt")


def run_logged(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        done = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"`{' '.join(command)}` ended with code {done.returncode}; see {log}.")


def read(folder: Path) -> Result:
    """Take the figures from the files that the commands have written."""
    run = folder / "run"
    plan = Plan.read_yaml(run / "plan.yaml")
    classes = Dataset.read_json(run / DATASET_FILE).classes
    lines = (run / f"fold_{FOLD}" / "history.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    last, (steps_per_second, waiting) = rows[-1], summarise_pace(rows)
    wall_s = json.loads((folder / "training.json").read_text())["wall_s"]
    network = build_planned_network(plan, classes.num_outputs)
    mean, by_class = read_scores(folder)
    return Result(
        widths=f"{plan.network.channels[0]} to {plan.network.channels[-1]}",
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        minutes=last["minutes"],
        preparation_s=wall_s - 60 * last["minutes"],
        steps=last["step"],
        steps_per_second=steps_per_second,
        waiting=waiting,
        dice=mean,
        dice_by_class=by_class,
    )


def summarise_pace(rows: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Steps per second of a whole training, and the share of their time that waited for data.

    Args:
        rows: of its history, each about the steps since the one before.
    """
    ends = [row["step"] for row in rows]
    steps = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    spent = [n / row["steps_per_second"] for n, row in zip(steps, rows, strict=True)]
    waited = sum(s * row["waiting"] for s, row in zip(spent, rows, strict=True))
    return sum(steps) / sum(spent), waited / sum(spent)


def read_scores(folder: Path) -> tuple[float, dict[str, float | None]]:
    """Mean Dice, and Dice by class."""
    summary = json.loads((folder / "scores" / "summary.json").read_text())
    return summary["mean_dice"], {row["class_name"]: row["mean_dice"] for row in summary["classes"]}


def format_table(results: Mapping[str, Sequence[Result]]) -> str:
    """Means over the seeds; `range` and what a row gains are of the mean Dice.

    Seconds per step are with validations, steps per second and the share that waited without.
    """
    first = next(iter(results))
    base = [result.dice for result in results[first]]
    lines = [
        "| training | widths | parameters | seconds per step | steps per second | waiting | steps "
        f"| mean Dice | range | against {first} |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for label, rows in results.items():
        dice = [row.dice for row in rows]
        gain = statistics.mean(ours - theirs for ours, theirs in zip(dice, base, strict=True))
        seconds = statistics.mean(60 * row.minutes / row.steps for row in rows)
        speed = statistics.mean(row.steps_per_second for row in rows)
        waiting = statistics.mean(row.waiting for row in rows)
        steps = statistics.mean(row.steps for row in rows)
        lines.append(
            f"| {label} | {rows[0].widths} | {rows[0].parameters:,} | {seconds:.2f} | {speed:.2f} "
            f"| {waiting:.1%} | {steps:,.0f} "
            f"| {statistics.mean(dice):.3f} | {min(dice):.3f} to {max(dice):.3f} "
            f"| {'' if label == first else f'{gain:+.3f}'} |"
        )
    return "\n".join(lines)
