"""Rows of history for TensorBoard and MLflow too, where a training is asked for it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ignite.engine import Engine
from ignite.handlers.mlflow_logger import MLflowLogger
from ignite.handlers.tensorboard_logger import TensorboardLogger

from volseg.config import Config
from volseg.errors import ConfigError
from volseg.training.engine import TrainingEvents
from volseg.training.history import History
from volseg.training.parallel import is_first

logger = logging.getLogger(__name__)

_Send = Callable[[Mapping[str, Any]], None]
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow",)}


def check_loggers(names: Sequence[str]) -> None:
    """Refuse a logger whose package is missing.

    Raises:
        ConfigError: it is not installed; names the extra that brings it.
    """
    for name in names:
        if not any(find_spec(package) for package in _PACKAGES[name]):
            raise ConfigError(
                f"training.log {name}: that package is not installed. Install it: "
                f"pip install 'volseg[{name}]'"
            )


@contextmanager
def open_loggers(trainer: Engine, config: Config, history: History) -> Iterator[None]:
    """Give every new row of history to the loggers of `config`; the first process alone does.

    TensorBoard writes into ``tensorboard/`` beside the history; a resumed training goes on there.
    MLflow writes to where its own settings say, a new run each time.

    Args:
        trainer: fires `TrainingEvents.ROUND_COMPLETED` after the row was added.
        config: of the training.
        history: its rows.
    """
    with ExitStack() as stack:
        for name in config.training.log if is_first() else ():
            try:
                send = _OPENERS[name](config, history, stack)
            except Exception as error:  # A log is not worth a training.
                logger.warning("%s cannot be opened (%s); the training goes on", name, error)
            else:
                _attach(trainer, history, name, send)
        yield


def _open_tensorboard(config: Config, history: History, stack: ExitStack) -> _Send:
    done = history.rows[-1]["step"] if history.rows else None
    folder = history.path.parent / "tensorboard"
    board = TensorboardLogger(str(folder), purge_step=None if done is None else done + 1)
    stack.enter_context(board)
    return partial(_to_tensorboard, board)


def _open_mlflow(config: Config, history: History, stack: ExitStack) -> _Send:
    flow = MLflowLogger()
    stack.push(partial(_end, flow))
    flow.set_tag("mlflow.runName", _name_run(history.path.parent))
    flow.log_params(dict(_flatten(config.model_dump(mode="json"))))
    return partial(_to_mlflow, flow)


_OPENERS: dict[str, Callable[[Config, History, ExitStack], _Send]] = {
    "tensorboard": _open_tensorboard,
    "mlflow": _open_mlflow,
}


def _attach(trainer: Engine, history: History, name: str, send: _Send) -> None:
    """Give every new row to a logger, for as long as it takes them."""

    def follow() -> None:
        try:
            send(history.rows[-1])
        except Exception as error:  # A log is not worth a training.
            logger.warning("%s takes no more rows (%s); the training goes on", name, error)
            trainer.remove_event_handler(follow, TrainingEvents.ROUND_COMPLETED)

    trainer.add_event_handler(TrainingEvents.ROUND_COMPLETED, follow)


def _end(flow: MLflowLogger, kind: type[BaseException] | None, *_: object) -> None:
    """Tell MLflow whether a training failed; whatever it says, that does not change."""
    try:
        flow.end_run(status="FINISHED" if kind is None else "FAILED")
    except Exception as error:
        logger.warning("mlflow has not been told of the end (%s)", error)


def _to_tensorboard(board: TensorboardLogger, row: Mapping[str, Any]) -> None:
    for name, value in _list_scalars(row).items():
        board.writer.add_scalar(name, value, row["step"])
    board.writer.flush()


def _to_mlflow(flow: MLflowLogger, row: Mapping[str, Any]) -> None:
    # MLflow refuses other characters, which names of classes may have.
    scalars = {re.sub(r"[^\w\-. /]", "_", n): value for n, value in _list_scalars(row).items()}
    flow.log_metrics(scalars, step=row["step"])


def _list_scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a row; those of classes as ``val_dice_by_class/NAME``."""
    return {
        name: float(value)
        for name, value in _flatten(row, "/")
        if name != "step" and isinstance(value, (int, float))
    }


def _flatten(values: Mapping[str, Any], join: str = ".") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            for inner, scalar in _flatten(value, join):
                yield f"{name}{join}{inner}", scalar
        else:
            yield name, value


def _name_run(fold: Path) -> str:
    return f"{fold.resolve().parent.name}/{fold.name}"
