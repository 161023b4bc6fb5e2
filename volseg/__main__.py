"""``python -m volseg`` is the ``volseg`` command."""

from volseg.cli import run

run()
