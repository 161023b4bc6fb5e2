"""Trainings that begin in one new folder at the same moment share its plan and its splits."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier, current_thread
from typing import Any

import pytest
import torch
from conftest import TINY
from known_speed import say_speed

import volseg
from volseg.config import Config, DataConfig, load_config
from volseg.data.cases import Dataset
from volseg.data.layouts import find_dataset
from volseg.data.splits import make_splits, write_splits
from volseg.errors import ConfigError
from volseg.networks.weights import load_weights
from volseg.planning import Machine, Plan
from volseg.planning import plan_run as plan_for_machine
from volseg.run_folder import RunFolder, open_run
from volseg.training.setting import prepare_training

CPU = torch.device("cpu")


def tiny(*overrides: str) -> Config:
    return load_config(None, [*TINY, "training.steps_per_epoch=1", *overrides])


def plan_run(dataset: Path, output: Path, config: Config) -> None:
    plan_for_machine(dataset, output, config, partial(say_speed, CPU))


def meanwhile(patch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Let something happen once, while the machine is measured."""
    waiting = [act]

    def measure(*arguments: Any, **options: Any) -> Machine:
        if waiting:
            waiting.pop()()
        return say_speed(CPU, 3)

    patch.setattr("volseg.training.setting.measure_machine", measure)


def read_files(run: Path) -> dict[str, bytes]:
    names = ("dataset.json", "fingerprint.json", "plan.yaml", "splits.json")
    return {name: (run / name).read_bytes() for name in names}


def test_second_takes_up_what_the_first_has_made(
    balls: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept = {}

    def train_another() -> None:
        config = tiny("plan.batch_size=3", "training.num_folds=3")
        kept.update(read_files(volseg.train(balls, tmp_path, config=config, epochs=1, fold=1)))

    meanwhile(monkeypatch, train_another)
    with caplog.at_level(logging.INFO):
        volseg.train(balls, tmp_path, config=tiny(), epochs=1, device="cpu")
    assert read_files(tmp_path) == kept
    assert f"plan: {tmp_path / 'plan.yaml'} was written meanwhile" in caplog.text
    assert f"splits: using {tmp_path / 'splits.json'}, which was" in caplog.text
    state = load_weights(tmp_path / "fold_0" / "checkpoint_last.pt")
    assert state["plan"]["batch_size"] == 3
    # Of three folds of five cases, not of five.
    assert "cases: 3 to train, 2 to validate" in caplog.text


def test_second_is_refused_where_it_contradicts(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile(monkeypatch, lambda: plan_run(balls, tmp_path, tiny("plan.batch_size=3")))
    with pytest.raises(ConfigError, match="the configuration contradicts its batch_size"):
        volseg.train(balls, tmp_path, config=tiny("plan.batch_size=2"), epochs=1, device="cpu")
    assert Plan.read_yaml(tmp_path / "plan.yaml").batch_size == 3


def test_second_is_refused_with_other_labels(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile(monkeypatch, lambda: plan_run(balls, tmp_path, tiny()))
    other = tiny("data.ignore_label=7")
    with pytest.raises(ConfigError, match="holds a run on"):
        volseg.train(balls, tmp_path, config=other, epochs=1, device="cpu")
    assert Dataset.read_json(tmp_path / "dataset.json") == find_dataset(balls)


def test_labels_are_those_of_the_one_that_planned(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = find_dataset(balls).with_labels(DataConfig(ignore_label=7))
    meanwhile(monkeypatch, lambda: open_run(tmp_path, other))
    prepare_training(balls, tmp_path, tiny(), CPU)
    assert Dataset.read_json(tmp_path / "dataset.json") == find_dataset(balls)


def test_plan_that_appears_while_a_folder_is_opened_is_seen(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan_behind(run: RunFolder) -> set[str]:
        monkeypatch.undo()
        plan_run(balls, tmp_path, tiny())
        return set()

    monkeypatch.setattr("volseg.run_folder._foreign_files", plan_behind)
    with pytest.raises(ConfigError, match="holds a run on"):
        open_run(tmp_path, find_dataset(balls).with_labels(DataConfig(ignore_label=7)))
    assert Dataset.read_json(tmp_path / "dataset.json") == find_dataset(balls)


def test_own_files_that_come_late_are_used_as_they_stand(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_run(balls, tmp_path / "other", tiny("plan.batch_size=3"))
    own_plan = "# my own\n" + (tmp_path / "other" / "plan.yaml").read_text()
    own_split = [{"train": ["case_00", "case_01"], "validation": ["case_04"]}]

    def write_own() -> None:
        (tmp_path / "run" / "plan.yaml").write_text(own_plan)
        (tmp_path / "run" / "splits.json").write_text(json.dumps(own_split))

    meanwhile(monkeypatch, write_own)
    setting = prepare_training(balls, tmp_path / "run", tiny(), CPU)
    assert (tmp_path / "run" / "plan.yaml").read_text() == own_plan
    assert json.loads((tmp_path / "run" / "splits.json").read_text()) == own_split
    assert setting.plan.batch_size == 3
    assert [split.validation for split in setting.splits] == [("case_04",)]


def test_planning_alone_leaves_a_plan_that_comes_late(balls: Path, tmp_path: Path) -> None:
    def measure(spatial_dims: int) -> Machine:
        (tmp_path / "plan.yaml").write_text("mine")
        return say_speed(CPU, spatial_dims)

    with pytest.raises(ConfigError, match=r"plan\.yaml exists; nothing was changed"):
        plan_for_machine(balls, tmp_path, tiny(), measure)
    assert (tmp_path / "plan.yaml").read_text() == "mine"


def test_written_splits_stay(balls: Path, tmp_path: Path) -> None:
    cases = find_dataset(balls).cases
    write_splits(tmp_path / "splits.json", make_splits(cases, 5, seed=0))
    before = (tmp_path / "splits.json").read_bytes()
    with pytest.raises(FileExistsError):
        write_splits(tmp_path / "splits.json", make_splits(cases, 5, seed=1))
    assert (tmp_path / "splits.json").read_bytes() == before


def test_two_at_once_have_one_plan(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Barrier(2)

    def measure(*arguments: Any, **options: Any) -> Machine:
        """Both measure at once, and one of them finds the machine ten thousand times slower."""
        machine = say_speed(CPU, 3)
        both.wait(timeout=60)
        slow = {"seconds_per_gflop": 100, "seconds_per_mvoxel": 200}
        return machine.model_copy(update=slow if current_thread().name.endswith("0") else {})

    monkeypatch.setattr("volseg.training.setting.measure_machine", measure)
    config = load_config(None, ["training.minutes=1"])

    def prepare(output: Path) -> Any:
        return prepare_training(balls, output, config, CPU)

    with ThreadPoolExecutor(2) as pool:
        alone = [one.plan for one in pool.map(prepare, [tmp_path / "a", tmp_path / "b"])]
        together = list(pool.map(prepare, [tmp_path / "run"] * 2))
    assert alone[0] != alone[1]
    assert together[0].plan == together[1].plan == Plan.read_yaml(tmp_path / "run" / "plan.yaml")
    assert together[0].splits == together[1].splits
