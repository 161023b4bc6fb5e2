"""DICOM series, read only: a folder with the slices of one volume, through SimpleITK and GDCM.

ITK's own reader of series stretches the spacing over a slice that is missing and mixes what lies in
one folder, so each slice is read by itself, and where they lie is checked here.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from volseg.errors import DataError
from volseg.geometry import Geometry
from volseg.images.formats import find_class, is_of_slices

logger = logging.getLogger(__name__)

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
_UNEVEN = 0.01
"""Share of the spacing by which slices may lie beside their place: positions are rounded text."""
_UNEVEN_MM = 0.02
_SAME_DIRECTION = 1e-4

_SERIES, _DESCRIPTION = "0020|000e", "0008|103e"
_POSITION, _ORIENTATION = "0020|0032", "0020|0037"
_PIXEL_SPACING, _THICKNESS = "0028|0030", "0018|0050"
_ROWS, _COLUMNS = "0028|0010", "0028|0011"
_FRAMES, _SAMPLES = "0028|0008", "0028|0002"


@dataclass(frozen=True, eq=False)
class Slice:
    """Header of one file; lengths in mm, directions and position in DICOM's LPS axes.

    Attributes:
        path: the file.
        series: its series' UID and description.
        position: (3) centre of the first voxel.
        directions: (3, 2) along increasing columns, and along increasing rows.
        spacing_mm: between columns, and between rows.
        shape: columns, rows.
        thickness_mm: nominal; None if the file does not say.
    """

    path: Path
    series: tuple[str, str]
    position: NDArray[np.float64]
    directions: NDArray[np.float64]
    spacing_mm: tuple[float, float]
    shape: tuple[int, int]
    thickness_mm: float | None

    @property
    def normal(self) -> NDArray[np.float64]:
        """(3) across rows and columns, to the side where they turn to the right."""
        normal: NDArray[np.float64] = np.cross(*self.directions.T)
        return normal


def read(folder: Path) -> tuple[NDArray[Any], Geometry]:
    """Voxels ``(1, *S)``, rescaled slice by slice as the files say, and their grid.

    The third axis is that of the slices. CT comes in Hounsfield units.

    Raises:
        DataError: several series, a slice that is missing, doubled or elsewhere, a tilted gantry,
            or a file that is damaged, in colour, or holds several frames.
    """
    slices = load_series(folder)
    geometry = describe(slices)
    planes = [_read_plane(part) for part in slices]
    stored = np.result_type(*(plane.dtype for plane in planes))
    # Scaled values come as float64, of which float32 holds all that a scanner measures.
    dtype = np.dtype(np.float32) if stored.kind == "f" else stored
    array = np.empty(geometry.shape, dtype, order="F")
    for index, plane in enumerate(planes):
        array[..., index] = plane
    return array[None], geometry


def read_header(folder: Path) -> tuple[Geometry, int]:
    """The grid and the number of channels, without reading voxels."""
    return describe(load_series(folder)), 1


def load_series(folder: Path) -> list[Slice]:
    """Headers of the one series of a folder, along its normal.

    DICOM files that say that they are no images are left out, with a warning.

    Raises:
        DataError: see `read`.
    """
    found = {path: find_class(path) for path in sorted(folder.iterdir())}
    classes = {path: uid for path, uid in found.items() if uid is not None}
    paths = [path for path, uid in classes.items() if is_of_slices(uid)]
    if others := len(classes) - len(paths):
        _warn(f"{folder}: {others} DICOM files that are no slices are left out.")
    if not paths:
        raise DataError("a folder without slices; expected those of one DICOM series.")
    slices = [_load_header(path) for path in paths]
    _check_one_series(slices)
    _check_alike(slices)
    normal = slices[0].normal
    return sorted(slices, key=lambda part: float(part.position @ normal))


@functools.lru_cache(maxsize=10_000)
def _warn(message: str) -> None:
    """Warn once per series, however often it is read."""
    logger.warning(message)


def _load_header(path: Path) -> Slice:
    reader = _open(path)

    def numbers(tag: str, count: int) -> NDArray[np.float64]:
        text = reader.GetMetaData(tag) if reader.HasMetaDataKey(tag) else ""
        try:
            values = np.array([float(part) for part in text.split("\\")])
        except ValueError:
            values = np.empty(0)
        if len(values) != count or not np.isfinite(values).all():
            wanted = "a number" if count == 1 else f"{count} numbers"
            raise DataError(
                f"{path.name} has no usable ({tag.replace('|', ',')}); expected {wanted}, "
                "without which its place or size is not known. Export the series again."
            )
        return values

    def number(tag: str, usual: int | None = None) -> int:
        return int(numbers(tag, 1).item()) if usual is None or text(tag) else usual

    def thickness() -> float | None:
        try:
            return float(text(_THICKNESS))
        except ValueError:
            return None

    def text(tag: str) -> str:
        return reader.GetMetaData(tag).strip() if reader.HasMetaDataKey(tag) else ""

    if number(_FRAMES, 1) > 1 or number(_SAMPLES, 1) > 1:
        raise DataError(
            f"{path.name} holds several frames or colours; expected one grey slice per file. "
            "Convert the series to NIfTI, with dcm2niix for instance."
        )
    directions = numbers(_ORIENTATION, 6).reshape(2, 3).T
    between_rows, between_columns = numbers(_PIXEL_SPACING, 2)
    return Slice(
        path=path,
        series=(text(_SERIES), text(_DESCRIPTION)),
        position=numbers(_POSITION, 3),
        directions=directions / np.linalg.norm(directions, axis=0),
        spacing_mm=(float(between_columns), float(between_rows)),
        shape=(number(_COLUMNS), number(_ROWS)),
        thickness_mm=thickness(),
    )


def _open(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataError(
            f"{path.name} is damaged or no image; expected a slice. Copy or export it again."
        ) from error
    return reader


def _read_plane(part: Slice) -> NDArray[Any]:
    """Values (columns, rows), as rescaled by the file's own slope and intercept."""
    try:
        image = _open(part.path).Execute()
    except RuntimeError as error:
        raise DataError(
            f"{part.path.name} is damaged or truncated; expected {part.shape[0]} x "
            f"{part.shape[1]} voxels. Copy or export it again."
        ) from error
    plane: NDArray[Any] = sitk.GetArrayFromImage(image).reshape(part.shape[::-1]).T
    return plane


