"""Training and prediction where cases lack a channel, from the command line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import TINY
from makers import make_dataset

import volseg
from volseg.cli import main
from volseg.config import load_config
from volseg.errors import ConfigError, DataError
from volseg.inference.inputs import find_inputs
from volseg.planning import Plan

OPTIONAL = "data.optional_channels=[MR1]"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six cases of two channels; two cases lack the second one."""
    folder = tmp_path_factory.mktemp("optional") / "data"
    make_dataset(folder, "nnunet", num_cases=6, num_channels=2, shape=(18, 17, 16))
    for number in (1, 4):
        (folder / "imagesTr" / f"case_{number:02d}_0001.nii.gz").unlink()
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "optional"
    settings = [part for s in (*TINY, OPTIONAL) for part in ("--set", s)]
    arguments = ["train", data, "-o", run, "--epochs", "10", "--device", "cpu", *settings]
    assert main([str(argument) for argument in arguments]) == 0
    return run


def run_cli(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def test_the_option_is_needed_and_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("train", data, "-o", tmp_path / "run") == 3
    assert f'--set "{OPTIONAL}"' in capsys.readouterr().err


def test_plan_and_dataset_remember_what_is_optional(run: Path) -> None:
    assert Plan.read_yaml(run / "plan.yaml").optional_channels == (1,)
    assert json.loads((run / "dataset.json").read_text())["optional_channels"] == ["MR1"]


def test_predicts_with_and_without_the_channel(run: Path, data: Path, tmp_path: Path) -> None:
    images = data / "imagesTr"
    assert run_cli("predict", run, "-i", images, "-o", tmp_path / "all") == 0
    assert len(list((tmp_path / "all").glob("*.nii.gz"))) == 6
    first = images / "case_00_0000.nii.gz"
    assert run_cli("predict", run, "-i", first, "-o", tmp_path / "one") == 0
    alone = np.asarray(nib.load(tmp_path / "one" / "case_00.nii.gz").dataobj)
    predictor = volseg.Predictor.load(run, device="cpu")
    assert np.array_equal(predictor([first, None]).labels, alone)
    both = predictor([first, images / "case_00_0001.nii.gz"]).labels
    assert not np.array_equal(both, alone)
    assert run_cli("evaluate", tmp_path / "all", data, "-o", tmp_path / "scores") == 0
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary["num_cases"] == 6


def test_a_channel_that_is_not_optional_is_missed(run: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(data / "imagesTr" / "case_00_0001.nii.gz", folder / "case_00_0001.nii.gz")
    predictor = volseg.Predictor.load(run, device="cpu")
    with pytest.raises(DataError, match="there is no image of channel MR0"):
        predictor([None, folder / "case_00_0001.nii.gz"])
    with pytest.raises(DataError, match="no image; expected one of MR0, MR1"):
        predictor([None, None])
    assert run_cli("predict", run, "-i", folder, "-o", tmp_path / "out") == 3


def test_validation_cases_may_lack_it_too(run: Path, tmp_path: Path) -> None:
    assert run_cli("predict", run, "--validation", "-o", tmp_path / "v") == 0


def test_a_model_that_was_never_without_refuses(data: Path, tmp_path: Path) -> None:
    whole = tmp_path / "data"
    shutil.copytree(data, whole)
    for number in (1, 4):
        for path in whole.rglob(f"case_{number:02d}*"):
            path.unlink()
    description = json.loads((whole / "dataset.json").read_text())
    (whole / "dataset.json").write_text(json.dumps(description | {"numTraining": 4}))
    config = load_config(None, [*TINY, "training.num_folds=2"])
    run = volseg.train(whole, tmp_path / "run", config=config, epochs=1, device="cpu")
    lacking = data / "imagesTr" / "case_01_0000.nii.gz"
    with pytest.raises(DataError, match=r"train with data.optional_channels=\[MR1\]"):
        volseg.Predictor.load(run, device="cpu")([lacking, None])
    assert run_cli("predict", run, "-i", lacking, "-o", tmp_path / "out") == 3
    # Beginning with its weights, the channel is optional nevertheless.
    config = load_config(None, [*TINY, OPTIONAL, f"training.start_from={run}"])
    other = volseg.train(data, tmp_path / "other", config=config, epochs=1, device="cpu")
    assert Plan.read_yaml(other / "plan.yaml").optional_channels == (1,)


def test_an_edited_plan_must_say_the_same(run: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("fold_*"))
    path = tmp_path / "run" / "plan.yaml"
    path.write_text(path.read_text().replace("optional: true", "optional: false"))
    config = load_config(None, [*TINY, OPTIONAL])
    with pytest.raises(ConfigError, match=r"optional channels \[\]; expected \['MR1'\]"):
        volseg.train(data, tmp_path / "run", config=config, epochs=1, device="cpu")


def test_a_case_without_a_channel_that_it_needs_fails_and_the_others_go_on(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in (0, 2):
        for channel in (0, 1):
            shutil.copy(data / "imagesTr" / f"case_{number:02d}_{channel:04d}.nii.gz", images)
    shutil.copy(images / "case_00_0001.nii.gz", images / "case_02_0002.nii.gz")
    assert run_cli("predict", run, "-i", images, "-o", tmp_path / "out") == 3
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["case_00.nii.gz"]
    refused = r"case_02_0000\.nii\.gz, case_02_0001\.nii\.gz, case_02_0002\.nii\.gz: 3 channels; "
    assert re.search(refused + r"expected 2 \(MR0, MR1\)", capsys.readouterr().err)


def test_files_are_placed_by_the_numbers_in_their_names(tmp_path: Path) -> None:
    make_dataset(tmp_path, "folders", num_channels=3, num_cases=2)
    images = tmp_path / "images"
    (images / "case_00_0001.nii.gz").unlink()
    first, second = find_inputs([images], "abc", (1, 2))
    assert [path and path.name for path in first.images] == [
        "case_00_0000.nii.gz",
        None,
        "case_00_0002.nii.gz",
    ]
    assert None not in second.images
    # One that may not be missing.
    first, second = find_inputs([images], "abc", (2,))
    assert (len(first.images), len(second.images)) == (2, 3)


def test_a_file_with_all_channels_stays_one(tmp_path: Path) -> None:
    make_dataset(tmp_path, "msd", num_channels=2, num_cases=1)
    path = tmp_path / "imagesTr" / "case_00.nii.gz"
    path = path.rename(path.with_name("case_00_0000.nii.gz"))
    (case,) = find_inputs([path], "ab", (1,))
    assert case.images == (path,)
