"""The words of the command line: one type per option or argument, with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

DatasetPath = Annotated[
    Path,
    typer.Argument(
        metavar="DATASET",
        help="Folder (MSD, nnU-Net raw, BraTS, images/ with labels/) or CSV/JSON datalist.",
    ),
]
ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="Run folder or bundle.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML configuration.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override, as in plan.width=16. Repeatable."),
]
Minutes = Annotated[float | None, typer.Option(help="Training time, validations included.")]
NetworkName = Annotated[
    str | None,
    typer.Option("--network", help="Name, or MODULE:FUNCTION of your own, which is imported."),
]
CheckpointName = Annotated[
    Literal["last", "best"], typer.Option("--checkpoint", help="Best by validation, or last.")
]

# Of `volseg predict`.
ResultsFolder = Annotated[Path, typer.Option("-o", "--output", help="Folder for label maps.")]
OtherModels = Annotated[
    list[Path] | None,
    typer.Option("--with", metavar="MODEL", help="Average with another model. Repeatable."),
]
Inputs = Annotated[
    list[Path] | None, typer.Option("-i", "--input", help="Image or folder. Repeatable.")
]
MoreInputs = Annotated[list[Path] | None, typer.Argument(metavar="[IMAGES]...")]
Validation = Annotated[
    bool, typer.Option("--validation", help="The run's validation cases, each by its fold.")
]
OneFold = Annotated[int | None, typer.Option(help="Use one fold of the run.")]
Suffix = Annotated[
    str | None,
    typer.Option(
        help="Format: .nii.gz (default), .nii, .nrrd, .seg.nrrd, .mha, .dcm; pictures: .png, .tif."
    ),
]
Probabilities = Annotated[bool, typer.Option("--probabilities", help="Write them too.")]
Uncertainty = Annotated[
    bool, typer.Option("--uncertainty", help="Write maps of entropy and disagreement too.")
]
Largest = Annotated[
    list[str] | None,
    typer.Option(metavar="CLASS", help="Keep its largest part alone; all. Repeatable."),
]
MinVolume = Annotated[
    list[str] | None,
    typer.Option(metavar="CLASS=ML", help="Drop its smaller parts; all=ML. Repeatable."),
]
Mirror = Annotated[
    bool, typer.Option("--mirror", help="Average over mirror images; up to 8 times slower.")
]
Step = Annotated[float, typer.Option(help="From window to window, as a share of the window.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results.")]
Roi = Annotated[
    Path | None, typer.Option(metavar="MODEL", help="Coarse model that says where to look.")
]
RoiMargin = Annotated[float, typer.Option(help="mm around what it finds.")]
Backend = Annotated[
    Literal["auto", "torch", "openvino", "onnxruntime", "tensorrt"],
    typer.Option(help="What computes the network; auto is measured once."),
]
Precision = Annotated[
    Literal["auto", "float32"],
    typer.Option(help="auto computes in 16 bits where the hardware gains by them."),
]
Memory = Annotated[str | None, typer.Option(help="That the process may take, as in 8GB.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; with --ray of each predictor (4).")]
Shard = Annotated[
    str | None, typer.Option(metavar="I/N", help="The I-th of N jobs that share the cases.")
]
RayAddress = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Over a Ray cluster; local: this machine.")
]
