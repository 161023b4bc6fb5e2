"""From a trained model and an image to labels on the image's own grid."""

from volseg.inference.inferer import SlidingWindow
from volseg.inference.model import Model, load_model
from volseg.inference.options import Options
from volseg.inference.predictor import Locator, Predictor, Segmentation

__all__ = [
    "Locator",
    "Model",
    "Options",
    "Predictor",
    "Segmentation",
    "SlidingWindow",
    "load_model",
]
