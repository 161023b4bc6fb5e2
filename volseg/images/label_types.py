"""Integer types of label maps: the smallest that holds the values."""

from __future__ import annotations

from typing import Any

import numpy as np

from volseg.errors import DataError

IntegerTypes = tuple[type[np.integer[Any]], ...]

COMMON_TYPES: IntegerTypes = (np.uint8, np.int16, np.int32, np.int64)
"""What programs read everywhere: int8 and wider unsigned types are standard, but less usual."""


def smallest_type(low: int, high: int, types: IntegerTypes) -> type[np.integer[Any]]:
    """The first of `types` that holds `low` and `high`.

    Raises:
        DataError: none does.
    """
    for candidate in types:
        if np.iinfo(candidate).min <= low and high <= np.iinfo(candidate).max:
            return candidate
    names = ", ".join(np.dtype(candidate).name for candidate in types)
    raise DataError(f"label values from {low} to {high}; expected values that fit {names}.")
