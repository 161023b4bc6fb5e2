"""The commands as they are typed: what they print, write, refuse, and their exit codes."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import TINY
from ignite.engine import Events
from known_speed import say_speed
from makers import make_dataset

from volseg.cli import main
from volseg.config import as_override, load_config
from volseg.errors import ConfigError
from volseg.images import image_stem
from volseg.networks.weights import load_weights, save_weights
from volseg.progress import show_progress
from volseg.training import has_ended

training = import_module("volseg.training.train")
cli_main = import_module("volseg.cli.main")

REFUSED = [
    "cifti_connectivity.dconn.nii",
    "complex64.nii.gz",
    "fuzzed_header_1.nii",
    "fuzzed_header_2.nii",
    "git_lfs_pointer.nii.gz",
    "nan_voxels.nii",
    "not_nifti.nii",
    "rgb.nii",
    "rgba_4d.nii",
    "vector_5d_crashes_simpleitk.nii",
    "zero_bytes.nii.gz",
]


def run_cli(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def error_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]


def test_check_of_a_good_dataset(balls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("check", balls) == 0
    assert "5 labelled" in capsys.readouterr().out


def test_check_lists_every_bad_file_and_ends_with_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_dataset(tmp_path / "d", "msd", num_cases=4)
    broken = folder / "imagesTr" / "case_01.nii.gz"
    broken.write_bytes(broken.read_bytes()[:400])
    label = nib.load(folder / "labelsTr" / "case_02.nii.gz")
    nib.save(
        nib.Nifti1Image(np.asarray(label.dataobj) * 9, label.affine),
        folder / "labelsTr" / "case_02.nii.gz",
    )
    assert run_cli("check", folder, "--json") == 3
    report = json.loads(capsys.readouterr().out)
    assert report["errors"] == 2
    assert ["case_01", "case_02"] == [finding["case_id"] for finding in report["findings"]]
    assert all(finding["cure"] for finding in report["findings"])


def test_plan_writes_both_files(balls: Path, tmp_path: Path) -> None:
    assert run_cli("plan", balls, "-o", tmp_path / "run", "--minutes", "5") == 0
    assert (tmp_path / "run" / "plan.yaml").exists()
    assert (tmp_path / "run" / "fingerprint.json").exists()
    assert run_cli("plan", balls, "-o", tmp_path / "run") == 2


def test_predict_evaluate_and_report(
    run: Path, balls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("predict", run, "--validation", "-o", tmp_path / "p", "--json") == 0
    written = json.loads(capsys.readouterr().out)["written"]
    splits = json.loads((run / "splits.json").read_text())
    assert list(written) == splits[0]["validation"]
    assert run_cli("evaluate", tmp_path / "p", balls, "-o", tmp_path / "s") == 0
    assert "organ_3" in capsys.readouterr().out
    assert run_cli("evaluate", tmp_path / "p", balls, "-o", tmp_path / "s") == 2
    assert "summary.json exists already" in error_lines(capsys)[0]
    rows = list(csv.DictReader((tmp_path / "s" / "metrics.csv").open()))
    assert {row["class_name"] for row in rows} == {"organ_3", "organ_7"}
    assert {p.name for p in (tmp_path / "s").iterdir()} == {
        "metrics.csv",
        "summary.json",
        "montage.png",
        "report.html",
    }


def test_cases_whose_files_are_missing_hinder_no_other_case(balls: Path, tmp_path: Path) -> None:
    folder, scores = tmp_path / "set", tmp_path / "scores"
    shutil.copytree(balls, folder)
    shutil.copytree(balls / "labelsTr", tmp_path / "p")
    images, labels = (sorted((folder / name).iterdir()) for name in ("imagesTr", "labelsTr"))
    images[0].unlink()
    labels[1].unlink()
    assert run_cli("check", folder) == 3
    assert run_cli("train", folder, "-o", tmp_path / "run") == 3
    assert not (tmp_path / "run").exists()
    # A reference counts without its image.
    assert run_cli("evaluate", tmp_path / "p", folder, "-o", scores) == 3
    summary = json.loads((scores / "summary.json").read_text())
    assert summary["num_cases"] == len(labels) - 1
    assert summary["failed"] == {image_stem(labels[1]): f"{labels[1]} does not exist."}
    assert (scores / "montage.png").exists()


def test_predict_files_folders_and_formats(run: Path, balls: Path, tmp_path: Path) -> None:
    images = sorted((balls / "imagesTr").iterdir())
    assert run_cli("predict", run, "-i", images[0], images[1], "-o", tmp_path / "a") == 0
    assert run_cli("predict", run, "-i", balls / "imagesTr", "-o", tmp_path / "b") == 0
    nrrd = ("--suffix", ".nrrd", "--probabilities")
    assert run_cli("predict", run, "-i", images[0], "-o", tmp_path / "c", *nrrd) == 0
    assert len(list((tmp_path / "a").glob("*.nii.gz"))) == 2
    assert len(list((tmp_path / "b").glob("*.nii.gz"))) == 5
    assert {p.name for p in (tmp_path / "c").iterdir()} == {
        "case_00.nrrd",
        "case_00.json",
        "case_00_probabilities.nrrd",
    }


def test_nothing_is_overwritten(
    run: Path, balls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = sorted((balls / "imagesTr").iterdir())[0]
    copy = tmp_path / "in" / image.name
    copy.parent.mkdir()
    copy.write_bytes(image.read_bytes())
    assert run_cli("predict", run, "-i", copy, "-o", copy.parent, "--overwrite") == 2
    assert "is an input image" in error_lines(capsys)[0]
    assert copy.read_bytes() == image.read_bytes()
    assert run_cli("predict", run, "-i", copy, "-o", tmp_path / "out") == 0
    before = (tmp_path / "out" / image.name).read_bytes()
    assert run_cli("predict", run, "-i", copy, "-o", tmp_path / "out", "--mirror") == 2
    assert "--overwrite" in error_lines(capsys)[0]
    assert (tmp_path / "out" / image.name).read_bytes() == before
    assert run_cli("predict", run, "-i", copy, "-o", tmp_path / "out", "--overwrite") == 0
    assert (tmp_path / "out" / image.name).read_bytes() == before


def test_two_models_and_what_validation_refuses(
    run: Path, balls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = sorted((balls / "imagesTr").iterdir())[0]
    both = ("predict", run, "--with", run, "-i", image, "-o", tmp_path / "both", "--uncertainty")
    assert run_cli(*both) == 0
    assert (tmp_path / "both" / "case_00_disagreement.nii.gz").exists()
    capsys.readouterr()
    for more in (("--shard", "1/2"), ("--with", run)):
        assert run_cli("predict", run, "--validation", "-o", tmp_path / "v", *more) == 2
        assert "expected one job and one run" in error_lines(capsys)[0]


def test_folds_of_what_is_kept_are_known(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for _ in range(2):
        assert run_cli("predict", run, "--validation", "-o", output) == 0
        folds = json.loads((output / "folds.json").read_text())["folds"]
        assert set(folds.values()) == {0}
        # As a call leaves it that was killed before its end.
        (output / "folds.json").unlink()


def test_what_is_finished_is_kept(
    run: Path, balls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted((balls / "imagesTr").iterdir())[:2]
    output = tmp_path / "out"
    assert run_cli("predict", run, "-i", images[0], "-o", output) == 0
    first = (output / images[0].name).stat().st_mtime_ns
    capsys.readouterr()
    assert run_cli("predict", run, "-i", images[0], "-i", images[1], "-o", output) == 0
    assert "1 written" in capsys.readouterr().out
    assert run_cli("predict", run, "-i", *images, "-o", output, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (len(result["kept"]), result["written"]) == (2, {})
    assert (output / images[0].name).stat().st_mtime_ns == first
    record = json.loads((output / "case_00.json").read_text())
    assert record["volumes_ml"].keys() == {"organ_3", "organ_7"}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_image_is_one_line_and_no_file_and_others_go_on(
    name: str, run: Path, balls: Path, shared_data: Path, tmp_path: Path, capsys
) -> None:
    good = sorted((balls / "imagesTr").iterdir())[0]
    bad = shared_data / "tricky" / "refuse" / name
    assert run_cli("predict", run, "-i", bad, "-i", good, "-o", tmp_path / "out") == 3
    lines = error_lines(capsys)
    assert len(lines) == 1
    assert name in lines[0]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"case_00.nii.gz", "case_00.json"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["check", "nowhere"], 3, "nowhere"),
        (["train", "nowhere", "-o", "run"], 3, "nowhere"),
        (["train", "nowhere", "-o", "run", "--set", "plan.widht=3"], 2, "plan.width"),
        (["predict", "nowhere", "-i", "x.nii", "-o", "out"], 2, "is no model"),
        (["export", "nowhere", "-o", "out"], 2, "is no model"),
        (["train", "nowhere", "-o", "run", "--config", "."], 2, "cannot be read"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli(*arguments) == code
    lines = error_lines(capsys)
    assert len(lines) == 1
    assert message in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_and_help() -> None:
    assert run_cli("--help") == 0
    assert run_cli("--version") == 0
    assert run_cli("check") == 2
    assert run_cli("train", "a") == 2
    assert run_cli("no-such-command") == 2


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_cli("check", tmp_path / "nowhere")
    assert "Traceback" not in capsys.readouterr().err
    run_cli("check", tmp_path / "nowhere", "--debug")
    assert "Traceback" in capsys.readouterr().err


def test_export_of_a_run(run: Path, tmp_path: Path) -> None:
    assert run_cli("export", run, "-o", tmp_path / "b") == 0
    assert run_cli("export", run, "-o", tmp_path / "b") == 2
    assert run_cli("predict", tmp_path / "b", "--validation", "-o", tmp_path / "p") == 2


def test_plan_is_made_for_the_device_that_is_asked_for(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("volseg.training.machine.measure_machine", say_speed)
    assert run_cli("plan", balls, "-o", tmp_path / "run", "--device", "auto") == 0
    assert "a machine of tests" in capsys.readouterr().out
    assert run_cli("plan", balls, "-o", tmp_path / "other", "--device", "gpu") == 2
    assert not (tmp_path / "other" / "plan.yaml").exists()
    start = ("--set", "training.start_from=there")
    assert run_cli("plan", balls, "-o", tmp_path / "other", *start) == 2
    assert "there brings its own plan" in capsys.readouterr().err


def test_a_training_that_was_stopped_ends_with_130(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = training.create_trainer

    def interrupt(learner: Any) -> Any:
        trainer = started(learner)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), trainer.interrupt)
        return trainer

    monkeypatch.setattr(training, "create_trainer", interrupt)
    words = [word for setting in TINY for word in ("--set", setting)]
    run = tmp_path / "run"
    assert run_cli("train", balls, "-o", run, "--epochs", "1", *words) == 130
    assert f"stopped: {run}, which can predict as it is" in capsys.readouterr().out
    # Of torchrun's processes the first one reports.
    monkeypatch.setenv("RANK", "1")
    assert run_cli("train", balls, "-o", run, "--resume") == 0
    assert capsys.readouterr().out == ""
    monkeypatch.undo()
    assert run_cli("train", balls, "-o", run, "--resume", "--json", "--fold", "00") == 0
    assert json.loads(capsys.readouterr().out) == {"run": str(run), "has_ended": True}


@pytest.fixture
def stopped(run: Path, tmp_path: Path) -> Path:
    """A finished training whose extension has just begun."""
    other = shutil.copytree(run, tmp_path / "stopped")
    path = other / "fold_0" / "checkpoint_last.pt"
    state = load_weights(path)
    state["training"]["budget"]["end"] += 1
    save_weights(path, state)
    return other


def test_what_has_ended_is_read_from_the_checkpoints(run: Path, stopped: Path) -> None:
    assert has_ended(run, 0)
    # The others of five were not begun.
    assert not has_ended(run, "all")
    assert not has_ended(stopped, "0")


def test_torchrun_hears_of_no_failure_where_a_training_is_stopped(
    balls: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("volseg.training.train", lambda *_, **__: stopped)
    assert run_cli("train", balls, "-o", stopped, "--resume") == 130
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_cli("train", balls, "-o", stopped, "--resume") == 0


def test_validation_without_a_case_is_refused(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "run")
    splits = json.loads((other / "splits.json").read_text())
    splits[0]["validation"] = []
    (other / "splits.json").write_text(json.dumps(splits))
    assert run_cli("predict", other, "--validation", "-o", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


def test_what_looks_like_yaml_is_taken_as_it_was_typed() -> None:
    for name in ("2024-05-01", "12", "runs/a #2", "a: b", "null", "größe", 'a"b\\'):
        config = load_config(None, [as_override("training.start_from", name)])
        assert config.training.start_from == name


def test_other_processes_of_torchrun_leave_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(cli_main, "app", fail)
    monkeypatch.setattr("os._exit", lambda code: sys.exit(f"at once, with {code}"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="at once, with 1"):
        cli_main.run()
    said = "process 1 ended: RuntimeError: Connection closed by peer (--debug shows where)\n"
    assert capsys.readouterr().err == said
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(SystemExit) as end:
        cli_main.run()
    assert end.value.code == 1
    assert "This is a bug in volseg" in capsys.readouterr().err


def test_the_first_process_alone_shows_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("RANK", "1")
    with show_progress("Preparing") as update:
        update(1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    with show_progress("Preparing") as update:
        update(1, 2)
    assert "Preparing" in capsys.readouterr().err


def test_demo_makes_a_folder_of_its_own_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def stop(output: Path, **options: object) -> None:
        made.append(output)
        raise ConfigError("enough")

    monkeypatch.setattr("volseg.demo.run.run_demo", stop)
    assert run_cli("demo") == 2
    assert run_cli("demo", "-o", tmp_path) == 2
    assert re.fullmatch(r"demo/\d{8}-\d{6}", made[0].as_posix())
    assert made[1] == tmp_path
