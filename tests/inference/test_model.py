"""What is said of a model when it is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import volseg
from volseg.errors import ConfigError
from volseg.inference import Options
from volseg.inference.model import find_weights, load_model, read_facts, trained_folds
from volseg.networks.weights import load_weights, save_weights


def test_an_unfinished_fold_is_named(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = shutil.copytree(run, tmp_path / "run")
    load_model(other, "cpu")
    assert "has been trained for" not in caplog.text
    path = other / "fold_0" / "checkpoint_last.pt"
    state = load_weights(path)
    steps = state["counters"]["step"]
    state["training"]["budget"]["end"] = steps + 1
    save_weights(path, state)
    load_model(other, "cpu")
    assert f"{path} has been trained for {steps} of {steps + 1} steps so far" in caplog.text


def test_mirroring_that_the_training_has_not_seen_is_said(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_facts(run).mirrored == ()
    volseg.Predictor.load(run, device="cpu")
    assert "trained without" not in caplog.text
    volseg.Predictor.load(run, device="cpu", options=Options(mirror=True))
    assert "the model was trained without (augmentation.flip)" in caplog.text
    caplog.clear()
    other = shutil.copytree(run, tmp_path / "run")
    config = other / "fold_0" / "config.yaml"
    config.write_text(config.read_text().replace("flip: 0.0", "flip: [0.5, 0, 0]"))
    assert read_facts(other).mirrored == (0,)
    mirrored = volseg.Predictor.load(other, device="cpu", options=Options(mirror=True))
    # Along the axis that it knows alone.
    assert mirrored._members.mirroring.axes == (0,)
    both = load_model([other, run], "cpu")
    assert both.facts.mirrored == ()
    config.write_text("of: another version")
    assert read_facts(other).mirrored is None
    assert load_model([run, other], "cpu").facts.mirrored is None
    volseg.Predictor.load(other, device="cpu", options=Options(mirror=True))
    assert "trained without" not in caplog.text


def test_copies_of_folds_are_no_folds(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "run")
    folds = trained_folds(other)
    for name in ("fold_0_backup", "fold_0_1", "fold_00", "fold_0.old", "fold_0 (copy)"):
        shutil.copytree(other / "fold_0", other / name)
    config = other / "fold_0" / "config.yaml"
    config.write_text(config.read_text().replace("flip: 0.0", "flip: 0.5"))
    assert trained_folds(other) == folds == (0,)
    assert len(find_weights(other)) == 1
    assert read_facts(other).mirrored == (0, 1, 2)


def test_a_fold_without_a_best_checkpoint_says_why(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "run")
    (other / "fold_0" / "checkpoint_best.pt").unlink()
    with pytest.raises(ConfigError, match="no validation has chosen a best one"):
        load_model(other, "cpu", (0,), "best")
