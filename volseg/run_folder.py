"""A run folder and what is in it; what must not be overwritten is checked here.

::

    RUN/dataset.json  fingerprint.json  plan.yaml  splits.json  cache/
    RUN/fold_K/config.yaml  checkpoint_last.pt  checkpoint_best.pt  history.jsonl  progress.png
    RUN/fold_K/config_before_extension_N.yaml  training.lock
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from volseg.atomic import explain_full_disk, is_temporary, remove_temporary, write_text
from volseg.config import Config, dump_yaml
from volseg.data.cases import Case, Dataset
from volseg.data.splits import Split, choose_splits, read_splits, write_splits
from volseg.errors import ConfigError

logger = logging.getLogger(__name__)

PLAN_FILE = "plan.yaml"
DATASET_FILE = "dataset.json"
SPLITS_FILE = "splits.json"
LOCK_FILE = "training.lock"
_FOLD = re.compile(r"fold_(0|[1-9][0-9]*)")
LAST = "checkpoint_last.pt"
BEST = "checkpoint_best.pt"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run; made by `open_run`."""

    path: Path

    @property
    def plan(self) -> Path:
        """The plan, made by volseg or edited by the user."""
        return self.path / PLAN_FILE

    @property
    def fingerprint(self) -> Path:
        """The dataset's measured facts."""
        return self.path / "fingerprint.json"

    @property
    def splits(self) -> Path:
        """Training and validation cases of every fold."""
        return self.path / SPLITS_FILE

    @property
    def cache(self) -> Path:
        """Prepared cases."""
        return self.path / "cache"

    def fold(self, fold: int) -> Path:
        """Folder of one fold's training."""
        return self.path / f"fold_{fold}"

    def in_folds(self, name: str) -> list[Path]:
        """A file of every fold that has it; a copy of a fold's folder is none."""
        found = self.path.glob(f"fold_*/{name}")
        return sorted(path for path in found if _FOLD.fullmatch(path.parent.name))


def open_run(path: Path, dataset: Dataset) -> RunFolder:
    """Use `path` for `dataset`: a new or empty folder, or one that holds a run on this dataset.

    A folder that was never planned is free, since its dataset may have been mended meanwhile; a
    ``splits.json`` that waits there is the user's own.

    Raises:
        ConfigError: the folder holds something else.
    """
    run = RunFolder(path)
    described = path / DATASET_FILE
    # Looked at before the plan, which another process may be about to write.
    is_free = not path.exists() or (path.is_dir() and not _foreign_files(run))
    if run.plan.exists() and described.exists():
        other = Dataset.read_json(described)
        if other != dataset:
            raise ConfigError(
                f"{path} holds a run on {other.root} ({len(other.cases)} cases), not on "
                f"{dataset.root} ({len(dataset.cases)} cases) as it is now. Choose another folder."
            )
        return run
    if not is_free:
        raise ConfigError(
            f"{path} is not empty and holds no run; expected a new or empty folder. "
            "Choose another one."
        )
    dataset.write_json(described)
    return run


def _foreign_files(run: RunFolder) -> set[str]:
    known = {DATASET_FILE, run.splits.name, run.fingerprint.name}
    return {file.name for file in run.path.iterdir() if not is_temporary(file)} - known


def open_splits(run: RunFolder, dataset: Dataset, config: Config) -> list[Split]:
    """The run's splits: those of ``splits.json`` (own ones are welcome), else made now."""
    if run.splits.exists():
        return read_splits(run.splits, dataset.cases)
    return choose_splits(dataset, config.training.num_folds, config.training.seed)


def keep_splits(run: RunFolder, dataset: Dataset, splits: list[Split]) -> list[Split]:
    """Write ``splits.json``, unless there is one by now.

    Args:
        run: its folder.
        dataset: what it trains on.
        splits: of `open_splits`.

    Returns:
        The splits that are there.

    Raises:
        DataError: what another process or the user has written meanwhile cannot be used.
    """
    with suppress(FileExistsError):
        if not run.splits.exists():
            write_splits(run.splits, splits)
    kept = read_splits(run.splits, dataset.cases)
    if kept != splits:
        logger.info("splits: using %s, which was written meanwhile", run.splits)
    return kept


