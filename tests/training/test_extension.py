"""More of a finished training, in its own folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY

import volseg
from volseg.cli import main
from volseg.config import Config, load_config
from volseg.errors import ConfigError
from volseg.networks.weights import load_weights, save_weights
from volseg.run_folder import RunFolder
from volseg.training.budget import Budget
from volseg.training.checkpoints import Checkpoints
from volseg.training.extension import check_finished, warn_of_unequal
from volseg.training.muon import Muon
from volseg.training.train import resumed_config

CONFIG = load_config(None, [*TINY, "training.steps_per_epoch=4"])


@pytest.fixture(scope="module")
def finished(balls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of four steps; not to be changed."""
    return volseg.train(
        balls, tmp_path_factory.mktemp("runs") / "done", config=CONFIG, epochs=2, device="cpu"
    )


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def state_of(run: Path) -> dict[str, Any]:
    return load_weights(run / "fold_0" / "checkpoint_last.pt")


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "fold_0" / "history.jsonl").open()]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the middle of a step."""
    left = {"steps": step}
    update = Muon.step

    def stopping(self: Any, closure: Any = None) -> Any:
        left["steps"] -= 1
        if left["steps"] == 0:
            raise KeyboardInterrupt
        return update(self, closure)

    monkeypatch.setattr(Muon, "step", stopping)


def test_extension_is_a_new_schedule_behind_the_old_one(balls: Path, run: Path) -> None:
    before = rows_of(run)
    volseg.train(balls, run, epochs=3, resume=True, device="cpu")
    rows = rows_of(run)
    assert rows[:2] == before
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20]
    assert [row.get("extension") for row in rows] == [None, None, 1, 1, 1]
    assert [row["progress"] for row in rows[2:]] == [0.3333, 0.6667, 1]
    # The last step of each epoch begins at 3, 7 and 11 twelfths: 1e-2 * (1 - progress) ** 0.9.
    rates = [1e-2 * (1 - step / 12) ** 0.9 for step in (3, 7, 11)]
    assert [row["learning_rate"] for row in rows[2:]] == pytest.approx(rates)
    assert rows[-1]["minutes"] > before[-1]["minutes"]
    counters = state_of(run)["counters"]
    assert (counters["step"], counters["extensions"]) == (20, 1)


def test_configurations_of_both_are_kept(balls: Path, run: Path, finished: Path) -> None:
    first = (finished / "fold_0" / "config.yaml").read_text()
    volseg.train(balls, run, epochs=1, resume=True, device="cpu")
    fold = run / "fold_0"
    assert (fold / "config_before_extension_1.yaml").read_text() == first
    second = Config.read_yaml(fold / "config.yaml")
    assert second.training.epochs == 1
    assert second.optimizer == Config.read_yaml(fold / "config_before_extension_1.yaml").optimizer
    volseg.train(balls, run, minutes=0.01, resume=True, device="cpu")
    assert Config.read_yaml(fold / "config_before_extension_2.yaml") == second
    length = Config.read_yaml(fold / "config.yaml").training
    assert (length.minutes, length.epochs) == (0.01, None)
    assert state_of(run)["counters"]["extensions"] == 2


def test_it_begins_with_the_finished_weights_and_a_fresh_optimiser(
    balls: Path, run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        volseg.train(balls, run, epochs=1, resume=True, device="cpu")
    done, begun = state_of(finished), state_of(run)
    assert_equal(begun["network"], done["network"])
    assert_equal(begun["training"]["network"], done["network"])
    assert begun["training"]["optimizer"]["state"] == {}
    assert begun["num_averaged"] == 0
    kept = ("step", "elapsed_s", "best_dice", "validation")
    assert [begun["counters"][key] for key in kept] == [done["counters"][key] for key in kept]


@pytest.mark.parametrize("step", [1, 3, 6])
def test_killed_extension_goes_on_as_an_undisturbed_one(
    step: int, balls: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    volseg.train(balls, whole, epochs=2, resume=True, device="cpu")
    interrupt_at(step, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        volseg.train(balls, run, epochs=2, resume=True, device="cpu")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"was stopped at step \d+ of 16; .*--resume alone"):
        volseg.train(balls, run, epochs=2, resume=True, device="cpu")
    volseg.train(balls, run, resume=True, device="cpu")
    ours, theirs = state_of(run), state_of(whole)
    assert_equal(ours["network"], theirs["network"])
    assert_equal(ours["training"]["network"], theirs["training"]["network"])
    for state in (ours, theirs):
        state["counters"].pop("elapsed_s")
    assert ours["counters"] == theirs["counters"]
    assert [row["step"] for row in rows_of(run)] == [4, 8, 12, 16]


def test_extension_that_was_killed_before_its_first_checkpoint_is_no_edit(
    balls: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(self: Checkpoints) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save_last", kill)
    with pytest.raises(KeyboardInterrupt):
        volseg.train(balls, run, epochs=3, resume=True, device="cpu")
    monkeypatch.undo()
    volseg.train(balls, run, resume=True, device="cpu")
    assert state_of(run)["counters"]["step"] == 8
    volseg.train(balls, run, epochs=3, resume=True, device="cpu")
    assert state_of(run)["counters"]["step"] == 20


def test_resume_without_a_length_leaves_a_finished_training(
    balls: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = (run / "fold_0" / "checkpoint_last.pt").read_bytes()
    with caplog.at_level("INFO"):
        volseg.train(balls, run, resume=True, device="cpu")
    assert "fold 0 is complete; nothing to do" in caplog.text
    assert (run / "fold_0" / "checkpoint_last.pt").read_bytes() == before


def test_fold_that_was_not_trained_is_not_extended(balls: Path, run: Path) -> None:
    before = (run / "fold_0" / "checkpoint_last.pt").read_bytes()
    for fold in (1, "all"):
        with pytest.raises(ConfigError, match="fold_1 holds no training to extend"):
            volseg.train(balls, run, epochs=1, resume=True, fold=fold, device="cpu")
    assert (run / "fold_0" / "checkpoint_last.pt").read_bytes() == before


def test_training_that_ends_for_want_of_patience_is_finished_at_its_new_end(run: Path) -> None:
    path = run / "fold_0" / "checkpoint_last.pt"
    state = load_weights(path)
    state["counters"]["step"] = 5
    save_weights(path, state)
    with pytest.raises(ConfigError, match="stopped at step 5 of 8"):
        check_finished(RunFolder(run), [0])
    state["training"]["budget"]["end"] = 5
    save_weights(path, state)
    check_finished(RunFolder(run), [0])


def test_command_line_extends(balls: Path, run: Path) -> None:
    arguments = ["train", str(balls), "-o", str(run), "--resume", "--epochs", "1"]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert state_of(run)["counters"]["step"] == 12


def test_folds_not_yet_begun_are_as_long_as_the_first_was(balls: Path, run: Path) -> None:
    volseg.train(balls, run, epochs=1, resume=True, device="cpu")
    assert resumed_config(run, Config()).training.epochs == 2
    volseg.train(balls, run, epochs=3, resume=True, device="cpu")
    assert resumed_config(run, Config()).training.epochs == 2


def test_budget_of_an_extension_by_hand() -> None:
    budget = Budget(100)
    budget.extend(100, elapsed_s=50, num_steps=40)
    assert [budget.progress(step) for step in (100, 110, 140)] == [0, 0.25, 1]
    assert (budget.end, budget.num_steps) == (140, 40)
    budget.correct(120, elapsed_s=1000)
    assert budget.end == 140
    budget.extend(140, elapsed_s=60, num_steps=30, minutes=1)
    # Its own steps take 2 s, so that after five 50 s are left; those before do not count.
    due = []
    for k in range(1, 6):
        budget.add_step(2)
        due.append(budget.correct(140 + k, elapsed_s=60 + 2 * k))
    assert due == [False] * 4 + [True]
    assert (budget.end, budget.num_steps) == (170, 30)
    assert budget.progress(150) == pytest.approx(1 / 3)


def test_restart_by_torchrun_goes_on_with_the_options_it_began_with(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = volseg.train(balls, tmp_path / "whole", config=CONFIG, epochs=2, device="cpu")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    with monkeypatch.context() as patch:
        interrupt_at(6, patch)
        with pytest.raises(KeyboardInterrupt):
            volseg.train(balls, tmp_path / "run", config=CONFIG, epochs=2, device="cpu")
    for _ in range(2):
        volseg.train(balls, tmp_path / "run", config=CONFIG, epochs=2, device="cpu")
        assert_equal(state_of(tmp_path / "run")["network"], state_of(whole)["network"])
    for job, epochs in (("another", 2), ("one", 3)):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        with pytest.raises(ConfigError, match="already holds a training; nothing was changed"):
            volseg.train(balls, tmp_path / "run", config=CONFIG, epochs=epochs, device="cpu")


def test_restart_goes_on_with_folds_that_had_not_begun(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    config = load_config(None, [*TINY, "training.steps_per_epoch=1", "training.num_folds=3"])
    for step in (2, 3):
        with monkeypatch.context() as patch:
            interrupt_at(step, patch)
            with pytest.raises(KeyboardInterrupt):
                volseg.train(balls, tmp_path, config=config, epochs=2, fold="all", device="cpu")
    volseg.train(balls, tmp_path, config=config, epochs=2, fold="all", device="cpu")
    states = [load_weights(tmp_path / f"fold_{n}" / "checkpoint_last.pt") for n in range(3)]
    assert [state["counters"]["step"] for state in states] == [2, 2, 2]


@pytest.mark.parametrize("is_begun", [False, True])
def test_restart_of_an_extension_extends_once(
    is_begun: bool, balls: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    with monkeypatch.context() as patch:
        if is_begun:
            interrupt_at(2, patch)
        else:
            patch.setattr(Checkpoints, "save_last", lambda self: (_ for _ in ()).throw(OSError))
        with pytest.raises((KeyboardInterrupt, OSError)):
            volseg.train(balls, run, epochs=1, resume=True, device="cpu")
    assert state_of(run)["counters"]["extensions"] == int(is_begun)
    for _ in range(2):
        volseg.train(balls, run, epochs=1, resume=True, device="cpu")
        assert state_of(run)["counters"]["step"] == 12
        assert state_of(run)["counters"]["extensions"] == 1


def test_folds_that_were_extended_less_often_are_named(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_of(run)
    for fold, extensions in ((1, 2), (2, 2)):
        state["counters"]["extensions"] = extensions
        (run / f"fold_{fold}").mkdir()
        save_weights(run / f"fold_{fold}" / "checkpoint_last.pt", state)
    warn_of_unequal(RunFolder(run), [1, 2, 3])
    assert not caplog.records
    warn_of_unequal(RunFolder(run), [0, 1, 2, 3])
    assert f"fold 0 of {run} had fewer extensions than the others" in caplog.text


def test_folds_behind_are_named_where_an_extension_of_all_was_stopped(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(None, [*TINY, "training.steps_per_epoch=2", "training.num_folds=2"])
    run = tmp_path / "run"
    volseg.train(balls, run, config=config, epochs=1, fold="all", device="cpu")
    interrupt_at(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        volseg.train(balls, run, epochs=1, fold="all", resume=True, device="cpu")
    monkeypatch.undo()
    caplog.clear()
    volseg.train(balls, run, fold=1, resume=True, device="cpu")
    assert "fewer extensions" not in caplog.text
    volseg.train(balls, run, epochs=1, fold=0, resume=True, device="cpu")
    volseg.train(balls, run, fold="all", resume=True, device="cpu")
    assert "fold 1 of " in caplog.text
