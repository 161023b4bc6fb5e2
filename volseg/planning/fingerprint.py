"""What the planner must know of a dataset, measured by reading every labelled case once.

All axes are canonical (right, anterior, superior); shapes are after cropping to content.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from volseg.config import Record
from volseg.cores import count_readers
from volseg.data.cases import Case, Dataset
from volseg.data.content import find_content
from volseg.data.reading import read_case
from volseg.errors import DataError
from volseg.images import read_header
from volseg.planning.machine import count_holders

_BYTES_PER_VOXEL, _BYTES_PER_VALUE = 24, 12
"""While a case is measured: its label as indices, counts and parts, and each of its channels."""
VOXELS_PER_CASE = 20_000
"""Foreground voxels drawn per case for the intensity statistics."""

STAIRCASE = {2: 4 / math.pi, 3: 1.5}
"""Area of a ball's voxel faces over that of its surface."""


class CaseFingerprint(Record):
    """One case: its grid, and how many voxels and how thick each class is.

    `class_radius_mm` is that of a ball with as much volume per surface as the class's connected
    parts have, by the median; 0 of an absent class and of the background.
    """

    case_id: str
    full_shape: tuple[int, ...]
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    class_voxels: tuple[int, ...]
    class_radius_mm: tuple[float, ...]


class ChannelFingerprint(Record):
    """Intensities of one channel inside the foreground, over all cases."""

    name: str
    mean: float
    std: float
    median: float
    percentile_0_5: float
    percentile_99_5: float
    image_minimum: float
    """Median over cases of the smallest value anywhere in the image: air, in a CT."""
    optional: bool = False
    """Whether a case may lack it; the other values are those of the cases that have it."""


class Fingerprint(Record):
    """The measured facts of a dataset."""

    dataset: str
    spatial_dims: int
    cases: tuple[CaseFingerprint, ...]
    channels: tuple[ChannelFingerprint, ...]

    @property
    def median_spacing_mm(self) -> tuple[float, ...]:
        """Median voxel size per canonical axis."""
        return tuple(float(v) for v in np.median([c.spacing_mm for c in self.cases], axis=0))

    @property
    def radius_mm(self) -> float:
        """Of the thinnest class: a tenth of the cases that have it have a smaller one."""
        by_class = np.array([case.class_radius_mm for case in self.cases])[:, 1:].T
        return min(float(np.percentile(radii[radii > 0], 10)) for radii in by_class if radii.any())

    @property
    def content_fraction(self) -> float:
        """Median share of the volume that is left after cropping to content."""
        return float(np.median([np.prod(c.shape) / np.prod(c.full_shape) for c in self.cases]))


def compute_fingerprint(
    dataset: Dataset, on_case: Callable[[int, int], None] | None = None
) -> Fingerprint:
    """Read every labelled case of `dataset` and measure it.

    Args:
        dataset: its `cases` must share the number of spatial axes.
        on_case: called with (cases done, cases in all).

    Raises:
        DataError: the first bad case, and how many there are.
    """
    results, errors = [], []
    with ThreadPoolExecutor(count_readers()) as pool:
        sizes = pool.map(partial(measuring_bytes, len(dataset.channels)), dataset.cases)
        largest = max(sizes, default=0)
    with ThreadPoolExecutor(min(count_readers(), count_holders(largest))) as pool:
        futures = [pool.submit(_measure_case, dataset, i) for i in range(len(dataset.cases))]
        try:
            for done, future in enumerate(futures, start=1):
                try:
                    results.append(future.result())
                except DataError as error:
                    errors.append(error)
                if on_case:
                    on_case(done, len(futures))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if errors:
        more = f" ({len(errors) - 1} more bad cases.)" if len(errors) > 1 else ""
        raise DataError(f"{errors[0]}{more} `volseg check {dataset.root}` lists all.")
    spatial_dims = {len(case.shape) for case, _, _ in results}
    if len(spatial_dims) > 1:
        raise DataError(f"{dataset.root} mixes 2D and 3D images; expected one kind. Split it.")
    voxels = np.concatenate([sample for _, sample, _ in results], axis=1)
    if voxels.shape[1] == 0:
        raise DataError(f"{dataset.root}: no label has any foreground; there is nothing to learn.")
    if unknown := [name for name, v in zip(dataset.channels, voxels, strict=True) if _is_nan(v)]:
        raise DataError(
            f"{dataset.root}: no labelled case has channel {unknown[0]} where it has foreground; "
            "expected one at least. Leave the channel out."
        )
    minima = np.nanmedian([minimum for _, _, minimum in results], axis=0)
    return Fingerprint(
        dataset=dataset.name,
        spatial_dims=spatial_dims.pop(),
        cases=tuple(case for case, _, _ in results),
        channels=tuple(
            _describe_channel(name, voxels[c], float(minima[c]), name in dataset.optional_channels)
            for c, name in enumerate(dataset.channels)
        ),
    )


