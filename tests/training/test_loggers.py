"""Rows of history in TensorBoard and MLflow."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

import volseg
from volseg.config import load_config
from volseg.errors import ConfigError
from volseg.training import loggers
from volseg.training.loggers import check_loggers


class Recorder(types.ModuleType):
    """Stands for a package: keeps every call."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *values, **named: self.calls.append((name, values, named))

    def find(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(values, named) for called, values, named in self.calls if called == name]


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    module = Recorder("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """TensorBoard's writer; calls of all writers in one list."""
    module = Recorder("tensorboardX")

    class Writer:
        def __init__(self, *values: Any, **named: Any) -> None:
            module.calls.append(("open", values, named))

        def __getattr__(self, name: str) -> Any:
            return getattr(module, name)

    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    return module


def train(dataset: Path, run: Path, *settings: str, **options: Any) -> list[dict[str, Any]]:
    config = None
    if not options.get("resume"):
        config = load_config(None, [*TINY, "training.steps_per_epoch=2", *settings])
    volseg.train(dataset, run, config=config, device="cpu", **options)
    return [json.loads(line) for line in (run / "fold_0" / "history.jsonl").open()]


def test_every_row_goes_to_mlflow(mlflow: Recorder, balls: Path, tmp_path: Path) -> None:
    rows = train(balls, tmp_path / "run", "training.log=[mlflow]", epochs=2)
    written = mlflow.find("log_metrics")
    assert [named["step"] for _, named in written] == [row["step"] for row in rows] == [2, 4]
    (metrics,), _ = written[-1]
    assert metrics["loss"] == rows[-1]["loss"]
    assert metrics["val_dice_by_class/organ_3"] == rows[-1]["val_dice_by_class"]["organ_3"]
    assert "step" not in metrics
    ((params,), _) = mlflow.find("log_params")[0]
    assert params["training.epochs"] == 2
    assert params["optimizer.learning_rate"] == 0.01
    assert mlflow.find("set_tag") == [(("mlflow.runName", "run/fold_0"), {})]
    assert mlflow.find("end_run") == [((), {"status": "FINISHED"})]


def test_every_row_goes_to_tensorboard_which_goes_on_after_a_stop(
    board: Recorder, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    add = loggers._to_tensorboard

    def stop(*arguments: Any) -> None:
        add(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(loggers, "_to_tensorboard", stop)
    with pytest.raises(KeyboardInterrupt):
        train(balls, run, "training.log=[tensorboard]", epochs=3)
    monkeypatch.setattr(loggers, "_to_tensorboard", add)
    rows = train(balls, run, resume=True)
    folder = str(run / "fold_0" / "tensorboard")
    assert board.find("open") == [((folder,), {"purge_step": None}), ((folder,), {"purge_step": 3})]
    losses = [values for values, _ in board.find("add_scalar") if values[0] == "loss"]
    assert losses == [("loss", row["loss"], row["step"]) for row in rows]
    assert len(board.find("close")) == 2


def test_names_that_mlflow_refuses_are_changed(mlflow: Recorder) -> None:
    row = {"step": 3, "val_dice": None, "val_dice_by_class": {"tumour (core)": 0.5, "b": None}}
    loggers._to_mlflow(mlflow, row)
    assert mlflow.find("log_metrics") == [
        (({"val_dice_by_class/tumour _core_": 0.5},), {"step": 3})
    ]


def test_other_processes_write_nothing(
    mlflow: Recorder, board: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "is_first", lambda: False)
    config = load_config(None, ["training.log=[tensorboard, mlflow]"])
    with loggers.open_loggers(None, config, None):
        pass
    assert (mlflow.calls, board.calls) == ([], [])


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_missing_package_is_said_before_anything_is_done(
    name: str, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=rf"{name}: .* pip install 'volseg\[{name}\]'"):
        train(balls, tmp_path / "run", f"training.log=[{name}]", epochs=1)
    assert not (tmp_path / "run").exists()
    check_loggers(())


def test_unknown_logger_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.log\.0: input should be 'tensorboard' or"):
        load_config(None, ["training.log=[wandb]"])


def test_tensorboard_itself_reads_what_was_written(balls: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = train(balls, tmp_path / "run", "training.log=[tensorboard]", epochs=2)
    events = reader.EventAccumulator(str(tmp_path / "run" / "fold_0" / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in rows]


def test_a_logger_that_fails_ends_no_training(
    mlflow: Recorder, balls: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*values: Any, **named: Any) -> None:
        mlflow.calls.append(("log_metrics" if values else "end_run", values, named))
        raise ConnectionError("no server")

    mlflow.log_metrics = fail
    mlflow.end_run = fail
    rows = train(balls, tmp_path / "run", "training.log=[mlflow]", epochs=3)
    assert len(rows) == 3
    assert len(mlflow.find("log_metrics")) == 1
    assert caplog.text.count("mlflow takes no more rows (no server)") == 1
    assert caplog.text.count("mlflow has not been told of the end (no server)") == 1


@pytest.mark.parametrize("call", ["start_run", "set_tag", "log_params"])
def test_a_logger_that_cannot_be_opened_ends_no_training(
    call: str,
    mlflow: Recorder,
    balls: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*values: Any, **named: Any) -> None:
        raise ConnectionError("no server")

    setattr(mlflow, call, fail)
    assert len(train(balls, tmp_path / "run", "training.log=[mlflow]", epochs=2)) == 2
    assert caplog.text.count("mlflow cannot be opened (no server); the training goes on") == 1
    assert mlflow.find("log_metrics") == []


def test_a_training_that_fails_is_no_finished_run(
    mlflow: Recorder, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise ValueError("something else")

    monkeypatch.setattr(sys.modules["volseg.training.train"], "run_to_end", fail)
    with pytest.raises(ValueError, match="something else"):
        train(balls, tmp_path / "run", "training.log=[mlflow]", epochs=1)
    assert mlflow.find("end_run") == [((), {"status": "FAILED"})]
