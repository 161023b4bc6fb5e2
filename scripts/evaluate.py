"""Score from a checkout: ``python scripts/evaluate.py PREDICTIONS REFERENCES OUT``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from volseg.errors import VolsegError
from volseg.evaluation import evaluate


def main() -> None:
    """Read the arguments and score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("predictions", type=Path, help="folder of predicted label maps")
    parser.add_argument("references", type=Path, help="folder of reference label maps")
    parser.add_argument("output", type=Path, help="folder for metrics.csv and summary.json")
    arguments = parser.parse_args()
    evaluation = evaluate(arguments.predictions, arguments.references, arguments.output)
    for row in evaluation.summary.classes:
        dice = "-" if row.mean_dice is None else f"{row.mean_dice:.4f}"
        print(f"{row.class_name}: mean Dice {dice} over {row.num_cases} cases")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except VolsegError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
