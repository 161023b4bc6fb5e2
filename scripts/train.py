"""Train by the Python interface: ``python scripts/train.py DATASET RUN --minutes 15``.

A starting point for a script of your own; ``volseg train`` has more options.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import volseg
from volseg.config import load_config
from volseg.errors import VolsegError
from volseg.training import has_ended


def main() -> int:
    """Read the arguments and train; 0, or 130 if Ctrl-C ended it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path, help="dataset folder or datalist")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--config", type=Path, help="YAML, see configs/")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--fold", default="0", help="0, 1, ... or all")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    run = volseg.train(
        arguments.dataset,
        arguments.run,
        config=load_config(arguments.config, arguments.overrides),
        minutes=arguments.minutes,
        epochs=arguments.epochs,
        fold=arguments.fold,
        resume=arguments.resume,
        device=arguments.device,
    )
    print(run)
    return 0 if has_ended(run, arguments.fold) else 130


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        sys.exit(main())
    except VolsegError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
