"""The score of a cross-validation: each case by the fold that did not see it, folds summarised."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import TINY
from makers import write_nifti

import volseg
from volseg.cli import main
from volseg.config import load_config
from volseg.data.splits import read_folds, remember_folds
from volseg.errors import DataError
from volseg.evaluation import evaluate
from volseg.evaluation.folds import summarise_folds

A, B = ("a", 1), ("b", 2)


def test_folds_count_the_same_whatever_their_size() -> None:
    dice = {
        A: {"p": 1.0, "q": 0.5, "r": 0.0, "s": 0.2},
        B: {"p": 0.8, "q": None, "r": None, "s": 0.4},
    }
    scores = summarise_folds(dice, {"p": 0, "q": 0, "r": 3, "other": 4})
    assert scores is not None
    assert scores.folds == (0, 3)
    assert scores.num_cases == (2, 1)
    a, b = scores.classes
    # Fold 0: (1 + 0.5) / 2; fold 3: 0.
    assert a.by_fold == (0.75, 0.0)
    assert (a.mean_dice, a.std_dice) == (0.375, 0.375)
    # No case of fold 3 has class b.
    assert b.by_fold == (0.8, None)
    assert (b.mean_dice, b.std_dice) == (0.8, 0.0)
    assert scores.by_fold == pytest.approx((0.775, 0.0))
    assert (scores.mean_dice, scores.std_dice) == pytest.approx((0.3875, 0.3875))


def test_one_fold_is_no_cross_validation() -> None:
    assert summarise_folds({A: {"p": 1.0, "q": 0.5}}, {"p": 1}) is None
    assert summarise_folds({A: {"p": 1.0}}, {}) is None


def write_line(folder: Path, case_id: str, start: int, stop: int) -> None:
    label = np.zeros((10, 3, 3), np.uint8)
    label[start:stop, 1, 1] = 1
    write_nifti(folder / f"{case_id}.nii.gz", label)


def test_evaluate_reads_which_fold_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predicted, known = tmp_path / "p", tmp_path / "r"
    for case_id, start in (("p", 2), ("q", 4), ("r", 6)):
        write_line(known, case_id, 2, 6)
        write_line(predicted, case_id, start, start + 4)
    assert evaluate(predicted, known).summary.cross_validation is None
    remember_folds(predicted, ["p", "q"], 0)
    remember_folds(predicted, ["r"], 1)
    assert read_folds(predicted) == {"p": 0, "q": 0, "r": 1}
    # Dice 1 and 2 * 2 / 8 in fold 0, none in fold 1.
    assert main(["evaluate", str(predicted), str(known), "-o", str(tmp_path / "s")]) == 0
    text = capsys.readouterr().out
    assert "fold 1" in text
    assert "0.375" in text
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert summary["mean_dice"] == 0.5
    assert summary["cross_validation"]["by_fold"] == [0.75, 0.0]
    assert summary["cross_validation"]["std_dice"] == 0.375
    (predicted / "folds.json").write_text("[1]")
    with pytest.raises(DataError, match=r"folds\.json"):
        evaluate(predicted, known)


@pytest.fixture(scope="module")
def run(balls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds of a short training."""
    folder = tmp_path_factory.mktemp("runs") / "folds"
    config = load_config(None, [*TINY, "training.num_folds=2"])
    return volseg.train(balls, folder, config=config, epochs=6, fold="all", device="cpu")


def run_cli(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def test_each_case_is_predicted_by_the_fold_that_did_not_see_it(
    run: Path, balls: Path, tmp_path: Path
) -> None:
    splits = json.loads((run / "splits.json").read_text())
    torchs = ("--backend", "torch")
    assert run_cli("predict", run, "--validation", "-o", tmp_path / "p", *torchs) == 0
    expected = {case_id: fold for fold in (0, 1) for case_id in splits[fold]["validation"]}
    assert read_folds(tmp_path / "p") == expected
    assert len(expected) == 5
    predictors = [volseg.Predictor.load(run, folds=(fold,), device="cpu") for fold in (0, 1)]
    for case_id, fold in expected.items():
        assert case_id not in splits[fold]["train"]
        written = np.asarray(nib.load(tmp_path / "p" / f"{case_id}.nii.gz").dataobj)
        image = balls / "imagesTr" / f"{case_id}.nii.gz"
        assert np.array_equal(predictors[fold](image).labels, written)
        assert not np.array_equal(predictors[1 - fold](image).labels, written)
    assert run_cli("evaluate", tmp_path / "p", run, "-o", tmp_path / "s") == 0
    scores = json.loads((tmp_path / "s" / "summary.json").read_text())["cross_validation"]
    assert scores["folds"] == [0, 1]
    assert sum(scores["num_cases"]) == 5
    assert "<h2>Folds</h2>" in (tmp_path / "s" / "report.html").read_text()


def test_folds_predicted_one_after_the_other_are_the_same(run: Path, tmp_path: Path) -> None:
    for fold in "01":
        out = tmp_path / "p"
        assert run_cli("predict", run, "--validation", "--fold", fold, "-o", out) == 0
    assert sorted(set(read_folds(tmp_path / "p").values())) == [0, 1]


def test_what_all_folds_predict_is_no_validation(run: Path, balls: Path, tmp_path: Path) -> None:
    assert run_cli("predict", run, "--validation", "-o", tmp_path / "p") == 0
    image = balls / "imagesTr" / "case_02.nii.gz"
    assert run_cli("predict", run, "-i", image, "-o", tmp_path / "p", "--overwrite") == 0
    assert sorted(read_folds(tmp_path / "p")) == ["case_00", "case_01", "case_03", "case_04"]
    assert run_cli("predict", run, "-i", image, "-o", tmp_path / "q") == 0
    assert not (tmp_path / "q" / "folds.json").exists()


def test_a_case_that_validates_two_folds_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "splits.json"
    text = path.read_text()
    first = json.loads(text)[0]
    path.write_text(json.dumps([first, first]))
    try:
        assert run_cli("predict", run, "--validation", "-o", tmp_path / "p") == 2
    finally:
        path.write_text(text)
    assert "validates folds 0 and 1" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
