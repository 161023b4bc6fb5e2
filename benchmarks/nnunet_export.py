"""nnU-Net's side of ``without_network.py``; runs in nnU-Net's own environment, without volseg."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


def score(image: torch.Tensor, number: int) -> torch.Tensor:
    """Parabolas as those of ``without_network.Slopes``, in half precision, as it predicts."""
    scores = torch.empty((number, *image.shape[1:]), dtype=torch.half)
    for place, top in enumerate(torch.linspace(-2, 2, number)):
        scores[place] = 2 * top * image[0] - top.square()
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--image", required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--classes", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = Path(arguments.image).with_name(f"nnunet_{arguments.classes}")
    description = json.loads((model / "dataset.json").read_text())
    plans = PlansManager(json.loads((model / "plans.json").read_text()))
    configuration = plans.get_configuration("3d_fullres")
    preprocessor = configuration.preprocessor_class(verbose=False)
    start = time.perf_counter()
    image, _, properties = preprocessor.run_case(
        [arguments.image], None, plans, configuration, description
    )
    prepared = time.perf_counter()
    scores = score(torch.as_tensor(image), arguments.classes)
    scored = time.perf_counter()
    target = str(arguments.output / "ct")
    export_prediction_from_logits(
        scores,
        properties,
        configuration,
        plans,
        description,
        target,
        num_threads_torch=arguments.threads,
    )
    # The scores stand for what its windows give, which take their time, too; they are not counted.
    seconds = prepared - start + time.perf_counter() - scored
    arguments.result.write_text(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
