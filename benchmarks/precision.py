"""What 16 bits change in a trained model's label maps: ``python benchmarks/precision.py RUN``.

Predicts the validation cases of a fold in float32 and in what `Options(precision="auto")` chooses
on this machine, and compares label maps with each other and with the references. Seconds are of the
whole prediction of a case, file to label map, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from machine import describe_machine
from numpy.typing import NDArray

from volseg.data.cases import Dataset
from volseg.data.splits import read_splits
from volseg.images import read_labels
from volseg.inference import Options, Predictor
from volseg.run_folder import DATASET_FILE, RunFolder, select_cases

FORMATS = ("float32", "auto")


def dice(one: NDArray[np.integer], other: NDArray[np.integer], values: tuple[int, ...]) -> float:
    """Mean over the values that occur in either."""
    sums = [((one == v) & (other == v)).sum() for v in values]
    sizes = [(one == v).sum() + (other == v).sum() for v in values]
    return float(np.mean([2 * a / b for a, b in zip(sums, sizes, strict=True) if b]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--cases", type=int, help="the first so many; all by default")
    arguments = parser.parse_args()
    dataset = Dataset.read_json(arguments.run / DATASET_FILE)
    split = read_splits(RunFolder(arguments.run).splits, dataset.cases)[arguments.fold]
    cases = select_cases(dataset, split.validation)[: arguments.cases]
    values = dataset.classes.values[1:]
    predictors = [
        Predictor.load(arguments.run, folds=(arguments.fold,), options=Options(precision=name))
        for name in FORMATS
    ]
    same = total = 0
    seconds: list[tuple[float, ...]] = []
    scores: list[tuple[float, ...]] = []
    for case in cases:
        reference = read_labels(case.label).array[0]
        found, times = [], []
        for predictor in predictors:
            start = time.perf_counter()
            found.append(predictor(case.images).labels)
            times.append(time.perf_counter() - start)
        same, total = same + int((found[0] == found[1]).sum()), total + found[0].size
        seconds.append(tuple(times))
        scores.append(
            (*(dice(labels, reference, values) for labels in found), dice(*found, values))
        )
    print(*(f"{key}: {value}" for key, value in describe_machine("cpu").items()), sep="\n")
    exact, fast, between = np.mean(scores, axis=0)
    speed = statistics.median(slow / quick for slow, quick in seconds)
    print(f"\n{len(cases)} cases; {same / total:.4%} of the voxels have the same label")
    print(f"mean Dice to the references: {exact:.4f} in float32, {fast:.4f} in 16 bits")
    print(f"mean Dice between both: {between:.4f}, lowest {min(s[2] for s in scores):.4f}")
    print(f"float32 takes {speed:.2f} times as long (median over the cases)")


if __name__ == "__main__":
    main()
