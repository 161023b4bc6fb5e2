"""`Predictor`: a model kept loaded, called on one image after another."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from volseg.allocation import give_back_freed_memory
from volseg.data.cases import Classes, are_other_channels
from volseg.data.content import Box
from volseg.data.mirroring import Mirroring, plan_mirroring
from volseg.data.preprocessing import Prepared, prepare
from volseg.data.reading import read_channels
from volseg.errors import ConfigError, DataError, MachineError
from volseg.geometry import Geometry
from volseg.images import Image, from_nibabel, from_sitk, read_header, write_image, write_labels
from volseg.inference.backends import (
    BackendName,
    Place,
    WindowShape,
    choose_precision,
    prepare_backends,
)
from volseg.inference.members import Members
from volseg.inference.memory import (
    Strips,
    count_reading,
    free_bytes,
    plan_strips,
    resident_bytes,
    stays_on,
)
from volseg.inference.model import Checkpoint, Model, ModelFacts, load_model
from volseg.inference.native_grid import NativeGrid
from volseg.inference.options import Options
from volseg.inference.postprocessing import count_values, plan_postprocessing
from volseg.inference.precision import round_weights_
from volseg.inference.remembered import is_known
from volseg.inference.uncertainty import UncertaintyName
from volseg.inference.windows import CPU, count_at_once, stream_scores
from volseg.planning.cost import compute_cost
from volseg.planning.plan import Plan

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]

_COUNTABLE = 2**16
"""Label values below are counted in one pass."""
_OUTPUTS = 5
"""A window's scores that are held at a time."""
_FINE_BYTES = 8 * 2**20
"""Of feature maps that are upsampled: beneath it there is nothing to gain."""
_PLANNED = 0.7
"""Share of the free memory that is planned for: meanwhile the next image is read and the one before
is written."""


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A prediction on the grid of its source.

    Attributes:
        labels: (*S) label values as in the training data, in the source's axis order.
        geometry: the source's grid.
        classes: names and values.
        probabilities: (K, *S) float32 of the classes, or of the regions, only if asked for.
        uncertainty: maps (*S) float16 from 0 to 1 by name, only if asked for.
        path: the file, or folder of a DICOM series, that was segmented.
    """

    labels: NDArray[Any]
    geometry: Geometry
    classes: Classes
    probabilities: NDArray[np.float32] | None = None
    uncertainty: Mapping[UncertaintyName, NDArray[np.float16]] = field(default_factory=dict)
    path: Path | None = None

    @property
    def volumes_ml(self) -> dict[str, float]:
        """Volume of every class but the background, by name; of a picture its area in mm²/1000."""
        pairs = list(zip(self.classes.names[1:], self.classes.values[1:], strict=True))
        voxel_ml, values = self.geometry.voxel_ml, self.classes.values
        if min(values) < 0 or max(values) >= _COUNTABLE:
            return {name: int((self.labels == value).sum()) * voxel_ml for name, value in pairs}
        counts = count_values(self.labels, max(values) + 1)
        return {name: int(counts[value]) * voxel_ml for name, value in pairs}

    def save(self, path: PathLike) -> None:
        """Write the label map to `path`; the format follows from the suffix."""
        names = dict(zip(self.classes.values[1:], self.classes.names[1:], strict=True))
        write_labels(Path(path), self.labels, self.geometry, names, self.path)

    def save_probabilities(self, path: PathLike) -> None:
        """Write the probabilities, one channel per class or region.

        Raises:
            ValueError: the prediction was made without them.
        """
        if self.probabilities is None:
            raise ValueError("no probabilities were kept; predict with probabilities=True.")
        write_image(Path(path), self.probabilities, self.geometry)

    def save_uncertainty(self, name: UncertaintyName, path: PathLike) -> None:
        """Write a map of `uncertainty`.

        Raises:
            ValueError: the prediction was made without it.
        """
        if name not in self.uncertainty:
            raise ValueError(f"no {name} was kept; predict with uncertainty=True.")
        write_image(Path(path), self.uncertainty[name][None], self.geometry)


class Predictor:
    """Segments images with a loaded model; several threads may call it at once.

    Attributes:
        model: the loaded model; behind `load` its networks serve this predictor alone.
        options: how it predicts.
        locator: what says where to look; None for everywhere.
        backend: what computes the network: that of the options, or what ``auto`` has chosen.
        turn: to be held from the reading of an image to its end, where memory has a ceiling.

    >>> predictor = Predictor.load("runs/hippocampus")  # doctest: +SKIP
    >>> predictor("patient.nii.gz").save("patient_seg.nii.gz")  # doctest: +SKIP
    """

    def __init__(
        self, model: Model, options: Options | None = None, locator: Locator | None = None
    ) -> None:
        """Keep a loaded model; see `load` for the other arguments, and for what is raised.

        Raises:
            ValueError: the networks of the model are those of a predictor that was loaded.
        """
        self.model, self.options, self.locator = model, options or Options(), locator
        facts = model.facts
        if locator is not None:
            _check_locator(locator.predictor.model.facts.plan, facts.plan)
        if model.is_prepared:
            raise ValueError("another predictor has made these networks its own; use load_model.")
        self.turn: AbstractContextManager[Any] = (
            nullcontext() if self.options.memory_gb is None else threading.RLock()
        )
        self._at_once = count_at_once(facts.plan.patch, model.device)
        self._window_bytes = _count_window_bytes(facts) * self._at_once
        self._members, self.backend = _prepare_members(model, self.options, self._at_once)
        self._postprocessing = plan_postprocessing(
            facts.classes, self.options.largest, self.options.least_ml
        )

    @classmethod
    def load(
        cls,
        folder: PathLike,
        *others: PathLike,
        device: str = "auto",
        folds: tuple[int, ...] | None = None,
        checkpoint: Checkpoint = "last",
        options: Options | None = None,
        locator: Locator | None = None,
    ) -> Predictor:
        """Load a run folder or bundle, or several, which are averaged.

        Args:
            folder: see `volseg.inference.load_model`, also for what it raises.
            others: see there.
            device: see there.
            folds: see there.
            checkpoint: see there.
            options: how it predicts.
            locator: what says where to look: beside that is background.

        Raises:
            ConfigError: an option names a class that the model has not.
            MachineError: the backend is not there, or does not give what torch gives.
        """
        paths = [Path(each) for each in (folder, *others)]
        predictor = cls(load_model(paths, device, folds, checkpoint), options, locator)
        predictor._prepare_networks()
        return predictor

    def _prepare_networks(self) -> None:
        """Have the networks hold no more than this predictor needs."""
        for network in self.model.networks:
            if self.backend != "torch":
                # The runtime has weights of its own; those of torch would be held for nothing.
                network.to("meta")
            elif is_known(network):
                round_weights_(network, self._members.precision)
                if self.model.device.type == "cpu":
                    _tidy_before_fine_levels_(network)
        self.model = replace(self.model, is_prepared=True)
        give_back_freed_memory()

    def describe(self) -> dict[str, Any]:
        """What besides the weights decides the labels, as plain data."""
        locator = self.locator and {
            "model": self.locator.predictor.model.digest,
            "margin_mm": self.locator.margin_mm,
        }
        return {**self.options.describe(), **({"locator": locator} if locator else {})}

    def __call__(
        self, image: Any, *, probabilities: bool = False, uncertainty: bool = False
    ) -> Segmentation:
        """Segment one image.

        Args:
            image: a path, also of the folder of a DICOM series; a sequence of paths, one per
                channel, None for one that is not there; a nibabel or SimpleITK image; or a pair of
                an array ``(*S)`` or ``(C, *S)`` and its (4, 4) affine (index to RAS+ mm).
            probabilities: also keep the probability of each class or region.
            uncertainty: also keep a map of the entropy and, with several folds, one of how much
                they disagree; see `volseg.inference.uncertainty`.

        Raises:
            DataError: the image is bad or has not the model's channels, but for those that it was
                trained without.
            MachineError: it takes more memory than it may.
        """
        with self.turn:
            prepared = self.read(image)
            return self.segment(prepared, probabilities=probabilities, uncertainty=uncertainty)

    def read(self, image: Any) -> Prepared:
        """Read an image and prepare it for the network; the arguments are those of a call."""
        self._check_room_to_read(image)
        source = self._read(image)
        prepared = prepare(source, self.model.facts.plan)
        if self.locator is None:
            return prepared
        return replace(prepared, coarse=prepare(source, self.locator.predictor.model.facts.plan))

    @torch.inference_mode()
    def segment(
        self, prepared: Prepared, *, probabilities: bool = False, uncertainty: bool = False
    ) -> Segmentation:
        """Segment what `read` gave."""
        with self.turn:
            return self._segment(prepared, probabilities=probabilities, uncertainty=uncertainty)

    def _segment(
        self, prepared: Prepared, *, probabilities: bool, uncertainty: bool
    ) -> Segmentation:
        classes, placement = self.model.facts.classes, prepared.placement
        maps = self.uncertainty_maps if uncertainty else ()
        # The image as it was read, and what it was prepared by.
        give_back_freed_memory()
        grid = NativeGrid(placement, classes, probabilities=probabilities, uncertainty=maps)
        self._fill_grid(grid, prepared)
        background, voxel_ml = classes.values[0], placement.source.voxel_ml
        self._postprocessing.apply(grid.labels, background, voxel_ml)
        return Segmentation(
            grid.labels,
            placement.source,
            classes,
            grid.probabilities,
            grid.uncertainty,
            prepared.path,
        )

    def _fill_grid(self, grid: NativeGrid, prepared: Prepared) -> None:
        """Predict all of an image; where a GPU lacks room to blend the scores, on the CPU."""
        region, device, facts = self._find_region(prepared), self.model.device, self.model.facts
        num_scores = facts.classes.num_outputs + ("disagreement" in grid.uncertainty)
        shape, step = prepared.placement.shape, self.options.step
        plan = partial(plan_strips, region, shape, facts.plan.patch, num_scores, step=step)
        # Twice, since what decides on them takes room, too.
        if stays_on(device, 2 * plan().blend_bytes + self._window_bytes):
            try:
                self._fill_strips(grid, prepared.image, plan(), device)
                return
            except torch.OutOfMemoryError:
                logger.warning("%s: memory of %s is short; the CPU blends", prepared.path, device)
        # All that was filled before is filled again.
        strips = plan(self._room(grid.map_bytes))
        self._fill_strips(grid, prepared.image, strips, CPU)

    def _fill_strips(
        self, grid: NativeGrid, image: Tensor, strips: Strips, device: torch.device
    ) -> None:
        """Predict strip by strip; scores are blended on `device`."""
        members = replace(self._members, shows_disagreement="disagreement" in grid.uncertainty)
        for strip in strips.regions:
            self._fill(grid, image, members, strip, strips.axis, device)

    def _fill(
        self,
        grid: NativeGrid,
        image: Tensor,
        members: Members,
        strip: Box,
        axis: int,
        device: torch.device,
    ) -> None:
        """Predict a strip; what that holds is free again behind it."""
        filling = grid.open(strip, axis)
        for scores in stream_scores(
            members,
            image,
            self.model.facts.plan.patch,
            step=self.options.step,
            at_once=self._at_once,
            axis=axis,
            region=strip,
            device=device,
        ):
            filling.add(scores)

    def _find_region(self, prepared: Prepared) -> Box:
        """Where to look, on the network's grid."""
        placement = prepared.placement
        everywhere = Box((0,) * len(placement.shape), placement.shape)
        if self.locator is None or prepared.coarse is None:
            return everywhere
        predictor = self.locator.predictor
        found = predictor.segment(prepared.coarse).labels
        background = predictor.model.facts.classes.values[0]
        region = placement.find_region(found != background, self.locator.margin_mm)
        if region is None:
            logger.warning("%s: the locator finds nothing; all of it is segmented", prepared.path)
        return region or everywhere

    @property
    def uncertainty_maps(self) -> tuple[UncertaintyName, ...]:
        """The maps that there are for this model."""
        return ("entropy", "disagreement") if len(self.model.networks) > 1 else ("entropy",)

    @property
    def works_ahead(self) -> bool:
        """Whether there may be memory for more than one image at a time."""
        return self.options.memory_gb is None

    def _room(self, map_bytes: int) -> float:
        """Bytes that the scores in flight may take, besides maps that are not yet filled."""
        free, most_gb = free_bytes(CPU), self.options.memory_gb
        # Without a ceiling other images are on their way; beyond what is free the system kills.
        room = _PLANNED * free if most_gb is None else min(free, 1e9 * most_gb - resident_bytes())
        in_windows = self._window_bytes if self.model.device.type == "cpu" else 0.0
        return room - map_bytes - in_windows

    def _check_room_to_read(self, image: Any) -> None:
        """Refuse a file that alone would break the ceiling, before it is read."""
        files = _list_files(image)
        if self.options.memory_gb is None or not files:
            return
        headers = [read_header(file) for file in files]
        plans = [self.model.facts.plan]
        if self.locator is not None:
            plans.append(self.locator.predictor.model.facts.plan)
        # Channels that are not there are held as zeros.
        channels = max(len(plans[0].channel_names), sum(number for _, number in headers))
        needed = 1e-9 * (resident_bytes() + count_reading(headers[0][0], channels, plans))
        if needed > self.options.memory_gb:
            raise MachineError(
                f"{files[0]}: reading it takes this process to {needed:.1f} GB, above the "
                f"{self.options.memory_gb:g} GB that it may take. Allow more with --memory."
            )

    def _read(self, image: Any) -> Image:
        plan = self.model.facts.plan
        channels = plan.channel_names
        if isinstance(image, (str, os.PathLike)):
            return read_channels([Path(image)], channels)
        if hasattr(image, "dataobj") and hasattr(image, "affine"):
            source = from_nibabel(image)
        elif hasattr(image, "GetDirection") and hasattr(image, "GetSpacing"):
            source = from_sitk(image)
        elif isinstance(image, tuple) and len(image) == 2 and np.shape(image[1]) == (4, 4):
            source = _from_array(np.asarray(image[0]), np.asarray(image[1]), plan)
        elif isinstance(image, Sequence) and image:
            paths = [None if path is None else Path(path) for path in image]
            return read_channels(paths, channels)
        else:
            raise DataError(
                f"cannot segment a {type(image).__name__}; expected a path, paths of the "
                "channels, a nibabel or SimpleITK image, or (array, affine)."
            )
        if len(source.array) != len(channels):
            raise DataError(
                f"the image has {len(source.array)} channels; expected {len(channels)} "
                f"({', '.join(channels)})."
            )
        return source


