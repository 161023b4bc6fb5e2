"""Score by the Python interface: ``python scripts/evaluate.py PREDICTIONS REFERENCES OUT``.

Folders of label maps; ``volseg evaluate`` takes datasets too, and draws.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from volseg.errors import DataError, VolsegError
from volseg.evaluation import evaluate


def main() -> int:
    """Read the arguments and score; 0, or 3 if a case could not be scored."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("predictions", type=Path, help="folder of predicted label maps")
    parser.add_argument("references", type=Path, help="folder of reference label maps")
    parser.add_argument("output", type=Path, help="folder for metrics.csv and summary.json")
    arguments = parser.parse_args()
    for name in ("metrics.csv", "summary.json"):
        if (arguments.output / name).exists():
            parser.error(f"{arguments.output / name} exists; choose another output folder")
    evaluation = evaluate(arguments.predictions, arguments.references, arguments.output)
    for row in evaluation.summary.classes:
        dice = "-" if row.mean_dice is None else f"{row.mean_dice:.4f}"
        print(f"{row.class_name}: mean Dice {dice} over {row.num_cases} cases")
    for case_id, reason in evaluation.summary.failed.items():
        print(f"error: {case_id}: {reason}", file=sys.stderr)
    return DataError.exit_code if evaluation.summary.failed else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        sys.exit(main())
    except VolsegError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
