"""The command line: each command reads arguments and calls one function of the library.

Nothing heavy is imported before a command runs.
"""

from volseg.cli.main import main, run

__all__ = ["main", "run"]
