"""The commands. Each imports what it needs inside, so that help and completion are instant."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from volseg._version import __version__
from volseg.cli import options as opt
from volseg.errors import DataError

if TYPE_CHECKING:
    from volseg.config import Config
    from volseg.planning import Machine

app = typer.Typer(
    name="volseg",
    help="Train and run volumetric medical image segmentation on your own CT and MR files.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    epilog="Every command takes --debug, which shows the traceback of an error.",
)


_INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended, as shells have it."""


def _version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"volseg {__version__}")
        raise typer.Exit


@app.callback()
def volseg(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    """Train and run volumetric medical image segmentation on your own CT and MR files."""


@app.command()
def check(
    dataset: opt.DatasetPath,
    config: opt.ConfigFile = None,
    overrides: opt.Overrides = None,
    as_json: opt.AsJson = False,
) -> None:
    """List what is wrong with a dataset, file by file, with the cure. Exit code 0 or 3."""
    from volseg.config import load_config
    from volseg.data.check import check_dataset
    from volseg.data.layouts import find_dataset
    from volseg.progress import show_progress

    data = load_config(config, overrides or ()).data
    found = find_dataset(dataset, data.optional_channels, complete=False).with_labels(data)
    with show_progress("Reading cases") as update:
        findings = check_dataset(found, update)
    errors = sum(finding.severity == "error" for finding in findings)
    if as_json:
        _print_json({"errors": errors, "findings": [f.model_dump(mode="json") for f in findings]})
    else:
        for finding in findings:
            typer.echo(
                f"{finding.severity}: {finding.file}: {finding.problem.rstrip('.')}. {finding.cure}"
            )
        classes = found.classes
        named = ", ".join(f"{n}={v}" for n, v in zip(classes.names, classes.values, strict=True))
        if classes.regions:
            regions = ", ".join(f"{r.name}={list(r.values)}" for r in classes.regions)
            named = f"{named}; regions {regions}"
        typer.echo(
            f"{found.name}: {found.layout} layout, {len(found.cases)} labelled and "
            f"{len(found.unlabelled)} unlabelled cases; channels {', '.join(found.channels)}; "
            f"labels {named}. {errors} errors, {len(findings) - errors} warnings."
        )
    _end(bool(errors))


@app.command()
def plan(
    dataset: opt.DatasetPath,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="RUN", help="Run folder.")],
    config: opt.ConfigFile = None,
    overrides: opt.Overrides = None,
    minutes: opt.Minutes = None,
    network: opt.NetworkName = None,
    device: Annotated[
        str | None,
        typer.Option(help="Time training steps on it; by default this CPU is estimated."),
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Write fingerprint.json and plan.yaml for a device and a time; edit before training."""
    from volseg.cli.own_code import take_code
    from volseg.config import load_config, with_length
    from volseg.planning import plan_run

    settings = load_config(config, [*(overrides or ()), *take_code(network)])
    settings = with_length(settings, minutes, None)
    planned = plan_run(dataset, output, settings, _choose_measure(device, settings))
    if as_json:
        _print_json(planned.plan.model_dump(mode="json"))
        return
    for line in planned.reasons:
        typer.echo(line)
    typer.echo(
        f"{output / 'plan.yaml'} is yours to edit before `volseg train`. For another device or "
        "time remove it, and plan with --device and --minutes."
    )


@app.command()
def train(
    dataset: opt.DatasetPath,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="RUN", help="Run folder.")],
    config: opt.ConfigFile = None,
    overrides: opt.Overrides = None,
    minutes: opt.Minutes = None,
    epochs: Annotated[int | None, typer.Option(help="Length in epochs instead.")] = None,
    fold: Annotated[str, typer.Option(help="Validation fold, or all for each in turn.")] = "0",
    patience: Annotated[
        int | None, typer.Option(help="End once so many validations give no better Dice.")
    ] = None,
    start_from: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="Begin with this model's plan and weights.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with a stopped one; extend a finished one by a length."
        ),
    ] = False,
    network: opt.NetworkName = None,
    loss: Annotated[
        str | None, typer.Option(help="Name, or MODULE:FUNCTION of your own, which is imported.")
    ] = None,
    log: Annotated[
        list[str] | None, typer.Option(help="tensorboard or mlflow, besides history. Repeatable.")
    ] = None,
    device: opt.Device = "auto",
    as_json: opt.AsJson = False,
) -> None:
    """Train on a dataset; the run folder can predict at any time, also after Ctrl-C (code 130)."""
    from volseg.cli.own_code import take_code, take_code_of
    from volseg.config import as_override, load_config

    flags = []
    if resume:
        take_code_of(output, network, loss)
    else:
        flags = take_code(network, loss)
    chosen = {
        "training.patience": patience,
        "training.start_from": None if start_from is None else str(start_from),
        "training.log": list(log) if log else None,
    }
    flags += [as_override(key, value) for key, value in chosen.items() if value is not None]
    settings = load_config(config, [*(overrides or ()), *flags])
    from volseg.training import has_ended as find_end
    from volseg.training import train as train_run

    run = train_run(
        dataset,
        output,
        config=settings,
        minutes=minutes,
        epochs=epochs,
        fold=fold,
        resume=resume,
        device=device,
    )
    if os.environ.get("RANK", "0") != "0":
        return  # Of torchrun's processes the first one reports.
    has_ended = find_end(run, fold)
    if as_json:
        _print_json({"run": str(run), "has_ended": has_ended})
    elif has_ended:
        typer.echo(f"trained: {run}. Predict with `volseg predict {run} -i IMAGES -o RESULTS`.")
    else:
        typer.echo(f"stopped: {run}, which can predict as it is. Go on with --resume.")
    # To torchrun it would be a failure, after which it may start all processes again.
    if not has_ended and os.environ.get("WORLD_SIZE", "1") == "1":
        raise typer.Exit(_INTERRUPTED)


@app.command()
def predict(
    model: opt.ModelPath,
    output: opt.ResultsFolder,
    other_models: opt.OtherModels = None,
    inputs: opt.Inputs = None,
    more: opt.MoreInputs = None,
    validation: opt.Validation = False,
    fold: opt.OneFold = None,
    checkpoint: opt.CheckpointName = "last",
    suffix: opt.Suffix = None,
    probabilities: opt.Probabilities = False,
    uncertainty: opt.Uncertainty = False,
    largest: opt.Largest = None,
    min_volume: opt.MinVolume = None,
    mirror: opt.Mirror = False,
    step: opt.Step = 0.5,
    overwrite: opt.Overwrite = False,
    roi: opt.Roi = None,
    roi_margin: opt.RoiMargin = 20.0,
    network: opt.NetworkName = None,
    device: opt.Device = "auto",
    backend: opt.Backend = "auto",
    precision: opt.Precision = "auto",
    memory: opt.Memory = None,
    threads: opt.Threads = None,
    shard: opt.Shard = None,
    ray: opt.RayAddress = None,
    as_json: opt.AsJson = False,
) -> None:
    """Segment files or folders; every label map lies on its source's grid.

    Exit code 0, or 3 if a case was bad, or 4 if the machine could not do one; the others are
    done. What an earlier call has finished is kept.
    """
    typed = {name: value for name, value in locals().items() if name != "as_json"}
    from volseg.cli.own_code import take_code_of
    from volseg.cli.predicting import Request, format_result

    take_code_of(model, network)
    result = Request(**typed).run()
    if as_json:
        _print_json(result.describe())
    else:
        typer.echo(format_result(result, output))
    raise typer.Exit(result.exit_code)


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of predicted label maps.")],
    references: Annotated[
        Path, typer.Argument(help="Folder of reference label maps, dataset, or run folder.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the scores.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace scores.")] = False,
    as_json: opt.AsJson = False,
) -> None:
    """Score predictions: metrics.csv, summary.json and, for a dataset, a montage of cases."""
    from volseg.cli.scoring import format_summary, score

    evaluation = score(predictions, references, output, overwrite)
    if as_json:
        _print_json(evaluation.summary.model_dump(mode="json"))
    else:
        typer.echo(format_summary(evaluation))
        typer.echo(f"scores and pictures: {output}")
    _end(bool(evaluation.summary.failed))


@app.command()
def export(
    run: opt.ModelPath,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="BUNDLE", help="New folder.")],
    fold: Annotated[int | None, typer.Option(help="Fold to export.")] = None,
    checkpoint: opt.CheckpointName = "last",
    network: opt.NetworkName = None,
    as_json: opt.AsJson = False,
) -> None:
    """Write a MONAI bundle that `python -m monai.bundle run` executes."""
    from volseg.bundle import export_bundle
    from volseg.cli.own_code import take_code_of

    take_code_of(run, network)
    bundle = export_bundle(run, output, fold=fold, checkpoint=checkpoint)
    if as_json:
        _print_json({"bundle": str(bundle)})
    else:
        typer.echo(f"bundle: {bundle}")


@app.command()
def networks(
    name: Annotated[str | None, typer.Argument(help="Draw and describe this one.")] = None,
    spatial_dims: Annotated[int, typer.Option(help="2 or 3.")] = 3,
    patch: Annotated[
        str | None,
        typer.Option(
            help="Voxels per axis, as in 96,96,64. By default 64 each, or what is needed."
        ),
    ] = None,
    in_channels: Annotated[int, typer.Option(help="Channels of the image.")] = 1,
    classes: Annotated[int, typer.Option(help="Classes, background counted.")] = 2,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Option of the network. Repeatable."),
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """List the networks with their cost and source; draw one in the terminal."""
    from volseg.cli.networks import (
        Request,
        compare,
        describe,
        format_description,
        format_table,
        to_json,
    )

    request = Request(spatial_dims, patch, in_channels, classes, tuple(overrides or ()))
    if as_json:
        _print_json(compare(request) if name is None else to_json(describe(name, request)))
    elif name is None:
        typer.echo(format_table(compare(request), request))
    else:
        typer.echo(format_description(describe(name, request)))


@app.command()
def demo(
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="New folder; by default demo/ and the time."),
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="Your own dataset instead of simulated heads.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Training time.")] = 3.5,
    device: opt.Device = "auto",
    as_json: opt.AsJson = False,
) -> None:
    """Simulate a small dataset, train, predict held-out subjects, score them, draw pictures."""
    from volseg.demo.run import run_demo

    output = output or Path("demo") / time.strftime("%Y%m%d-%H%M%S")
    result = run_demo(output, dataset=dataset, minutes=minutes, device=device)
    if as_json:
        _print_json(result.evaluation.summary.model_dump(mode="json"))
        return
    from volseg.cli.scoring import format_summary

    typer.echo(format_summary(result.evaluation))
    typer.echo(f"report: {result.report}")


def _choose_measure(device: str | None, config: Config) -> Callable[[int], Machine]:
    """What tells the planner how fast a device is; of none it estimates the CPU without torch."""
    from volseg.planning import describe_cpu

    if device is None:
        return lambda spatial_dims: describe_cpu()
    from volseg.inference.model import choose_device
    from volseg.training.machine import measure_machine
    from volseg.training.precision import choose_precision

    chosen = choose_device(device)
    precision = choose_precision(config.training.precision, chosen)
    return partial(measure_machine, chosen, precision=precision)


def _end(has_bad_data: bool) -> None:
    """Exit code 3 if a file was bad, after everything else was done."""
    if has_bad_data:
        raise typer.Exit(DataError.exit_code)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