def measuring_bytes(num_channels: int, case: Case, measured: CaseFingerprint | None = None) -> int:
    """About how much memory it takes to read a case and to measure or prepare it.

    Args:
        num_channels: of the dataset.
        case: by the header of its first file. 0 where there is none or it cannot be read, which is
            told when the case is.
        measured: its row, which says its size already.
    """
    try:
        shape = measured.full_shape if measured else read_header(case.files[0])[0].shape
    except (DataError, OSError, IndexError):
        return 0
    return math.prod(shape) * (_BYTES_PER_VALUE * num_channels + _BYTES_PER_VOXEL)


def _measure_case(
    dataset: Dataset, index: int
) -> tuple[CaseFingerprint, NDArray[np.float32], NDArray[np.float32]]:
    """The case's row, its sampled foreground voxels (C, n) and its minimum per channel (C).

    Both are nan for a channel that the case lacks.
    """
    case: Case = dataset.cases[index]
    image, label = read_case(case, dataset.channels, dataset.classes)
    if label is None:
        raise DataError(f"case {case.case_id} has no label; expected one for every training case.")
    array, geometry = image.geometry.to_canonical(image.array)
    label, _ = image.geometry.to_canonical(label)
    content = find_content(array)
    number = dataset.classes.num_classes
    counts = np.bincount(label.ravel(), minlength=number)[:number]
    foreground = np.flatnonzero((label.ravel() > 0) & (label.ravel() < number))
    if foreground.size > VOXELS_PER_CASE:
        # The case's index seeds the draw, so that the fingerprint does not depend on threads.
        rng = np.random.default_rng(index)
        foreground = rng.choice(foreground, VOXELS_PER_CASE, replace=False)
    row = CaseFingerprint(
        case_id=case.case_id,
        full_shape=geometry.shape,
        shape=content.shape,
        spacing_mm=geometry.spacing_mm,
        class_voxels=tuple(int(count) for count in counts),
        class_radius_mm=measure_radii(label, geometry.spacing_mm, number),
    )
    flat = array.reshape(len(array), -1)
    sample, minima = (part.astype(np.float32) for part in (flat[:, foreground], flat.min(axis=1)))
    absent = list(image.absent)
    sample[absent], minima[absent] = np.nan, np.nan
    return row, sample, minima


def _is_nan(voxels: NDArray[np.float32]) -> bool:
    return bool(np.isnan(voxels).all())


def measure_radii(
    label: NDArray[np.integer[Any]], spacing_mm: Sequence[float], num_classes: int
) -> tuple[float, ...]:
    """Radius in mm of each class, the median over its connected parts; 0 if absent.

    A part's radius is that of the ball with its volume per surface. Parts of less than two voxels
    per axis have no shape, and count only where there are no others.

    Args:
        label: (*S) class indices.
        spacing_mm: of its axes.
        num_classes: background counted, which has no radius.
    """
    boxes: list[Any] = ndimage.find_objects(label)[: num_classes - 1]
    radii = [0.0] * num_classes
    for index, box in enumerate(boxes, start=1):
        if box is not None:
            # A voxel around it, so that its faces are seen.
            wide = tuple(slice(max(0, axis.start - 1), axis.stop + 1) for axis in box)
            radius = _median_radius(label[wide] == index, spacing_mm)
            radii[index] = float(f"{radius:.4g}")
    return tuple(radii)


def _median_radius(mask: NDArray[np.bool_], spacing_mm: Sequence[float]) -> float:
    voxel, dims = float(np.prod(spacing_mm)), mask.ndim
    parts, number = ndimage.label(mask, structure=np.ones((3,) * dims))
    faces = np.zeros(number + 1)
    for axis, spacing in enumerate(spacing_mm):
        lines = np.moveaxis(parts, axis, 0)
        is_face = lines[1:] != lines[:-1]
        for side in (lines[1:], lines[:-1]):
            faces += np.bincount(side[is_face], minlength=number + 1) * voxel / spacing
    sizes = np.bincount(parts.ravel())
    # The staircase of voxel faces is larger than the surface. What fills the volume has no face.
    surface = np.maximum(faces, voxel ** (1 - 1 / dims)) / STAIRCASE[dims]
    radii = dims * sizes * voxel / surface
    has_shape = sizes >= 2**dims
    has_shape[0] = False
    return float(np.median(radii[has_shape] if has_shape.any() else radii[1:]))


def _describe_channel(
    name: str, voxels: NDArray[np.float32], image_minimum: float, optional: bool
) -> ChannelFingerprint:
    voxels = voxels[~np.isnan(voxels)]
    low, median, high = np.percentile(voxels, [0.5, 50, 99.5])
    return ChannelFingerprint(
        name=name,
        mean=float(voxels.mean(dtype=np.float64)),
        std=float(voxels.std(dtype=np.float64)),
        median=float(median),
        percentile_0_5=float(low),
        percentile_99_5=float(high),
        image_minimum=image_minimum,
        optional=optional,
    )
