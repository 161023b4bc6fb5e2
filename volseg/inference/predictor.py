"""`Predictor`: a model kept loaded, called on one image after another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volseg.data.cases import Classes
from volseg.data.mirroring import plan_mirroring
from volseg.data.preprocessing import prepare
from volseg.data.reading import read_channels
from volseg.errors import DataError
from volseg.geometry import Geometry
from volseg.images import Image, from_nibabel, write_image, write_labels
from volseg.inference.model import Checkpoint, Model, load_model
from volseg.inference.native_grid import restore_classes, restore_probabilities
from volseg.inference.windows import predict_scores, to_class_scores

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A prediction on the grid of its source.

    Attributes:
        labels: (*S) label values as in the training data, in the source's axis order.
        geometry: the source's grid.
        classes: names and values.
        probabilities: (K, *S) float32 of the classes, or of the regions, only if asked for.
    """

    labels: NDArray[Any]
    geometry: Geometry
    classes: Classes
    probabilities: NDArray[np.float32] | None = None

    def save(self, path: PathLike) -> None:
        """Write the label map to `path`; the format follows from the suffix."""
        write_labels(Path(path), self.labels, self.geometry)

    def save_probabilities(self, path: PathLike) -> None:
        """Write the probabilities, one channel per class or region.

        Raises:
            ValueError: the prediction was made without them.
        """
        if self.probabilities is None:
            raise ValueError("no probabilities were kept; predict with probabilities=True.")
        write_image(Path(path), self.probabilities, self.geometry)


class Predictor:
    """Segments images with a loaded model.

    >>> predictor = Predictor.load("runs/hippocampus")  # doctest: +SKIP
    >>> predictor("patient.nii.gz").save("patient_seg.nii.gz")  # doctest: +SKIP
    """

    def __init__(self, model: Model, *, mirror: bool = False) -> None:
        """Keep a loaded model; see `load` for `mirror`."""
        self.model = model
        facts = model.facts
        mirroring = plan_mirroring(facts.classes, facts.plan.spatial_dims)
        self.mirroring = mirroring if mirror else None

    @classmethod
    def load(
        cls,
        folder: PathLike,
        *,
        device: str = "auto",
        folds: tuple[int, ...] | None = None,
        checkpoint: Checkpoint = "last",
        mirror: bool = False,
    ) -> Predictor:
        """Load a run folder or bundle.

        Args:
            folder: see `volseg.inference.load_model`, also for what it raises.
            device: see there.
            folds: see there.
            checkpoint: see there.
            mirror: average over mirror images, up to eight times the work. For a model that was
                trained with them (``augmentation.flip``); left and right are kept apart.
        """
        return cls(load_model(Path(folder), device, folds, checkpoint), mirror=mirror)

    def __call__(self, image: Any, *, probabilities: bool = False) -> Segmentation:
        """Segment one image.

        Args:
            image: a path; a sequence of paths, one per channel, None for one that is not there; a
                nibabel image; or a pair of an array ``(*S)`` or ``(C, *S)`` and its (4, 4) affine
                (index to RAS+ mm).
            probabilities: also keep the probability of each class or region.

        Raises:
            DataError: the image is bad or has not the model's channels, but for those that it was
                trained without.
        """
        source = self._read(image)
        plan, classes = self.model.facts.plan, self.model.facts.classes
        prepared = prepare(source, plan)
        scores = predict_scores(
            self.model.networks,
            prepared.image,
            plan.patch,
            self.model.device,
            overlapping=bool(classes.regions),
            mirroring=self.mirroring,
        )
        kept = restore_probabilities(scores, prepared.placement, classes) if probabilities else None
        labels = classes.decode(
            restore_classes(to_class_scores(scores, classes), prepared.placement)
        )
        return Segmentation(labels, source.geometry, classes, kept)

    def _read(self, image: Any) -> Image:
        channels = self.model.facts.plan.channel_names
        if isinstance(image, (str, os.PathLike)):
            return read_channels([Path(image)], channels)
        if hasattr(image, "dataobj") and hasattr(image, "affine"):
            source = from_nibabel(image)
        elif isinstance(image, tuple) and len(image) == 2 and np.shape(image[1]) == (4, 4):
            source = _from_array(np.asarray(image[0]), np.asarray(image[1]), len(channels))
        elif isinstance(image, Sequence) and image:
            paths = [None if path is None else Path(path) for path in image]
            return read_channels(paths, channels)
        else:
            raise DataError(
                f"cannot segment a {type(image).__name__}; expected a path, paths of the "
                "channels, a nibabel image, or (array, affine)."
            )
        if len(source.array) != len(channels):
            raise DataError(
                f"the image has {len(source.array)} channels; expected {len(channels)} "
                f"({', '.join(channels)})."
            )
        return Image(source.array.astype(np.float32), source.geometry, source.path)


def _from_array(array: NDArray[Any], affine: NDArray[Any], num_channels: int) -> Image:
    """``(*S)`` or ``(C, *S)``; a first axis of the channels' number decides where both fit."""
    has_channels = array.ndim == 4 or (array.ndim == 3 and array.shape[0] == num_channels > 1)
    array = array if has_channels else array[None]
    if not np.isfinite(array).all():
        raise DataError("the array holds NaN or infinite voxels; expected finite intensities.")
    return Image(array, Geometry(array.shape[1:], affine), None)
