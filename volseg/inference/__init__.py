"""From a trained model and an image to labels on the image's own grid."""

from volseg.inference.model import Model, load_model
from volseg.inference.predictor import Predictor, Segmentation

__all__ = ["Model", "Predictor", "Segmentation", "load_model"]
