"""The value that every reader returns and that the rest of volseg passes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from volseg.errors import DataError
from volseg.geometry import Geometry


@dataclass(frozen=True, eq=False)
class Image:
    """Voxels and where they lie in the patient.

    Attributes:
        array: (C, *S) in file axis order and native byte order. It may be strided: files store
            the first axis fastest, and voxels are not copied to change that.
        geometry: the grid of `S`.
        path: the file it was read from; None for an image that was made in memory.
        absent: channels that are not there, whose voxels are zero.
    """

    array: NDArray[Any]
    geometry: Geometry
    path: Path | None = None
    absent: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.array.shape[1:] != self.geometry.shape:
            raise DataError(
                f"array of shape {self.array.shape}; expected (channels, *{self.geometry.shape})."
            )
