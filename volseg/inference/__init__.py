"""From a trained model and an image to labels on the image's own grid.

`SlidingWindow` is imported when it is first used, so that nothing else here waits for MONAI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from volseg.inference.model import Model, load_model
from volseg.inference.options import Options
from volseg.inference.predictor import Locator, Predictor, Segmentation

if TYPE_CHECKING:
    from volseg.inference.inferer import SlidingWindow

__all__ = [
    "Locator",
    "Model",
    "Options",
    "Predictor",
    "Segmentation",
    "SlidingWindow",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name != "SlidingWindow":
        raise AttributeError(f"module 'volseg.inference' has no attribute {name!r}")
    from volseg.inference.inferer import SlidingWindow

    return SlidingWindow