@dataclass(frozen=True)
class Locator:
    """A model, coarse and fast, that says where another one has to look.

    Attributes:
        predictor: where it finds anything but background; where it finds nothing, everywhere.
        margin_mm: that is looked at around it.
    """

    predictor: Predictor
    margin_mm: float = 20.0


def _prepare_members(model: Model, options: Options, at_once: int) -> tuple[Members, BackendName]:
    """The networks of a model, in the precision and by the backend that the options ask for.

    Args:
        model: the loaded model.
        options: how it predicts.
        at_once: windows per call.

    Returns:
        The networks, and the backend by name.

    Raises:
        MachineError: the backend is not there, or does not give what torch gives.
    """
    plan, classes = model.facts.plan, model.facts.classes
    shape = WindowShape(at_once, len(plan.normalisation), plan.patch)
    precision = choose_precision(
        options.precision,
        model.networks,
        shape,
        model.device,
        weights=model.digest,
        overlapping=bool(classes.regions),
    )
    where = Place(model.device, precision)
    networks, backend = prepare_backends(
        options.backend, model.networks, shape, where, weights=model.digest
    )
    members = Members(
        networks,
        model.device,
        precision=precision,
        overlapping=bool(classes.regions),
        mirroring=_choose_mirroring(model.facts) if options.mirror else None,
    )
    return members, backend


