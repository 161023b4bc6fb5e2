"""Entry of the command line: runs a command, turns errors into one line and an exit code.

Exit codes: 0 done; 1 a bug; 2 wrong usage or configuration; 3 bad input data; 4 the machine
cannot; 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence

import typer

from volseg.cli.app import app
from volseg.errors import VolsegError, is_out_of_memory


class _Terminal(logging.Handler):
    """Log lines of the library on standard error, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        typer.echo(f"{prefix}{record.getMessage()}", err=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    is_debugging = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    _log_to_terminal()
    try:
        app(arguments, prog_name="volseg")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except Exception as error:
        return _report(error, is_debugging)
    return 0


def run() -> None:
    """Console entry point."""
    code = main()
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        # One of torchrun's processes, which ends the others when this one is gone. At a regular
        # end NCCL may wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _log_to_terminal() -> None:
    logger = logging.getLogger("volseg")
    if not any(isinstance(handler, _Terminal) for handler in logger.handlers):
        logger.addHandler(_Terminal())
        logger.setLevel(logging.INFO)


def _report(error: Exception, is_debugging: bool) -> int:
    """One line for a user's error; a bug says how to get its traceback."""
    if is_debugging:
        typer.echo("".join(traceback.format_exception(error)), err=True)
    message = " ".join(str(error).split())
    if isinstance(error, VolsegError):
        typer.secho(f"error: {message}", err=True, fg="red")
        return error.exit_code
    if is_out_of_memory(error):
        typer.secho(
            f"error: out of memory ({message[:200]}). Use a smaller plan.patch or "
            "plan.batch_size, or another --device.",
            err=True,
            fg="red",
        )
        return 4
    if (rank := os.environ.get("RANK", "0")) != "0":
        # Most likely it lost another process, which says why itself.
        typer.secho(
            f"process {rank} ended: {type(error).__name__}: {message} (--debug shows where)",
            err=True,
        )
        return 1
    typer.secho(
        f"error: {type(error).__name__}: {message}. This is a bug in volseg; run again with "
        "--debug and report what it prints.",
        err=True,
        fg="red",
    )
    return 1
