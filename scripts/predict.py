"""Predict by the Python interface: ``python scripts/predict.py RUN OUT image.nii.gz ...``.

The model is loaded once and called on one image after another; ``volseg predict`` has more options.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import volseg
from volseg.errors import DataError, VolsegError
from volseg.images import image_stem


def main() -> int:
    """Read the arguments and predict; 0, or 3 if an image was bad."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="run folder or bundle")
    parser.add_argument("output", type=Path, help="folder for label maps")
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    predictor = volseg.Predictor.load(arguments.model, device=arguments.device)
    code = 0
    for image in arguments.images:
        target = arguments.output / f"{image_stem(image)}.nii.gz"
        if target.exists():
            parser.error(f"{target} exists; choose another output folder")
        try:
            predictor(image).save(target)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            code = error.exit_code
        else:
            print(target)
    return code


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        sys.exit(main())
    except VolsegError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
