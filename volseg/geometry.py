"""Where an array lies in the patient: shape and affine, and what follows from them.

Arrays are in file axis order. `affine` maps an array index ``(i, j, k)`` to millimetres in RAS+
(x grows to the right, y to the front, z to the head), as in nibabel.
Nothing here touches voxels but `to_canonical` and `from_canonical`, which only permute and flip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volseg.errors import DataError

SAME_GRID_TOLERANCE_MM = 0.01
"""Two grids are the same if no corner voxel lies further apart than this: headers that were
written by different programs differ by rounding, a real shift is a fraction of a voxel or more."""

_AXIS_CODES = (("L", "R"), ("P", "A"), ("I", "S"))


@dataclass(frozen=True, eq=False)
class NiftiSpace:
    """The fields of a NIfTI header that place its voxels in space, as they were read.

    Many affines have no exact form in a header (a quaternion, float32 rows), so a file on the same
    grid is written with these fields and not with numbers computed from the affine.

    Attributes:
        version: 1 or 2.
        fields: value of each header field by its name in the NIfTI standard.
    """

    version: int
    fields: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Geometry:
    """The grid of an image: always valid once constructed.

    Attributes:
        shape: voxels per array axis, 2 or 3 entries.
        affine: (4, 4) float64, array index to RAS+ mm. In 2D the third column is the normal.
        nifti: the header fields that `affine` was read from; only the NIfTI writer looks at them,
            and every other grid made from this one is without.
    """

    shape: tuple[int, ...]
    affine: NDArray[np.float64]
    nifti: NiftiSpace | None = None

    def __post_init__(self) -> None:
        shape = tuple(int(size) for size in self.shape)
        affine = np.array(self.affine, dtype=np.float64)
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise DataError(f"image shape {shape}; expected 2 or 3 axes of at least one voxel.")
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise DataError("affine is not a finite 4x4 matrix; the header is damaged.")
        if not np.array_equal(affine[3], [0, 0, 0, 1]):
            raise DataError(f"affine ends in the row {affine[3].tolist()}; expected 0 0 0 1.")
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        if min(spacing) == 0 or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-6:
            raise DataError(
                "affine is singular: its axes do not span the volume; the header is damaged."
            )
        affine.flags.writeable = False
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @property
    def spatial_dims(self) -> int:
        """2 for a picture, 3 for a volume."""
        return len(self.shape)

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Distance of neighbouring voxels along each array axis, from the affine."""
        norms = np.linalg.norm(self.affine[:3, :3], axis=0)
        return tuple(float(norm) for norm in norms[: self.spatial_dims])

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in ml; of a picture's pixel its area in mm² / 1000."""
        if self.spatial_dims == 2:
            return math.prod(self.spacing_mm) / 1000
        # The product of the spacings is too much where a grid is sheared.
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    @property
    def orientation(self) -> str:
        """Closest anatomical direction of each array axis, as in ``"RAS"`` or ``"LPI"``."""
        return "".join(
            _AXIS_CODES[world][sign > 0]
            for world, sign in self._closest_axes()[: self.spatial_dims]
        )

    def _closest_axes(self) -> list[tuple[int, int]]:
        """World axis and sign for each array axis, as nibabel assigns them."""
        cosines = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        # The nearest rotation: with shear, the axis that a column leans to is not always its own.
        left, _, right = np.linalg.svd(cosines)
        rotation = left @ right
        axes = [(0, 1)] * 3
        for axis in np.argsort(-np.abs(rotation).max(axis=0), kind="stable"):
            world = int(np.argmax(np.abs(rotation[:, axis])))
            axes[axis] = (world, 1 if rotation[world, axis] > 0 else -1)
            rotation[world] = 0
        return axes

    def is_same_grid(self, other: Geometry, tolerance_mm: float = SAME_GRID_TOLERANCE_MM) -> bool:
        """Whether both have the same shape and no voxel is further apart than `tolerance_mm`."""
        return self.shape == other.shape and self.distance_mm(other) <= tolerance_mm

    def distance_mm(self, other: Geometry) -> float:
        """Largest distance in mm between the same corner index on both grids."""
        corners = self._corners()
        return float(np.linalg.norm((self.affine - other.affine)[:3] @ corners, axis=0).max())

    def _corners(self) -> NDArray[np.float64]:
        """(4, 8) homogeneous indices of the corner voxels."""
        last = [size - 1 for size in (*self.shape, 1)[:3]]
        grid = np.array(np.meshgrid(*[(0, size) for size in last], indexing="ij"), dtype=float)
        return np.vstack([grid.reshape(3, -1), np.ones((1, 8))])

    def to_canonical(self, array: NDArray[Any]) -> tuple[NDArray[Any], Geometry]:
        """Permute and flip ``(..., *S)`` to the axis order closest to RAS+.

        Pictures (2D) have no patient axes of their own and are returned as they are.

        Returns:
            A view of `array`, and its grid.
        """
        if self.spatial_dims == 2:
            return array, self
        axes = self._closest_axes()
        order = [next(a for a in range(3) if axes[a][0] == world) for world in range(3)]
        lead = array.ndim - 3
        array = array.transpose(*range(lead), *(lead + axis for axis in order))
        affine = self.affine[:, [*order, 3]].copy()
        shape = tuple(self.shape[axis] for axis in order)
        flips = tuple(lead + a for a in range(3) if axes[order[a]][1] < 0)
        for flip in flips:
            axis = flip - lead
            affine[:3, 3] += affine[:3, axis] * (shape[axis] - 1)
            affine[:3, axis] *= -1
        return np.flip(array, flips), Geometry(shape, affine)

    def from_canonical(self, array: NDArray[Any]) -> NDArray[Any]:
        """Undo `to_canonical`: ``(..., *canonical S)`` back to this grid's axis order (a view)."""
        if self.spatial_dims == 2:
            return array
        axes = self._closest_axes()
        lead = array.ndim - 3
        array = np.flip(array, tuple(lead + world for world, sign in axes if sign < 0))
        return array.transpose(*range(lead), *(lead + world for world, _ in axes))
