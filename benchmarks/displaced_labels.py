"""Which references lie beside their image: ``displaced_labels.py PREDICTED DATASET``.

Moves each predicted label map by whole voxels, at most one along each axis, and says where it fits
its reference best. A prediction that follows the image and gains much by a move has a reference
that was drawn elsewhere, and no training recipe can know where. Nothing is to be gained from it for
the scores of a model: it says how far the references themselves can be trusted.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from precision import dice

from volseg.data.layouts import find_dataset
from volseg.evaluation.evaluate import find_labels
from volseg.images import read_labels

LEAST_GAIN = 0.005
"""Of Dice by a move that counts: less is gained by chance, since the best of 27 is taken."""


def score_moves(
    prediction: NDArray[np.integer], reference: NDArray[np.integer], values: tuple[int, ...]
) -> dict[tuple[int, ...], float]:
    """Mean Dice by the move of the prediction, in voxels."""
    prediction, reference = np.pad(prediction, 1), np.pad(reference, 1)
    moves = itertools.product((-1, 0, 1), repeat=prediction.ndim)
    axes = tuple(range(prediction.ndim))
    return {move: dice(np.roll(prediction, move, axes), reference, values) for move in moves}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("predicted", type=Path, help="folder with label maps, named like the cases")
    parser.add_argument("dataset", type=Path)
    arguments = parser.parse_args()
    dataset = find_dataset(arguments.dataset)
    labels = {case.case_id: case.label for case in dataset.cases if case.label is not None}
    print("| case | Dice | moved | by voxels |")
    print("|---|---|---|---|")
    scores = []
    for case_id, path in sorted(find_labels(arguments.predicted).items()):
        if case_id not in labels:
            raise SystemExit(f"{path} has no reference in {arguments.dataset}.")
        maps = [read_labels(each).array[0] for each in (path, labels[case_id])]
        if not any(each.any() for each in maps) or maps[0].shape != maps[1].shape:
            raise SystemExit(f"{path}: nothing to compare, or another grid than its reference.")
        moves = score_moves(*maps, dataset.classes.values[1:])
        best = max(moves, key=lambda move: moves[move])
        here = moves[(0,) * len(best)]
        is_displaced = moves[best] > here + LEAST_GAIN
        scores.append((here, moves[best] if is_displaced else here))
        if is_displaced:
            print(f"| {case_id} | {here:.3f} | {moves[best]:.3f} | {', '.join(map(str, best))} |")
    if not scores:
        raise SystemExit(f"{arguments.predicted} holds no label maps.")
    before, after = np.transpose(scores)
    print(f"\n{int((after > before).sum())} of {len(scores)} cases gain more than {LEAST_GAIN}.")
    print(f"Mean Dice {before.mean():.4f}; {after.mean():.4f} with those where they fit best.")


if __name__ == "__main__":
    main()