def _check_one_series(slices: Sequence[Slice]) -> None:
    descriptions = dict(part.series for part in slices)
    counts = Counter(part.series[0] for part in slices)
    if len(counts) > 1:
        found = ", ".join(
            f"'{descriptions[uid] or uid}' ({count} files)" for uid, count in counts.items()
        )
        raise DataError(
            f"{len(counts)} series in one folder: {found}; expected one. Put each into a folder of "
            "its own."
        )


def _check_alike(slices: Sequence[Slice]) -> None:
    """Refuse slices of other sizes or directions than the first, as localisers are."""
    first = slices[0]
    for part in slices[1:]:
        is_parallel = np.allclose(part.directions, first.directions, atol=_SAME_DIRECTION)
        is_alike = np.allclose(part.spacing_mm, first.spacing_mm, rtol=_SAME_DIRECTION)
        if part.shape != first.shape or not is_parallel or not is_alike:
            raise DataError(
                f"{part.path.name} has another size, voxel size or direction than "
                f"{first.path.name}; expected the parallel slices of one volume. Take out what "
                "does not belong to it, as localisers."
            )


def describe(slices: Sequence[Slice]) -> Geometry:
    """The grid of slices in the order of `load_series`."""
    first = slices[0]
    affine = np.eye(4)
    affine[:3, :2] = _LPS_TO_RAS @ (first.directions * first.spacing_mm)
    affine[:3, 2] = _LPS_TO_RAS @ _find_step(slices)
    affine[:3, 3] = _LPS_TO_RAS @ first.position
    return Geometry((*first.shape, len(slices)), affine)


def _find_step(slices: Sequence[Slice]) -> NDArray[np.float64]:
    """From the centre of a slice to that of the next one, in mm; the same for all of them."""
    normal = slices[0].normal
    if len(slices) == 1:
        if not slices[0].thickness_mm:
            raise DataError("a single slice that does not say its thickness; expected a volume.")
        return normal * slices[0].thickness_mm
    steps = np.diff([part.position for part in slices], axis=0)
    gaps_mm = steps @ normal
    usual_mm = float(np.median(gaps_mm))
    tolerance_mm = max(_UNEVEN_MM, _UNEVEN * usual_mm)
    _check_doubled(slices, gaps_mm, tolerance_mm)
    _check_tilt(steps / gaps_mm[:, None] - normal, usual_mm, tolerance_mm)
    _check_gaps(slices, gaps_mm, usual_mm, tolerance_mm)
    step: NDArray[np.float64] = (slices[-1].position - slices[0].position) / len(steps)
    for number, part in enumerate(slices):
        away_mm = float(np.linalg.norm(part.position - slices[0].position - number * step))
        if away_mm > tolerance_mm:
            raise DataError(
                f"{part.path.name} lies {away_mm:.3g} mm beside its place among the other slices; "
                "expected an even grid. Export the series again."
            )
    return step


def _check_doubled(
    slices: Sequence[Slice], gaps_mm: NDArray[np.float64], tolerance_mm: float
) -> None:
    for gap_mm, (part, other) in zip(gaps_mm, itertools.pairwise(slices), strict=True):
        if gap_mm < tolerance_mm:
            raise DataError(
                f"two slices at one place: {part.path.name} and {other.path.name}; expected one "
                "volume. Put time points, or echoes, into folders of their own."
            )


def _check_tilt(shears: NDArray[np.float64], usual_mm: float, tolerance_mm: float) -> None:
    """Refuse slices of which most are shifted against the one before.

    Args:
        shears: (N - 1, 3) shift in mm for each mm from slice to slice.
        usual_mm: from slice to slice.
        tolerance_mm: that a slice may be shifted.
    """
    shear = float(np.linalg.norm(np.median(shears, axis=0)))
    if shear * usual_mm > tolerance_mm:
        raise DataError(
            "slices are shifted against each other (gantry tilt of "
            f"{np.degrees(np.arctan(shear)):.1f} degrees); expected each right above the other. "
            "Correct the tilt, with dcm2niix for instance."
        )


def _check_gaps(
    slices: Sequence[Slice], gaps_mm: NDArray[np.float64], usual_mm: float, tolerance_mm: float
) -> None:
    for gap_mm, (part, other) in zip(gaps_mm, itertools.pairwise(slices), strict=True):
        if abs(gap_mm - usual_mm) > tolerance_mm:
            missing = round(gap_mm / usual_mm) - 1
            what = f"{missing} slices missing" if missing > 0 else "slices are unevenly spaced"
            raise DataError(
                f"{what} between {part.path.name} and {other.path.name}: they lie {gap_mm:.4g} mm "
                f"apart, others {usual_mm:.4g} mm; expected even distances. Export the series "
                "again."
            )
