"""What volseg and nnU-Net reach in the same minutes, and how many minutes a Dice takes either.

``python benchmarks/train_against_nnunet.py DATASET OUTPUT --peer-python VENV/bin/python``

nnU-Net is installed in an environment of its own (``pip install torch==2.13.0
nnunetv2==2.8.1``). Three sides:

- ``volseg``: ``volseg train --minutes T``, with its own plan;
- ``nnunet``: nnU-Net with the plan, the trainer and the schedule of its defaults, stopped after T;
- ``nnunet, fitted``: nnU-Net on volseg's patch, batch and widths, with a learning rate that ends
  with T and nothing but training steps in its time (see `FittedTrainer`).

Before its learning rate has come down a training shows little of what it is going to reach, and a
curve over one long training would be no answer: each T is a training of its own, scored at its end.
All sides train on volseg's fold 0, predict the cases of its validation on their own grid (nnU-Net
with its mirrored passes, volseg without), and are scored by ``volseg evaluate``. Reading, planning
and preprocessing are not in T and printed apart. The sides take turns. Nothing else should run
beside it. What OUTPUT holds already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from training_runs import (
    Recipe,
    find_splits,
    name_folder,
    read,
    read_scores,
    remake,
    report,
    run_logged,
    score,
    train,
)

from volseg.atomic import write_json
from volseg.data.cases import Dataset
from volseg.data.layouts import find_dataset
from volseg.images import read_header
from volseg.planning.plan import Plan
from volseg.training.precision import choose_precision

PEER = Path(__file__).with_name("nnunet_peer.py")
PEER_DATASET = "Dataset001_Benchmark"
VOLSEG, DEFAULT, FITTED = SIDES = ("volseg", "nnunet", "nnunet, fitted")
WORLD_AXES = {"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}
CONVOLUTIONS_PER_LEVEL = 2
"""Of volseg's U-Net, and of nnU-Net's."""


@dataclass(frozen=True)
class Row:
    """What one side reached in one training; `asked` minutes were given.

    `steps_per_second` leaves validations out; `waiting` is the share of that time in which steps
    waited for their batches.
    """

    side: str
    asked: float
    seed: int
    minutes: float
    preparation_s: float
    steps: int
    steps_per_second: float
    waiting: float
    parameters: int
    dice: float
    dice_by_class: dict[str, float | None]


@dataclass(frozen=True)
class Span:
    """A time that is known exactly (`low` is `high`), or only to lie between two."""

    low: float
    high: float

    def __truediv__(self, other: Span) -> Span:
        return Span(
            self.low / other.high if other.high else math.inf,
            self.high / other.low if other.low else math.inf,
        )

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.low:.1f}"
        if self.high < math.inf:
            return f"< {self.high:.1f}"
        return f"> {self.low:.1f}" if self.low > 0 else "unknown"


def find_minutes_to(threshold: float, curve: Sequence[tuple[float, float]]) -> Span:
    """When a side reaches a Dice, between two trainings linear in the logarithm of their time.

    Args:
        threshold: the Dice.
        curve: minutes and Dice of each training, minutes ascending.
    """
    for (before, lower), (minutes, dice) in zip([(0.0, -math.inf), *curve], curve, strict=False):
        if dice >= threshold:
            if not before:
                return Span(0, minutes)
            share = (threshold - lower) / (dice - lower)
            reached = before * (minutes / before) ** share
            return Span(reached, reached)
    return Span(curve[-1][0], math.inf)


class Peer:
    """nnU-Net in its own environment, on one dataset.

    Args:
        python: of that environment.
        folder: for everything that nnU-Net writes.
        path: the dataset.
        workers: processes that augment; None leaves it to nnU-Net.
        device: of the trainings.
    """

    def __init__(
        self, python: Path, folder: Path, path: Path, workers: int | None, device: str = "cpu"
    ) -> None:
        self.python, self.folder, self.path, self.workers = python, folder, path, workers
        self.device = device
        self.dataset = find_dataset(path)
        self.threads = torch.get_num_threads()

    def run(self, command: str, result: Path, results: Path, *words: str) -> dict[str, Any]:
        """Run a command of ``nnunet_peer.py``; what it prints goes to ``log.txt`` in `results`."""
        variables = {
            "nnUNet_raw": str(self.folder / "raw"),
            "nnUNet_preprocessed": str(self.folder / "preprocessed"),
            "nnUNet_results": str(results / "results"),
            "nnUNet_def_n_proc": str(self.threads),
        }
        # Planning fails where this is 0, and does not need it.
        if self.workers is not None and command == "train":
            variables["nnUNet_n_proc_DA"] = str(self.workers)
        options = ("--dataset", PEER_DATASET, "--threads", str(self.threads))
        line = [str(self.python), str(PEER), command, str(result), *options, *words]
        run_logged(line, results / "log.txt", os.environ | variables)
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    def describe(self) -> dict[str, str]:
        return self.run("describe", self.folder / "versions.json", self.folder)

    def prepare(self, plan: Plan) -> dict[str, Any]:
        """nnU-Net's own plan of the dataset, and how long all of it took, unless it was done."""
        result = self.folder / "prepared.json"
        if not result.exists():
            raw = self.folder / "raw" / PEER_DATASET
            remake(self.folder / "preprocessed")
            remake(raw)
            write_json(raw / "dataset.json", describe_raw(self.dataset, plan))
            splits = find_splits(self.path)
            write_json(
                raw / "splits_final.json",
                [{"train": s.train, "val": s.validation} for s in splits],
            )
            self.run("prepare", result, self.folder)
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    def train(self, side: str, plan: Plan, folder: Path, minutes: float, seed: int) -> None:
        """Train, predict and score, unless it was done."""
        result = folder / "result.json"
        if not result.exists():
            remake(folder)
            plans = self.prepare(plan)["plans"]
            if side == FITTED:
                plans = cut_plans(plans, plan, find_orientation(self.dataset))
            write_json(folder / "plans.json", plans)
            words = ["--plans", str(folder / "plans.json"), "--seed", str(seed)]
            words += ["--device", self.device]
            fitted = ["--fitted"] if side == FITTED else []
            self.run("train", result, folder, *words, "--minutes", str(minutes), *fitted)
        if not (folder / "scores").exists():
            predicted = Path(json.loads(result.read_text())["predicted"])
            score(predicted, self.path, folder)


