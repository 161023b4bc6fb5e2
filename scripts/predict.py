"""Predict from a checkout: ``python scripts/predict.py RUN OUT image.nii.gz ...``.

The model is loaded once and called on one image after another.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import volseg
from volseg.errors import VolsegError
from volseg.images import image_stem


def main() -> None:
    """Read the arguments and predict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="run folder or bundle")
    parser.add_argument("output", type=Path, help="folder for label maps")
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    predictor = volseg.Predictor.load(arguments.model, device=arguments.device)
    for image in arguments.images:
        target = arguments.output / f"{image_stem(image)}.nii.gz"
        if target.exists():
            parser.error(f"{target} exists; choose another output folder")
        predictor(image).save(target)
        print(target)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except VolsegError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
