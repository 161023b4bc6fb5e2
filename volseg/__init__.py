"""volseg: train and run volumetric medical image segmentation on your own CT and MR files.

`train` and `Predictor` are imported when they are first used, so that ``import volseg`` and
``volseg --help`` do not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from volseg._version import __version__

if TYPE_CHECKING:
    from volseg.inference import Predictor, Segmentation
    from volseg.training import train

__all__ = ["Predictor", "Segmentation", "__version__", "train"]

_ROOMS = {
    "train": "volseg.training",
    "Predictor": "volseg.inference",
    "Segmentation": "volseg.inference",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'volseg' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_ROOMS[name]), name)
