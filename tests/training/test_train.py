"""Whole trainings on small data: what they write, refuse, resume, and that they learn."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from ignite.engine import Events
from known_speed import say_speed
from makers import keep, make_dataset
from PIL import Image
from torch import Tensor

import volseg
from volseg.config import Config, load_config
from volseg.data.cache import build_cache
from volseg.data.layouts import find_dataset
from volseg.data.patches import PatchDataset, make_loader
from volseg.errors import ConfigError, DataError
from volseg.inference.batch import Outputs, predict_cases
from volseg.inference.model import build_planned_network
from volseg.losses import DiceCrossEntropy, MultiLevelLoss
from volseg.networks import ResNetUNet, list_networks
from volseg.networks.weights import load_weights
from volseg.planning import Plan, plan_run
from volseg.run_folder import open_run
from volseg.training.budget import Budget
from volseg.training.engine import attach_counting, create_trainer, make_learner
from volseg.training.muon import Muon
from volseg.training.rounds import choose_validation
from volseg.training.validation import validate

CPU = torch.device("cpu")


def tiny(*overrides: str) -> Config:
    return load_config(None, [*TINY, *overrides])


def weights_of(run: Path, fold: int) -> dict[str, Any]:
    return load_weights(run / f"fold_{fold}" / "checkpoint_last.pt")


def weights(run: Path) -> dict[str, Any]:
    return weights_of(run, 0)


def is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(is_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_run_folder_holds_what_the_design_says(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"dataset.json", "fingerprint.json", "plan.yaml", "splits.json", "fold_0"} <= names
    fold = {path.name for path in (run / "fold_0").iterdir()}
    assert {
        "config.yaml",
        "checkpoint_last.pt",
        "checkpoint_best.pt",
        "history.jsonl",
        "progress.png",
    } <= fold
    assert not any(name.startswith(".") for name in fold)


def test_history_has_a_row_per_epoch(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "fold_0" / "history.jsonl").open()]
    assert [row["step"] for row in rows] == [6 * n for n in range(1, 11)]
    assert rows[-1]["learning_rate"] < rows[3]["learning_rate"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert set(rows[-1]["val_dice_by_class"]) == {"organ_3", "organ_7"}
    assert {row["val_cases"] for row in rows if "val_dice" in row} == {1}


def test_same_seed_gives_the_same_weights(balls: Path, tmp_path: Path) -> None:
    config = tiny("training.steps_per_epoch=3")
    a, b = (volseg.train(balls, tmp_path / n, config=config, epochs=1) for n in "ab")
    assert is_equal(weights(a)["network"], weights(b)["network"])


@pytest.mark.parametrize(("name", "kind"), [("unet", Muon), ("laddernet", torch.optim.AdamW)])
def test_resumed_training_equals_an_undisturbed_one(
    name: str,
    kind: type[torch.optim.Optimizer],
    balls: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny("training.steps_per_epoch=4", f"network.name={name}")
    whole = volseg.train(balls, tmp_path / "whole", config=config, epochs=3)
    stop_at = {"step": 6}
    update = kind.step

    def stopping(self: Any, closure: Any = None) -> Any:
        stop_at["step"] -= 1
        if stop_at["step"] == 0:
            raise KeyboardInterrupt
        return update(self, closure)

    monkeypatch.setattr(kind, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        volseg.train(balls, tmp_path / "parts", config=config, epochs=3)
    monkeypatch.undo()

    def measure(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the history knows the speed")

    monkeypatch.setattr(sys.modules["volseg.training.setting"], "measure_machine", measure)
    left = tmp_path / "parts" / "fold_0" / ".checkpoint_last-0a1b2c3d.pt"
    left.touch()
    parts = volseg.train(balls, tmp_path / "parts", resume=True)
    assert not left.exists()
    first, second = weights(whole), weights(parts)
    first["counters"].pop("elapsed_s"), second["counters"].pop("elapsed_s")
    assert is_equal(first, second)
    rows = [json.loads(line)["step"] for line in (parts / "fold_0" / "history.jsonl").open()]
    assert rows == [4, 8, 12]
    kept = Config.read_yaml(parts / "fold_0" / "config.yaml").optimizer
    assert (kept.name, kept.learning_rate) == {
        Muon: ("muon", 1e-2),
        torch.optim.AdamW: ("adamw", 3e-3),
    }[kind]


def test_training_on_minutes_killed_after_its_last_correction_ends_as_an_undisturbed_one(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["volseg.training.train"]
    started = module.create_trainer

    def keep_what_a_kill_leaves(learner: Any) -> Any:
        def copy_once() -> None:
            if learner.budget.is_final and not (tmp_path / "killed").exists():
                shutil.copytree(tmp_path / "run", tmp_path / "killed")

        trainer = started(learner)
        trainer.add_event_handler(Events.ITERATION_STARTED, copy_once)
        return trainer

    monkeypatch.setattr(module, "create_trainer", keep_what_a_kill_leaves)
    # Of so many steps few are at the end of a round, whatever the machine.
    clock = SimpleNamespace(monotonic=itertools.count(0, 0.02).__next__)
    monkeypatch.setattr(sys.modules["volseg.training.engine"], "time", clock)
    run = volseg.train(balls, tmp_path / "run", config=tiny(), minutes=0.1, device="cpu")
    monkeypatch.undo()
    killed = tmp_path / "killed"
    assert weights(killed)["counters"]["step"] < weights(run)["counters"]["step"]
    volseg.train(balls, killed, resume=True, device="cpu")
    states, histories = [], []
    for path in (run, killed):
        states.append(weights(path))
        states[-1]["counters"].pop("elapsed_s")
        rows = [json.loads(line) for line in (path / "fold_0" / "history.jsonl").open()]
        histories.append([(row["step"], row["loss"], row["progress"]) for row in rows])
    assert is_equal(*states)
    assert histories[0] == histories[1]


def test_interrupt_leaves_a_usable_model(balls: Path, tmp_path: Path) -> None:
    program = (
        "import sys, pytest; from known_speed import know_speed; from volseg.cli import main; "
        "know_speed(pytest.MonkeyPatch()); sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "train", str(balls), "-o", str(tmp_path / "run")]
    for override in TINY:
        command += ["--set", override]
    process = subprocess.Popen(
        [*command, "--epochs", "10000"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    history = tmp_path / "run" / "fold_0" / "history.jsonl"
    while process.poll() is None and not (history.exists() and history.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopping after this step" in errors
    assert (tmp_path / "run" / "fold_0" / "progress.png").exists()
    label = volseg.Predictor.load(tmp_path / "run")(next((balls / "imagesTr").iterdir()))
    assert label.labels.shape == (20, 18, 14)


def test_existing_training_is_not_overwritten(run: Path, balls: Path) -> None:
    before = (run / "fold_0" / "checkpoint_last.pt").read_bytes()
    with pytest.raises(ConfigError, match="already holds a training; nothing was changed"):
        volseg.train(balls, run, epochs=1)
    assert (run / "fold_0" / "checkpoint_last.pt").read_bytes() == before


def test_folder_of_another_dataset_is_refused(run: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", "msd", num_cases=5)
    with pytest.raises(ConfigError, match=r"holds a run on .*balls"):
        volseg.train(other, run, epochs=1)


def test_folder_with_other_files_is_refused(balls: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        volseg.train(balls, tmp_path, epochs=1)


def test_what_a_killed_planning_left_is_no_obstacle(balls: Path, tmp_path: Path) -> None:
    (tmp_path / ".fingerprint-0a1b2c3d.json").touch()
    assert open_run(tmp_path, find_dataset(balls)).path == tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": 7}, "fold 7; expected 0 to 4, or all"),
        ({"fold": "some"}, "fold some; expected 0 to 4"),
        ({"minutes": 1, "epochs": 1}, "both minutes and epochs"),
        ({"resume": True, "minutes": 3}, "keeps the configuration it began with"),
        ({"minutes": 0}, "minutes: input should be greater than 0"),
        ({"minutes": 1, "config": tiny("training.patience=24")}, "can validate 25 times"),
        ({"epochs": 3, "config": tiny("training.patience=2")}, "patience 2 .* validate 3 times"),
        ({"device": "tpu9"}, "expected auto, cpu, cuda"),
    ],
)
def test_wrong_option_is_refused(
    balls: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        volseg.train(balls, tmp_path / "run", **{"config": tiny(), **options})
    # Before any case was read.
    assert not (tmp_path / "run" / "plan.yaml").exists()


def test_nothing_to_resume_is_said(balls: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint to resume"):
        volseg.train(balls, tmp_path / "run", resume=True)


def test_all_folds_go_on_where_they_were_stopped(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("training.steps_per_epoch=2", "training.num_folds=3")
    module = sys.modules["volseg.training.train"]
    started = module.create_trainer

    def interrupt_second_fold(learner: Any) -> Any:
        trainer = started(learner)
        if (tmp_path / "run" / "fold_1").exists():
            trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), trainer.interrupt)
        return trainer

    monkeypatch.setattr(module, "create_trainer", interrupt_second_fold)
    run = volseg.train(balls, tmp_path / "run", config=config, epochs=2, fold="all")
    assert not (run / "fold_2").exists()
    monkeypatch.undo()
    volseg.train(balls, run, fold="all", resume=True)
    assert [weights_of(run, fold)["counters"]["step"] for fold in range(3)] == [4, 4, 4]


def test_edited_plan_is_used_and_contradictions_are_refused(balls: Path, tmp_path: Path) -> None:
    plan_run(balls, tmp_path / "run", tiny(), partial(say_speed, CPU))
    path = tmp_path / "run" / "plan.yaml"
    path.write_text(path.read_text().replace("batch_size: 2", "batch_size: 3"))
    other = tiny("plan.batch_size=2")
    with pytest.raises(ConfigError, match="the configuration contradicts its batch_size"):
        volseg.train(balls, tmp_path / "run", config=other, epochs=1)
    flat = tiny("network.deep_supervision=false")
    with pytest.raises(ConfigError, match=r"contradicts its network\.deep_supervision"):
        volseg.train(balls, tmp_path / "run", config=flat, epochs=1)
    config = tiny("training.steps_per_epoch=1")
    volseg.train(balls, tmp_path / "run", config=config, epochs=1)
    assert Plan.read_yaml(path).batch_size == 3


def test_bad_case_stops_the_training_with_its_name(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", "msd", num_cases=5)
    file = folder / "imagesTr" / "case_03.nii.gz"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(DataError, match=r"case_03\.nii\.gz"):
        volseg.train(folder, tmp_path / "run", config=tiny(), epochs=1)


def test_mended_dataset_may_use_the_folder_of_the_failed_attempt(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", "folders", num_cases=6)
    (folder / "images" / "case_03.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"case_03\.nii\.gz"):
        volseg.train(folder, tmp_path / "run", config=tiny(), epochs=1)
    (folder / "images" / "case_03.nii.gz").unlink()
    (folder / "labels" / "case_03.nii.gz").unlink()
    volseg.train(folder, tmp_path / "run", config=tiny("training.steps_per_epoch=1"), epochs=1)


def test_own_splits_are_used(balls: Path, tmp_path: Path) -> None:
    split = {"train": ["case_00", "case_01"], "validation": ["case_04"]}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "splits.json").write_text(json.dumps([split]))
    config = tiny("training.steps_per_epoch=1")
    run = volseg.train(balls, tmp_path / "run", config=config, epochs=1)
    assert json.loads((run / "splits.json").read_text()) == [split]
    prepared = {path.parent.name[:7] for path in (run / "cache").glob("*/case.json")}
    assert prepared == {"case_00", "case_01", "case_04"}


def test_all_cases_may_be_learned_from(balls: Path, tmp_path: Path) -> None:
    split = {"train": [f"case_{number:02d}" for number in range(5)], "validation": []}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "splits.json").write_text(json.dumps([split]))
    config = tiny("training.steps_per_epoch=1")
    run = volseg.train(balls, tmp_path / "run", config=config, epochs=2)
    rows = [json.loads(line) for line in (run / "fold_0" / "history.jsonl").open()]
    assert [row.get("val_dice") for row in rows] == [None, None]
    assert not (run / "fold_0" / "checkpoint_best.pt").exists()
    assert volseg.Predictor.load(run)(balls / "imagesTr" / "case_00.nii.gz").labels.shape


def test_patience_without_validation_is_refused_before_any_fold_begins(
    balls: Path, tmp_path: Path
) -> None:
    cases = [f"case_{number:02d}" for number in range(5)]
    splits = [{"train": cases[:4], "validation": cases[4:]}, {"train": cases, "validation": []}]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "splits.json").write_text(json.dumps(splits))
    config = tiny("training.steps_per_epoch=1", "training.patience=1")
    with pytest.raises(ConfigError, match=r"training\.patience .* in fold 1; .* Leave it out"):
        volseg.train(balls, tmp_path / "run", config=config, epochs=9, fold="all")
    assert not (tmp_path / "run" / "cache").exists()
    assert not list((tmp_path / "run").glob("fold_*"))


def test_patience_without_validation_is_refused_where_it_comes_later(
    balls: Path, tmp_path: Path
) -> None:
    split = {"train": [f"case_{number:02d}" for number in range(5)], "validation": []}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "splits.json").write_text(json.dumps([split]))
    run = volseg.train(balls, tmp_path / "run", config=tiny("training.steps_per_epoch=1"), epochs=9)
    kept = run / "fold_0" / "config.yaml"
    kept.write_text(kept.read_text().replace("patience: null", "patience: 1"))
    with pytest.raises(ConfigError, match=r"training\.patience .* in fold 0; .* Leave it out"):
        volseg.train(balls, run, resume=True)


@pytest.mark.parametrize(("beside", "workers"), [(None, 8), ("4", 3), ("8", 1), ("16", 1)])
def test_processes_of_a_machine_share_its_cores(
    beside: str | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["volseg.training.train"]
    monkeypatch.setattr(module, "count_cores", lambda: 16)
    if beside is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", beside)
    assert module._num_workers(Config(), torch.device("cuda")) == workers
    assert module._num_workers(Config(), CPU) == 0
    assert module._num_workers(tiny("training.workers=5"), CPU) == 5


def test_coloured_pictures_train_and_predict(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(5):
        label = np.zeros((40, 32), np.uint8)
        label[8 + number : 20 + number, 6:16] = 1
        image = rng.normal(60, 10, (40, 32, 3)) + 100 * label[..., None]
        for part, array in (("images", image.clip(0, 255).astype(np.uint8)), ("labels", label)):
            (tmp_path / "d" / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / "d" / part / f"p{number}.png")
    quick = ["plan.width=4", "plan.num_levels=3", "plan.batch_size=4"]
    quick += ["training.steps_per_epoch=120", "optimizer.learning_rate=0.01"]
    config = load_config(None, quick)
    run = volseg.train(tmp_path / "d", tmp_path / "run", config=config, epochs=1)
    cases = find_dataset(tmp_path / "d").cases[:1]
    outputs = Outputs(tmp_path / "p", probabilities=True)
    predict_cases(volseg.Predictor.load(run), cases, outputs)
    written = {path.name for path in (tmp_path / "p").iterdir() if path.suffix != ".json"}
    assert written == {"p0.png", "p0_probabilities.nrrd"}
    reference = np.asarray(Image.open(tmp_path / "d" / "labels" / "p0.png"))
    predicted = np.asarray(Image.open(tmp_path / "p" / "p0.png"))
    assert 2 * (predicted & reference).sum() / (predicted.sum() + reference.sum()) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in list_networks() if name != "unet"])
def test_every_network_trains_and_predicts_by_its_name(
    name: str, balls: Path, tmp_path: Path
) -> None:
    config = tiny(f"network.name={name}", "training.steps_per_epoch=2")
    run = volseg.train(balls, tmp_path / "run", config=config, epochs=1)
    assert Plan.read_yaml(run / "plan.yaml").network.name == name
    segmentation = volseg.Predictor.load(run)(balls / "imagesTr" / "case_00.nii.gz")
    assert segmentation.labels.shape == (20, 18, 14)


def test_options_of_network_and_supervision_reach_the_training(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def keep(self: MultiLevelLoss, logits: list[Tensor], target: Tensor) -> Tensor:
        seen.update(outputs=len(logits), progress=self.progress, weights=self.weights)
        return logits[0].square().mean()

    monkeypatch.setattr(MultiLevelLoss, "forward", keep)
    config = tiny(
        "network.name=unetplusplus",
        "network.options.form=keras",
        "loss.supervision_weights=[1, 0.5]",
        "training.steps_per_epoch=4",
    )
    run = volseg.train(balls, tmp_path / "run", config=config, epochs=1)
    assert Plan.read_yaml(run / "plan.yaml").network.options == {"form": "keras"}
    assert seen == {"outputs": 2, "progress": 0.75, "weights": (1, 0.5)}


def test_pretrained_weights_are_for_the_network_that_takes_them(
    balls: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="network 'unet'; expected 'resnet_unet'"):
        volseg.train(balls, tmp_path / "a", config=tiny("network.pretrained=r34.pth"), epochs=1)
    config = tiny("network.name=resnet_unet", f"network.pretrained={tmp_path / 'r34.pth'}")
    with pytest.raises(ConfigError, match=r"r34\.pth does not exist"):
        volseg.train(balls, tmp_path / "b", config=config, epochs=1)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "r34.pth")
    with pytest.raises(DataError, match=r"r34\.pth does not fit"):
        volseg.train(balls, tmp_path / "b", config=config, epochs=1)
    assert not (tmp_path / "b" / "plan.yaml").exists()


def test_training_begins_on_pretrained_weights_and_resumes_without_the_file(
    balls: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"depth": 18, "channels": (8, 8, 16), "kernel_sizes": (3, 3, 3)}
    # Four units in two stages of a network made here stand for a ResNet-18.
    source = ResNetUNet(2, 3, 2, stem="k3s1", **options)
    state = {
        f"layer{stage}.{unit}.conv{place}.weight": getattr(conv, "conv", conv).weight.detach()
        for stage, part in enumerate(source.stages, start=1)
        for unit, block in enumerate([part.first, *part.units])
        for place, conv in enumerate(block.convs, start=1)
    }
    for stage in (3, 4):
        for unit, place in itertools.product((0, 1), (1, 2)):
            state[f"layer{stage}.{unit}.conv{place}.weight"] = torch.zeros(1)
    path = tmp_path / "r18.pth"
    torch.save(state, path)
    config = tiny(
        "network.name=resnet_unet",
        "network.options.depth=18",
        f"network.pretrained={path}",
        "training.steps_per_epoch=1",
    )
    with caplog.at_level("INFO"):
        run = volseg.train(balls, tmp_path / "run", config=config, epochs=1)
    assert "pretrained weights from" in caplog.text
    path.unlink()
    assert volseg.train(balls, run, resume=True) == run


def test_same_command_trains_the_next_fold(balls: Path, tmp_path: Path) -> None:
    config = tiny(
        "network.name=laddernet",
        "network.deep_supervision=false",
        "network.options.norm=[batch, {eps: 1.0e-3}]",
        "training.steps_per_epoch=1",
    )
    for fold in (0, 1):
        run = volseg.train(balls, tmp_path / "run", config=config, epochs=1, fold=fold)
    assert (run / "fold_1" / "checkpoint_last.pt").exists()


@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        (["network.name=unetplusplus"], "same"),
        (["network.name=unet3d_deep_supervision"], "halving"),
        (["network.name=dsn3d", "plan.num_levels=4", "plan.patch=[32, 32, 32]"], "dsn"),
        (["network.name=dsn3d", "loss.supervision_weights=two"], "two"),
    ],
)
def test_outputs_are_weighted_as_the_source_does_unless_said(
    overrides: list[str],
    weights: str,
    balls: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = {}

    def keep(self: MultiLevelLoss, logits: list[Tensor], target: Tensor) -> Tensor:
        seen.update(weights=self.weights)
        return logits[0].square().mean()

    monkeypatch.setattr(MultiLevelLoss, "forward", keep)
    config = tiny(*overrides, "training.steps_per_epoch=1")
    volseg.train(balls, tmp_path / "run", config=config, epochs=1)
    assert seen == {"weights": weights}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["network.name=ladernet"], "Did you mean 'laddernet'"),
        (["network.name=laddernet", "network.deep_supervision=true"], "has a single output"),
        (["network.name=laddernet", "network.options.ladders=3"], "Did you mean 'num_ladders'"),
        (["network.name=laddernet", "loss.supervision_weights=dsn"], "has a single output"),
        (
            ["network.name=unetplusplus", "loss.supervision_weights=[1, 0.5, 0.2]"],
            "3 weights .* for",
        ),
        (["network.name=unetplusplus", "loss.supervision_target=max"], "all have full resolution"),
        (["network.options.in_channels=3"], "in_channels cannot be set there"),
        (["network.options.strides=[1, 2]"], "strides cannot be set there"),
        (
            [
                "network.name=unet_original",
                "network.options={align: crop, padding: valid}",
                "plan.patch=[48, 48, 48]",
            ],
            "expected the same size",
        ),
        (["network.name=unet3d_original", "plan.width=5"], "expected even numbers"),
        (["network.name=laddernet", "optimizer.momentum=0.9"], "which adamw trains"),
        (
            ["network.name=laddernet", "loss.dice_weight=0", "loss.cross_entropy_weight=0"],
            "^dice_weight 0.* one of them above",
        ),
    ],
)
def test_network_that_cannot_train_is_refused_before_anything_is_kept(
    overrides: list[str], message: str, balls: Path, tmp_path: Path
) -> None:
    config = load_config(None, [*TINY, *overrides])
    with pytest.raises(ConfigError, match=message):
        volseg.train(balls, tmp_path / "run", config=config, epochs=1)
    assert not (tmp_path / "run" / "plan.yaml").exists()
    assert not (tmp_path / "run" / "cache").exists()


def test_training_of_an_edited_plan_can_be_resumed(balls: Path, tmp_path: Path) -> None:
    plan_run(balls, tmp_path / "run", tiny("network.name=laddernet"), partial(say_speed, CPU))
    config = tiny("training.steps_per_epoch=2")
    assert "name" not in config.network.model_fields_set
    run = volseg.train(balls, tmp_path / "run", config=config, epochs=1)
    assert volseg.train(balls, run, resume=True) == run


def test_two_folds_share_plan_and_cache(balls: Path, tmp_path: Path) -> None:
    config = tiny("training.steps_per_epoch=1", "training.num_folds=2")
    run = volseg.train(balls, tmp_path / "run", config=config, epochs=1, fold="all")
    assert {p.name for p in run.glob("fold_*")} == {"fold_0", "fold_1"}
    predictor = volseg.Predictor.load(run)
    assert len(predictor.model.networks) == 2
    segmentation = predictor(next((balls / "imagesTr").iterdir()), probabilities=True)
    assert segmentation.probabilities is not None
    assert segmentation.probabilities.sum(0) == pytest.approx(np.ones((20, 18, 14)), abs=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_training_on_minutes_ends_in_time_at_progress_one(
    balls: Path, tmp_path: Path, device: str
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    run = volseg.train(balls, tmp_path / "run", config=tiny(), minutes=0.03, device=device)
    rows = [json.loads(line) for line in (run / "fold_0" / "history.jsonl").open()]
    assert rows[-1]["progress"] == 1
    assert rows[-1]["val_dice"] is not None


@pytest.mark.slow
def test_one_case_can_be_learned_by_heart(balls: Path, tmp_path: Path) -> None:
    dataset = find_dataset(balls)
    network = {
        "name": "unet",
        "channels": (8, 16, 32),
        "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2)),
        "kernel_sizes": ((3, 3, 3),) * 3,
        "deep_supervision": True,
    }
    plan = Plan(
        spatial_dims=3,
        spacing_mm=(1.2, 1.2, 1.2),
        patch=(16, 16, 16),
        batch_size=2,
        normalisation=({"channel": "MR0", "scheme": "zscore"},),
        network=network,
    )
    cases = build_cache(dataset, dataset.cases[:1], plan, tmp_path)
    learner = make_learner(
        build_planned_network(plan, 3),
        MultiLevelLoss(DiceCrossEntropy(1, 1)),
        CPU,
        Budget(200),
        Config().optimizer,
        seed=0,
    )
    patches = PatchDataset(cases, plan.patch, batch_size=2, foreground=0.5, augment=keep, seed=0)
    trainer = create_trainer(learner)
    attach_counting(trainer, learner, num_rounds=1)
    trainer.run(make_loader(patches, 0, 0, CPU), max_epochs=1, epoch_length=1000)
    assert learner.counters.step == 200
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learner.network.parameters())
    dice = validate(learner.network, cases, plan, dataset.classes, CPU)
    assert min(dice) > 0.95


def test_interrupt_in_the_last_step_of_a_fold_leaves_the_others(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Muon.step

    def stopping(self: Any, closure: Any = None) -> Any:
        signal.raise_signal(signal.SIGINT)
        return update(self, closure)

    monkeypatch.setattr(Muon, "step", stopping)
    config = tiny("training.steps_per_epoch=1")
    run = volseg.train(balls, tmp_path / "run", config=config, epochs=1, fold="all")
    assert weights(run)["counters"]["step"] == 1
    assert not (run / "fold_1").exists()


def test_training_ends_when_no_validation_gets_better(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(
        "volseg.training.rounds.draw_progress", lambda path, rows: drawn.append(rows[-1]["step"])
    )
    fixed = ("training.patience=2", "optimizer.learning_rate=1e-12", "training.steps_per_epoch=2")
    config = tiny(*fixed)
    run = volseg.train(balls, tmp_path / "run", config=config, epochs=30)
    rows = [json.loads(row) for row in (run / "fold_0" / "history.jsonl").read_text().splitlines()]
    validated = [row["val_dice"] for row in rows if "val_dice" in row]
    assert len(validated) < 8
    assert drawn == [row["step"] for row in rows if "val_dice" in row]
    assert max(validated[-2:]) <= max(validated[:-2])
    last = weights(run)["counters"]["step"]
    assert last < 30 * 2
    volseg.train(balls, run, resume=True)
    assert weights(run)["counters"]["step"] == last


@pytest.mark.parametrize("patience", range(1, 24))
@pytest.mark.parametrize("step_seconds", [1e-6, 1e3])
def test_patience_can_come_to_its_end_whatever_validations_cost(
    patience: int, step_seconds: float
) -> None:
    training = tiny(f"training.patience={patience}", "training.minutes=15").training
    case = SimpleNamespace(label=np.zeros((64, 64, 64)))
    plan = SimpleNamespace(patch=(16, 16, 16), batch_size=2)
    cases, every = choose_validation([case] * 9, plan, step_seconds, training, num_rounds=25)
    # The last round validates in any case, and the first validation is never a worse one.
    assert len([n for n in range(1, 26) if n % every == 0 or n == 25]) > patience + 1
    assert len(cases) == (9 if step_seconds < 1 else 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_case_that_cannot_be_cut_is_named(balls: Path, tmp_path: Path, workers: int) -> None:
    config = tiny("training.steps_per_epoch=1")
    run = volseg.train(balls, tmp_path / "run", config=config, epochs=1)
    dataset, plan = find_dataset(balls), Plan.read_yaml(run / "plan.yaml")
    cases = build_cache(dataset, dataset.cases[:1], plan, run / "cache")
    (cases[0].folder / "image.npy").write_bytes(b"no array")
    patches = PatchDataset(cases, plan.patch, batch_size=2, foreground=1, augment=keep, seed=0)
    with pytest.raises(DataError, match=r"^case case_00: no patch could be cut from [^\n]*$"):
        next(iter(make_loader(patches, 0, workers, CPU)))


def test_zeros_outside_a_masked_brain_stay_zero_in_training(
    balls: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, made = sys.modules["volseg.training.train"], []
    plan = Plan.read_yaml(run / "plan.yaml")
    masked = tuple(n.model_copy(update={"nonzero_only": True}) for n in plan.normalisation)
    setting = SimpleNamespace(
        plan=plan.model_copy(update={"normalisation": masked}),
        dataset=find_dataset(balls),
        device=CPU,
    )
    monkeypatch.setattr(module, "PatchDataset", lambda *_, augment, **__: made.append(augment))
    monkeypatch.setattr(module, "make_loader", lambda *_: None)
    module._make_loader(setting, Config(), [], 0)
    setting.plan = plan
    module._make_loader(setting, Config(), [], 0)
    assert [augment.masked_channels for augment in made] == [(0,), ()]


@pytest.mark.parametrize(
    ("flip", "is_told"), [("0.5", True), ("[0, 0.5, 0.5]", False), ("0", False)]
)
def test_mirroring_of_classes_without_names_is_told(
    flip: str,
    is_told: bool,
    balls: Path,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, dataset = sys.modules["volseg.training.train"], find_dataset(balls)
    monkeypatch.setattr(module, "PatchDataset", lambda *_, **__: None)
    monkeypatch.setattr(module, "make_loader", lambda *_: None)
    numbered = dataset.classes.model_copy(update={"names": ("background", "label_3", "label_7")})
    plan = Plan.read_yaml(run / "plan.yaml")
    for classes in (dataset.classes, numbered):
        caplog.clear()
        named = dataset.model_copy(update={"classes": classes})
        setting = SimpleNamespace(plan=plan, dataset=named, device=CPU)
        module._make_loader(setting, load_config(None, [f"augmentation.flip={flip}"]), [], 0)
        assert ("none is known as left or right" in caplog.text) == (is_told and named != dataset)


def test_wrong_mirroring_is_refused_before_anything_is_prepared(
    balls: Path, tmp_path: Path
) -> None:
    config = tiny("augmentation.flip=[0.5, 0]")
    with pytest.raises(ConfigError, match=r"augmentation\.flip \[0\.5, 0\.0\]; expected 3 values"):
        volseg.train(balls, tmp_path / "run", config=config, epochs=1)
    assert not (tmp_path / "run" / "plan.yaml").exists()