def _tidy_before_fine_levels_(network: nn.Module) -> None:
    """Have a network on a CPU give back what its coarse levels leave, before the fine ones.

    The feature maps of fine levels are so large that the C library maps each of them anew, and
    what it has kept of the smaller ones is held beside them.
    """
    for module in network.modules():
        if isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Upsample):
            module.register_forward_pre_hook(_tidy)


def _tidy(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if inputs[0].nbytes > _FINE_BYTES:
        give_back_freed_memory()


def _choose_mirroring(facts: ModelFacts) -> Mirroring:
    """Along the axes that the training mirrored; along all where it mirrored none, with a warning.

    Classes with a side are kept apart.
    """
    mirroring = plan_mirroring(facts.classes, facts.plan.spatial_dims)
    if facts.mirrored is None:
        return mirroring
    if not facts.mirrored:
        logger.warning(
            "mirrored images are averaged, and the model was trained without (augmentation.flip): "
            "expect worse results than without --mirror"
        )
        return mirroring
    return replace(mirroring, axes=tuple(a for a in mirroring.axes if a in facts.mirrored))


def _count_window_bytes(facts: ModelFacts) -> float:
    """What a window takes in the network at most.

    All feature maps, of which a prediction holds a part at a time, and the scores of the mirror
    images and networks that are averaged.
    """
    plan, num_outputs = facts.plan, facts.classes.num_outputs
    cost = compute_cost(plan.network, plan.patch, len(plan.normalisation), num_outputs)
    outputs = _OUTPUTS * num_outputs * math.prod(plan.patch)
    return 4 * (1e6 * cost.feature_mvoxels + outputs)


def _list_files(image: Any) -> list[Path]:
    """The files of an image that is given by them; none of one that is in memory."""
    if isinstance(image, (str, os.PathLike)):
        return [Path(image)]
    if not isinstance(image, list | tuple) or not image or np.shape(image[-1]) == (4, 4):
        return []
    return [Path(file) for file in image if file is not None]


def _check_locator(coarse: Plan, plan: Plan) -> None:
    """Refuse a locator that cannot read the images of the model.

    Raises:
        ConfigError: it has other channels, or another number of spatial axes.
    """
    ours, theirs = ((p.spatial_dims, len(p.channel_names)) for p in (plan, coarse))
    if ours != theirs:
        raise ConfigError(
            f"the model that says where to look takes {theirs[0]}D images of {theirs[1]} "
            f"channels; expected {ours[0]}D and {ours[1]}, as the model itself."
        )
    if ours[1] > 1 and are_other_channels(coarse.channel_names, plan.channel_names):
        raise ConfigError(
            f"the model that says where to look takes {', '.join(coarse.channel_names)}; expected "
            f"{', '.join(plan.channel_names)}, in this order, as the model itself."
        )


def _from_array(array: NDArray[Any], affine: NDArray[Any], plan: Plan) -> Image:
    """``(*S)`` or ``(C, *S)``, as many axes as the model's images have, or one more."""
    array = array if array.ndim == plan.spatial_dims + 1 else array[None]
    if not np.isfinite(array).all():
        raise DataError("the array holds NaN or infinite voxels; expected finite intensities.")
    return Image(array, Geometry(array.shape[1:], affine), None)
