"""``volseg demo``: the whole job on simulated heads, or on the user's own dataset."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from volseg.config import Config
from volseg.data.cases import Dataset
from volseg.data.splits import read_splits
from volseg.demo.simulate import simulate_dataset
from volseg.errors import ConfigError
from volseg.evaluation import Evaluation
from volseg.evaluation.report import score_dataset, write_report
from volseg.inference import Predictor
from volseg.inference.batch import Outputs, predict_cases
from volseg.progress import show_progress
from volseg.run_folder import DATASET_FILE, RunFolder, select_cases
from volseg.training import train

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoResult:
    """Scores, and the page that shows them."""

    evaluation: Evaluation
    report: Path


def run_demo(
    output: Path, *, dataset: Path | None = None, minutes: float = 3.5, device: str = "auto"
) -> DemoResult:
    """Train, predict cases that were held out, score and draw them.

    Args:
        output: new or empty folder for everything.
        dataset: the user's dataset, of which one fold is held out; by default heads are simulated
            into ``output/dataset``, with test subjects of their own.
        minutes: training time.
        device: as in `volseg.train`.

    Raises:
        ConfigError: `output` is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is not empty; nothing was changed. Choose another with -o.")
    if dataset is None:
        logger.info("simulating subjects -> %s", output / "dataset")
        dataset = simulate_dataset(output / "dataset")
    run = RunFolder(train(dataset, output / "run", config=Config(), minutes=minutes, device=device))
    held_out = _held_out(dataset, run)
    predictor = Predictor.load(run.path, device=device)
    predictions = output / "predictions"
    with show_progress("Predicting") as update:
        predict_cases(predictor, held_out.cases, Outputs(predictions), update)
    results = output / "results"
    evaluation = score_dataset(predictions, held_out, results)
    report = results / "report.html"
    pictures = [results / "montage.png", run.fold(0) / "progress.png"]
    write_report(report, held_out, evaluation, pictures)
    return DemoResult(evaluation, report)


def _held_out(dataset: Path, run: RunFolder) -> Dataset:
    """The dataset with only the cases that were not trained on."""
    described = Dataset.read_json(run.path / DATASET_FILE)
    labelled = [
        case.model_copy(update={"label": label})
        for case in described.unlabelled
        if (label := dataset / "labelsTs" / f"{case.case_id}.nii.gz").is_file()
        and all(file.exists() for file in case.files)
    ]
    if labelled:
        return described.model_copy(update={"cases": tuple(labelled), "unlabelled": ()})
    split = read_splits(run.splits, described.cases)[0]
    return described.model_copy(update={"cases": tuple(select_cases(described, split.validation))})
