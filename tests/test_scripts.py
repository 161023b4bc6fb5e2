"""The scripts do what the commands do, by the Python interface."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from conftest import TINY

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run_script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_train(balls: Path, tmp_path: Path) -> None:
    settings = [word for value in TINY for word in ("--set", value)]
    options = ("--epochs", "1", "--device", "cpu", *settings)
    done = run_script("train.py", balls, tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "run")]
    assert (tmp_path / "run" / "fold_0" / "checkpoint_last.pt").is_file()
    again = run_script("train.py", balls, tmp_path / "run", *options)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith("error: ")


def test_predict_goes_on_behind_a_bad_image_and_overwrites_nothing(
    run: Path, balls: Path, tmp_path: Path
) -> None:
    good = next((balls / "imagesTr").iterdir())
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"nothing")
    done = run_script("predict.py", run, tmp_path / "out", bad, good, "--device", "cpu")
    assert done.returncode == 3
    assert f"error: {bad}" in done.stderr
    written = tmp_path / "out" / good.name
    assert done.stdout.split() == [str(written)]
    assert nib.load(written).shape == nib.load(good).shape
    before = written.stat().st_mtime_ns
    assert run_script("predict.py", run, tmp_path / "out", good).returncode == 2
    assert written.stat().st_mtime_ns == before


def test_evaluate_names_what_failed_and_overwrites_nothing(tmp_path: Path) -> None:
    reference = np.zeros((4, 4, 4), np.uint8)
    reference[0] = 1
    half = np.zeros_like(reference)
    half[0, :2] = 1  # 8 of 16 voxels: a Dice of 16 / 24.
    for folder, label in (("predicted", half), ("references", reference)):
        (tmp_path / folder).mkdir()
        nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / folder / "good.nii.gz")
        (tmp_path / folder / "bad.nii.gz").write_bytes(b"nothing")
    folders = (tmp_path / "predicted", tmp_path / "references", tmp_path / "scores")
    done = run_script("evaluate.py", *folders)
    assert done.returncode == 3
    assert done.stdout == "1: mean Dice 0.6667 over 1 cases\n"
    assert "error: bad: " in done.stderr
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert [*summary["failed"]] == ["bad"]
    assert run_script("evaluate.py", *folders).returncode == 2