def describe_raw(dataset: Dataset, plan: Plan) -> dict[str, Any]:
    """nnU-Net's ``dataset.json``, which may name files that lie elsewhere.

    Channels that volseg normalises as CT are called so, since nnU-Net goes by the name.
    """
    classes, first = dataset.classes, dataset.cases[0].images[0].name
    if classes.values != tuple(range(classes.num_classes)) or classes.regions or classes.candidates:
        raise SystemExit(f"{dataset.root}: this benchmark takes labels 0, 1, 2, ... alone.")
    if any(len(case.images) != len(dataset.channels) for case in dataset.cases):
        raise SystemExit(f"{dataset.root}: this benchmark takes one file per channel.")
    channels = ["CT" if n.scheme == "ct" else n.channel for n in plan.normalisation]
    return {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": {name: value for value, name in enumerate(classes.names)},
        "numTraining": len(dataset.cases),
        "file_ending": first[first.index(".") :],
        "dataset": {
            case.case_id: {"images": [*map(str, case.images)], "label": str(case.label)}
            for case in dataset.cases
        },
    }


def find_orientation(dataset: Dataset) -> str:
    """Of the first case's file axes, as in ``"RAS"``."""
    return read_header(dataset.cases[0].images[0])[0].orientation


def cut_plans(plans: Mapping[str, Any], plan: Plan, orientation: str) -> dict[str, Any]:
    """nnU-Net's plans with the patch, batch and U-Net of volseg's plan.

    nnU-Net reads the axes of a file backwards and then transposes them; volseg's plan has them in
    the order right, anterior, superior.
    """
    order = [WORLD_AXES[orientation[2 - axis]] for axis in plans["transpose_forward"]]

    def turn(levels: Sequence[Sequence[int]]) -> list[list[int]]:
        return [[level[axis] for axis in order] for level in levels]

    cut: dict[str, Any] = copy.deepcopy(dict(plans))
    cut["plans_name"] = "cutPlans"
    configuration, number = cut["configurations"]["3d_fullres"], len(plan.network.channels)
    configuration["patch_size"] = turn([plan.patch])[0]
    configuration["batch_size"] = plan.batch_size
    configuration["architecture"]["arch_kwargs"] |= {
        "n_stages": number,
        "features_per_stage": list(plan.network.channels),
        "strides": turn(plan.network.strides),
        "kernel_sizes": turn(plan.network.kernel_sizes),
        "n_conv_per_stage": [CONVOLUTIONS_PER_LEVEL] * number,
        "n_conv_per_stage_decoder": [CONVOLUTIONS_PER_LEVEL] * (number - 1),
    }
    return cut


