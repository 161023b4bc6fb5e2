"""What a dataset is once its layout no longer matters: cases, channels and classes.

A `Dataset` is found by `volseg.data.layouts.find_dataset` and stored as ``dataset.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from volseg.config import Record
from volseg.errors import DataError


class Case(Record):
    """One study to segment.

    `images` holds one file per channel, or a single file that carries all channels.
    Studies with the same `patient_id` are never split between training and validation.
    """

    case_id: str
    images: tuple[Path, ...]
    label: Path | None = None
    patient_id: str


class Classes(Record):
    """Class names and the values that stand for them in label files; index 0 is background.

    Networks see consecutive indices ``0..num_classes-1``; files keep their own values.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]

    @model_validator(mode="after")
    def _check(self) -> Classes:
        if len(self.names) != len(self.values) or len(set(self.values)) != len(self.values):
            raise ValueError("every class needs one name and one value of its own")
        if len(self.values) < 2:
            raise ValueError("expected background and at least one class")
        return self

    @property
    def num_classes(self) -> int:
        """Number of classes, background counted."""
        return len(self.names)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Smallest integer type that holds every label value."""
        return np.result_type(
            np.min_scalar_type(min(self.values)), np.min_scalar_type(max(self.values))
        )

    def unknown_values(self, labels: NDArray[Any]) -> list[int]:
        """Values in `labels` that belong to no class, ascending."""
        return sorted(set(np.unique(labels).tolist()) - set(self.values))

    def encode(self, labels: NDArray[Any]) -> NDArray[Any]:
        """Label values to class indices.

        Raises:
            DataError: a value that belongs to no class.
        """
        if unknown := self.unknown_values(labels):
            raise DataError(
                f"label values {unknown[:5]}; expected only {sorted(self.values)}. "
                "Correct the label file or declare the class."
            )
        order = np.argsort(self.values)
        ranks = np.searchsorted(np.asarray(self.values)[order], labels)
        return order.astype(np.uint8 if self.num_classes <= 256 else np.uint16)[ranks]

    def decode(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Class indices to label values, in `dtype`."""
        values: NDArray[Any] = np.asarray(self.values, dtype=self.dtype)[indices]
        return values


class Split(Record):
    """Case ids to learn from, and case ids to validate on."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


class Dataset(Record):
    """Cases that share channels and classes, found in one folder or datalist.

    `cases` have labels; `unlabelled` do not (a test set). `splits` are those that the dataset
    itself declares, empty for most.
    """

    name: str
    root: Path
    layout: str
    channels: tuple[str, ...]
    classes: Classes
    cases: tuple[Case, ...]
    unlabelled: tuple[Case, ...] = ()
    splits: tuple[Split, ...] = ()
