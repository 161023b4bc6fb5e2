"""On what a benchmark ran.

It imports no more than torch and what volseg does itself, since it stands in the processes whose
memory is measured.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch

from volseg import __version__


def describe_machine(device: str) -> dict[str, str]:
    """Processor, threads, system and versions, by name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor()
    return {
        "machine": processor if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": version("monai"),
        "volseg": __version__,
    }