def open_fold(run: RunFolder, fold: int, config: Config, resume: bool) -> Config:
    """Make the folder of a fold and keep its configuration, or take up the one that is there.

    Returns:
        The configuration to train with: on resume, the one that the training began with.

    Raises:
        ConfigError: there is a training already, or none to resume.
    """
    folder = run.fold(fold)
    has_training = (folder / LAST).exists()
    if has_training and not resume:
        raise ConfigError(
            f"{folder} already holds a training; nothing was changed. Continue it with --resume, "
            "or choose another folder."
        )
    if resume and not has_training:
        raise ConfigError(f"{folder} holds no checkpoint to resume. Leave --resume out.")
    if resume:
        # Nobody else writes there.
        remove_temporary(folder)
        return Config.read_yaml(folder / "config.yaml")
    write_text(folder / "config.yaml", dump_yaml(config.model_dump(mode="json")))
    return config


@contextmanager
def hold_fold(folder: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Keep others from training the same fold, also on other machines, until this process is done.

    However it ends, the system takes the lock from it. Where there are no locks, a warning says so.

    Args:
        folder: of the fold; made if missing.
        patience_s: to wait for another process.

    Raises:
        ConfigError: another process trains it, or its lock is another user's.
        MachineError: the disk is full.
    """
    path = folder / LOCK_FILE
    with ExitStack() as stack:
        try:
            with explain_full_disk(path):
                folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(path, "a+"))
                _lock(file, folder, patience_s)
                file.truncate(0)
                file.write(f"{os.getpid()} on {socket.gethostname()}")
                file.flush()
        except PermissionError as error:
            raise ConfigError(
                f"{path} cannot be written to; expected a file of yours. Remove it, or choose "
                "another folder."
            ) from error
        yield


def is_trained_besides(run: RunFolder, fold: int) -> bool:
    """Whether a fold other than this one is being trained, as far as the file system can tell."""
    for path in run.in_folds(LOCK_FILE):
        if path.parent == run.fold(fold):
            continue  # To close it would give up a lock of this process.
        try:
            import fcntl

            with open(path, "a+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (OSError, ImportError):
            return True
    return False


def _lock(file: TextIO, folder: Path, patience_s: float) -> None:
    end = time.monotonic() + patience_s
    while True:
        try:
            import fcntl

            # Of this process alone: loader processes may outlive it for seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError) as error:
            if time.monotonic() >= end:
                file.seek(0)
                raise ConfigError(
                    f"{folder} is being trained by process {file.read().strip()}; expected one at "
                    "a time. Wait for it or end it, or choose another folder."
                ) from error
            time.sleep(1)
        except (OSError, ImportError) as error:  # ImportError: on Windows.
            logger.warning("%s cannot be locked (%s); train it once at a time", folder, error)
            return


def name_config_before(extension: int) -> str:
    """The file with the configuration that a fold had before its extension of this number."""
    return f"config_before_extension_{extension}.yaml"


def extend_fold(run: RunFolder, fold: int, config: Config, number: int) -> None:
    """Keep the configuration of an extension, and beside it the one from before.

    Args:
        run: its folder.
        fold: which one.
        config: of the extension.
        number: which extension it is, from 1.
    """
    path = run.fold(fold) / "config.yaml"
    before = path.with_name(name_config_before(number))
    # Killed at its beginning, the same extension may begin twice.
    if not before.exists():
        write_text(before, path.read_text(encoding="utf-8"))
    write_text(path, dump_yaml(config.model_dump(mode="json")))


def select_cases(dataset: Dataset, case_ids: tuple[str, ...]) -> list[Case]:
    """Cases of `dataset` by id, in the order of the dataset."""
    wanted = set(case_ids)
    return [case for case in dataset.cases if case.case_id in wanted]
