"""A run folder on a full disk, and under two processes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import TINY

import volseg
from volseg.config import Config, load_config
from volseg.data.layouts import find_dataset
from volseg.data.splits import Split
from volseg.errors import ConfigError, MachineError
from volseg.run_folder import (
    RunFolder,
    extend_fold,
    hold_fold,
    is_trained_besides,
    keep_splits,
    open_fold,
    open_run,
)

WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "dataset.json": lambda run, data: open_run(run, find_dataset(data)),
    "splits.json": lambda run, data: keep_splits(
        RunFolder(run), find_dataset(data), [Split(train=("case_00",), validation=("case_01",))]
    ),
    "config.yaml": lambda run, data: open_fold(RunFolder(run), 1, Config(), resume=False),
    "config_before_extension_1.yaml": lambda run, data: extend_fold(
        RunFolder(run), 0, Config(), number=1
    ),
}


@pytest.mark.parametrize("place", ["os.fsync", "pathlib.Path.mkdir"])
@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_is_said_of_every_file(
    name: str, place: str, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "fold_0" / "config.yaml"
    kept.parent.mkdir()
    kept.write_text("training: {epochs: 3}\n")

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = tmp_path if name.startswith(("config_", "splits")) else tmp_path / "new"
    monkeypatch.setattr(place, refuse)
    with pytest.raises(MachineError, match=rf"no space left while writing .*{name}; what was"):
        WRITERS[name](run, balls)
    monkeypatch.undo()
    assert kept.read_text() == "training: {epochs: 3}\n"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["config.yaml"]


@contextmanager
def held_elsewhere(fold: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the fold, until it is killed here or there."""
    code = (
        "import sys, pathlib; from volseg.run_folder import hold_fold\n"
        "with hold_fold(pathlib.Path(sys.argv[1])): print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(fold)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        try:
            yield other
        finally:
            other.kill()
            other.wait()


def test_a_fold_has_one_training_at_a_time(balls: Path, tmp_path: Path) -> None:
    run = volseg.train(balls, tmp_path / "run", config=load_config(None, TINY), epochs=1, fold=2)
    fold = run / "fold_0"
    with held_elsewhere(fold) as other:
        with pytest.raises(ConfigError, match=f"is being trained by process {other.pid} on "):
            with hold_fold(fold):
                pass
        with hold_fold(tmp_path / "run" / "fold_1"):
            pass
        with pytest.raises(ConfigError, match="is being trained by process"):
            volseg.train(balls, tmp_path / "run", config=load_config(None, TINY), epochs=1)
    # Whatever has ended it, the fold is free.
    with hold_fold(fold):
        assert (fold / "training.lock").read_text().startswith(f"{os.getpid()} on ")


def test_without_locks_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.lockf", fail)
    with hold_fold(tmp_path / "fold_0"):
        assert "fold_0 cannot be locked" in caplog.text


def test_another_process_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def lock(*arguments: object) -> None:
        attempts.append(arguments)
        if len(attempts) < 3:
            raise BlockingIOError

    monkeypatch.setattr("fcntl.lockf", lock)
    monkeypatch.setattr("volseg.run_folder.time.sleep", lambda seconds: None)
    with hold_fold(tmp_path / "fold_0", patience_s=60):
        assert len(attempts) == 3


def test_the_lock_of_another_user_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fold_0" / "training.lock").mkdir(parents=True)

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "not yours")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ConfigError, match=r"training\.lock cannot be written to"):
        with hold_fold(tmp_path / "fold_0"):
            pass


def test_what_another_training_reads_is_not_removed(balls: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(balls, tmp_path / "set"))
    config = load_config(None, TINY)
    run = volseg.train(folder, tmp_path / "run", config=config, epochs=1, fold=2)
    before = {path.name for path in (run / "cache").glob("case_*")}
    label = folder / "labelsTr" / "case_00.nii.gz"
    image = nib.load(label)
    nib.save(nib.Nifti1Image(np.roll(np.asarray(image.dataobj), 1, 0), image.affine), label)
    with held_elsewhere(run / "fold_0"):
        assert is_trained_besides(RunFolder(run), 1)
        assert not is_trained_besides(RunFolder(run), 0)
        volseg.train(folder, run, config=config, epochs=1, fold=1)
        now = {path.name for path in (run / "cache").glob("case_*")}
        assert before < now
        assert len(now) == len(before) + 1
    volseg.train(folder, run, config=config, epochs=1, fold=3)
    assert {path.name for path in (run / "cache").glob("case_*")} < now


def test_a_look_from_another_fold_refuses_no_training(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def lock(*arguments: object) -> None:
        attempts.append(arguments)
        if len(attempts) == 1:
            raise BlockingIOError

    monkeypatch.setattr("fcntl.lockf", lock)
    run = volseg.train(balls, tmp_path / "run", config=load_config(None, TINY), epochs=1)
    assert (run / "fold_0" / "checkpoint_last.pt").is_file()
    assert len(attempts) == 2
