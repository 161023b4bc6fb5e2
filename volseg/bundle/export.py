"""Write a run folder as a MONAI bundle that ``python -m monai.bundle run`` executes.

The configuration names MONAI's transforms and inferer, and volseg's network and resampling. A
bundle's format is code by design, so ``configs/volseg.json`` holds the same facts as plain data,
and that is what `volseg.Predictor.load` reads.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch

from volseg._version import __version__
from volseg.atomic import write_json, write_text
from volseg.bundle.workflow import make_inference_config
from volseg.errors import ConfigError
from volseg.inference.model import (
    BUNDLE_FILE,
    BUNDLE_WEIGHTS,
    Checkpoint,
    ModelFacts,
    find_weights,
    read_facts,
)
from volseg.networks.weights import load_weights, save_weights


def export_bundle(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    fold: int | None = None,
    checkpoint: Checkpoint = "last",
) -> Path:
    """Export one fold of a run.

    Args:
        run: a run folder.
        output: a new or empty folder; it becomes the bundle's root.
        fold: which fold; may be left out if only one was trained.
        checkpoint: ``last`` or ``best``.

    Returns:
        The bundle's root.

    Raises:
        ConfigError: `output` is not empty, or the fold is not clear or not trained.
    """
    run, output = Path(run), Path(output)
    if (run / BUNDLE_FILE).exists():
        raise ConfigError(f"{run} is a bundle already; expected a run folder. Copy it instead.")
    facts = read_facts(run)
    weights = find_weights(run, None if fold is None else (fold,), checkpoint)
    if len(weights) > 1:
        folds = ", ".join(path.parent.name for path in weights)
        raise ConfigError(
            f"{run} has several trained folds ({folds}); a bundle holds one. Name it with --fold."
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is not empty; nothing was written. Choose another folder.")
    config = make_inference_config(facts)
    state = load_weights(weights[0])["network"]
    save_weights(output / BUNDLE_WEIGHTS, state)
    write_json(output / "configs" / "inference.json", config)
    write_json(output / "configs" / "metadata.json", _metadata(facts, output.name))
    write_text(output / "docs" / "README.md", _readme(facts, output.name))
    write_text(output / "LICENSE", _LICENSE_NOTE)
    # Last, since this file is what makes the folder a model for volseg.
    facts.write_json(output / BUNDLE_FILE)
    return output


def _metadata(facts: ModelFacts, name: str) -> dict[str, Any]:
    plan, classes = facts.plan, facts.classes
    spatial_shape = list(plan.patch)
    is_ct = all(n.scheme == "ct" for n in plan.normalisation)
    return {
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by volseg {__version__}"},
        "name": name,
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"volseg": __version__, "nibabel": "5.2"},
        "task": "segmentation of " + ", ".join(classes.names[1:]),
        "description": f"{plan.network.name} trained with volseg {__version__}",
        "authors": "the owner of this model",
        "copyright": "the owner of this model",
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "hounsfield" if is_ct else "magnitude",
                    "modality": "CT" if is_ct else "MR",
                    "num_channels": len(plan.normalisation),
                    "spatial_shape": spatial_shape,
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": dict(enumerate(plan.channel_names)),
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    "num_channels": classes.num_outputs,
                    "spatial_shape": spatial_shape,
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": dict(enumerate(classes.output_names)),
                }
            },
        },
    }


def _readme(facts: ModelFacts, name: str) -> str:
    classes = facts.classes
    rows = "\n".join(
        f"- {value}: {label}" for label, value in zip(classes.names, classes.values, strict=True)
    )
    return f"""# {name}

Segments {", ".join(classes.names[1:])}. Input channels: {", ".join(facts.plan.channel_names)}.
Label values in the result:

{rows}

With MONAI (volseg must be installed, it provides the network):

    python -m monai.bundle run --config_file configs/inference.json --bundle_root . \\
        --image patient.nii.gz --output_dir results

With volseg, which reads only data files of this folder and executes nothing from it:

    volseg predict . -i patient.nii.gz -o results
"""


_LICENSE_NOTE = """The licence of this model is for its owner to choose; replace this file.
The software that made it, volseg, is under the Apache License 2.0.
"""
