"""Agreement of one prediction with one reference on the same grid.

Takes boolean masks or integer label arrays, gives numbers. Reading files, checking grids and
summing up over cases is left to `volseg.evaluation.evaluate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volseg.errors import DataError
from volseg.geometry import Geometry


@dataclass(frozen=True)
class Overlap:
    """Voxel counts of one class in one case.

    Attributes:
        reference_voxels: voxels of the class in the reference.
        prediction_voxels: voxels of the class in the prediction.
        shared_voxels: voxels of the class in both.
    """

    reference_voxels: int = 0
    prediction_voxels: int = 0
    shared_voxels: int = 0

    @property
    def dice(self) -> float:
        """Dice coefficient; see `compute_dice` for the rule when a side is empty."""
        total = self.reference_voxels + self.prediction_voxels
        return 2 * self.shared_voxels / total if total else float("nan")


def compute_dice(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """Dice coefficient of two masks: twice the shared voxels over the sum of both.

    The rule for empty masks: if both are empty there was nothing to find and nothing was found;
    the value is nan and such a case is left out of every mean, which reports how many cases it
    counts. If only one is empty the value is 0.

    Args:
        prediction: mask of any shape.
        reference: mask of the same shape.

    Raises:
        DataError: the shapes differ.

    References:
        Dice (1945), Measures of the amount of ecologic association between species,
        Ecology 26(3), doi:10.2307/1932409.

    >>> compute_dice(np.array([True, True, False]), np.array([True, False, False]))
    0.6666666666666666
    """
    return count_overlap(prediction, reference).dice


def count_overlap(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> Overlap:
    """Voxels of two masks of the same shape.

    Raises:
        DataError: the shapes differ.
    """
    _check_shapes(prediction, reference)
    return Overlap(
        reference_voxels=int(np.count_nonzero(reference)),
        prediction_voxels=int(np.count_nonzero(prediction)),
        shared_voxels=int(np.count_nonzero(prediction & reference)),
    )


def count_overlaps(
    prediction: NDArray[Any], reference: NDArray[Any], background: int = 0
) -> dict[int, Overlap]:
    """Overlap of every label value found in either array, in one pass over all classes.

    Args:
        prediction: integer labels of any shape.
        reference: integer labels of the same shape.
        background: the value that is not scored.

    Returns:
        Overlap by label value, ascending.

    Raises:
        DataError: the shapes differ.
    """
    _check_shapes(prediction, reference)
    # Voxels that are background on both sides count for no class, and are most of a volume.
    foreground = (prediction != background) | (reference != background)
    prediction, reference = prediction[foreground], reference[foreground]
    in_reference = _count_values(reference)
    in_prediction = _count_values(prediction)
    shared = _count_values(reference[reference == prediction])
    return {
        value: Overlap(
            in_reference.get(value, 0), in_prediction.get(value, 0), shared.get(value, 0)
        )
        for value in sorted({*in_reference, *in_prediction} - {background})
    }


def compute_voxel_ml(geometry: Geometry) -> float | None:
    """Volume of one voxel in millilitres; None for a picture, which has no thickness."""
    return None if geometry.spatial_dims == 2 else geometry.voxel_ml


def _count_values(labels: NDArray[Any]) -> dict[int, int]:
    values, counts = np.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _check_shapes(prediction: NDArray[Any], reference: NDArray[Any]) -> None:
    if prediction.shape != reference.shape:
        raise DataError(
            f"prediction has shape {prediction.shape} and reference {reference.shape}; "
            "expected the same shape. Compare them on one grid."
        )