def run_side(side: str, peer: Peer, folder: Path, minutes: float, seed: int) -> Row:
    """One training of one side, whose T minutes and seed have `folder`; volseg's comes first."""
    own = folder / VOLSEG
    if side == VOLSEG:
        train(Recipe(), peer.path, own, minutes, seed, peer.device)
        result = read(own)
        found = asdict(result)
    else:
        plan = Plan.read_yaml(own / "run" / "plan.yaml")
        peer.train(side, plan, folder / name_folder(side), minutes, seed)
        found = json.loads((folder / name_folder(side) / "result.json").read_text())
    mean, by_class = read_scores(folder / name_folder(side))
    return Row(
        side,
        asked=minutes,
        seed=seed,
        minutes=found["minutes"],
        preparation_s=found["preparation_s"],
        steps=found["steps"],
        steps_per_second=found.get("steps_per_second", math.nan),
        waiting=found.get("waiting", math.nan),
        parameters=found["parameters"],
        dice=mean,
        dice_by_class=by_class,
    )


def format_rows(rows: Sequence[Row]) -> str:
    names = list(rows[0].dice_by_class)
    head = ["side", "T", "seed", "minutes", "apart s", "steps", "steps/s", "waiting"]
    head += ["parameters", *names, "mean Dice"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in sorted(rows, key=lambda row: (SIDES.index(row.side), row.asked, row.seed)):
        by_class = ["-" if dice is None else f"{dice:.3f}" for dice in row.dice_by_class.values()]
        figures = [
            f"{row.asked:g}",
            str(row.seed),
            f"{row.minutes:.2f}",
            f"{row.preparation_s:.0f}",
        ]
        figures += [f"{row.steps:,}", f"{row.steps_per_second:.2f}", f"{row.waiting:.1%}"]
        figures += [f"{row.parameters:,}", *by_class, f"{row.dice:.3f}"]
        lines.append(f"| {row.side} | {' | '.join(figures)} |")
    return "\n".join(lines)


def format_minutes(rows: Sequence[Row], thresholds: Sequence[float]) -> str:
    """Minutes to each Dice by side, from means over the seeds, and how many times volseg's."""
    times = {
        side: [find_minutes_to(t, draw_curve(rows, side)) for t in thresholds] for side in SIDES
    }
    head = ["mean Dice", *SIDES, *(f"{side} / {VOLSEG}" for side in SIDES[1:])]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for number, threshold in enumerate(thresholds):
        spans = [times[side][number] for side in SIDES]
        cells = [*spans, *(span / spans[0] for span in spans[1:])]
        lines.append(f"| {threshold:g} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def draw_curve(rows: Sequence[Row], side: str) -> list[tuple[float, float]]:
    """Minutes and mean Dice of a side, each the mean over the seeds."""
    own = [row for row in rows if row.side == side]
    groups = [[row for row in own if row.asked == asked] for asked in {row.asked for row in own}]
    return sorted(
        (statistics.mean(row.minutes for row in group), statistics.mean(row.dice for row in group))
        for group in groups
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path)
    parser.add_argument("output", type=Path, help="folder for everything")
    parser.add_argument("--peer-python", type=Path, required=True, help="python with nnunetv2")
    parser.add_argument(
        "--peer-workers", type=int, help="that augment; by default nnU-Net's choice"
    )
    parser.add_argument("--minutes", type=float, nargs="+", default=[2, 4, 8, 15], metavar="T")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument(
        "--thresholds", type=float, nargs="+", default=[0.80, 0.85, 0.87, 0.88], metavar="DICE"
    )
    parser.add_argument("--device", default="cpu", help="of all trainings")
    arguments = parser.parse_args()
    output = arguments.output.absolute()
    # Not resolved: an environment's python is a link, and where it lies decides what it imports.
    python, dataset = arguments.peer_python.absolute(), arguments.dataset.absolute()
    device = torch.device(arguments.device)
    peer = Peer(python, output / "nnunet", dataset, arguments.peer_workers, arguments.device)
    print(*(f"{key}: {value}" for key, value in describe_machine(device.type).items()), sep="\n")
    print(f"volseg's precision: {choose_precision('auto', device)}")
    print(*(f"peer's {key}: {value}" for key, value in peer.describe().items()), sep="\n")
    rows = []
    for seed in arguments.seeds:
        for minutes in sorted(arguments.minutes):
            folder = output / f"seed_{seed}" / f"{minutes:g}_minutes"
            for side in SIDES:
                rows.append(run_side(side, peer, folder, minutes, seed))
                report(f"{side}, {minutes:g} minutes, seed {seed}: {rows[-1].dice:.3f}")
    prepared = json.loads((peer.folder / "prepared.json").read_text())
    print(f"nnU-Net's planning and preprocessing: {prepared['seconds']:.0f} s\n")
    print(format_rows(rows), format_minutes(rows, arguments.thresholds), sep="\n\n")


if __name__ == "__main__":
    main()
