"""What a dataset is once its layout no longer matters: cases, channels and classes.

A `Dataset` is found by `volseg.data.layouts.find_dataset` and stored as ``dataset.json``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from volseg.config import DataConfig, Record
from volseg.errors import ConfigError, DataError


class Case(Record):
    """One study to segment.

    `images` holds one file per channel, None for one that the case lacks, or a single file that
    carries all channels.
    Studies with the same `patient_id` are never split between training and validation. The label
    of a case with `annotated` shows these classes alone: where it says background, any other class
    may be. None is all classes.
    """

    case_id: str
    images: tuple[Path | None, ...]
    label: Path | None = None
    patient_id: str
    annotated: tuple[str, ...] | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The images that are there."""
        return tuple(path for path in self.images if path is not None)


class Region(Record):
    """A union of classes that is segmented as a whole, such as a tumour with its core."""

    name: str
    values: tuple[int, ...]
    """Label values of its classes."""


class Classes(Record):
    """Class names and the values that stand for them in label files; index 0 is background.

    Networks see consecutive indices ``0..num_classes-1``; files keep their own values. With
    `regions`, which may overlap, a network has one output for each of them instead.

    Indices from ``num_classes`` on are those of voxels whose class is not known: each stands for a
    set of classes that such a voxel may be (`candidates`). Files have the value `ignore` where
    nothing is known; the background of a partly annotated case is in `unsure`.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    regions: tuple[Region, ...] = ()
    ignore: int | None = None
    unsure: tuple[tuple[int, ...], ...] = ()
    """Per kind of partly annotated case the indices of the classes that its background may be."""

    @model_validator(mode="after")
    def _check(self) -> Classes:
        if len(self.names) != len(self.values) or len(set(self.values)) != len(self.values):
            raise ValueError("every class needs one name and one value of its own")
        if len(self.values) < 2:
            raise ValueError("expected background and at least one class")
        if self.ignore in self.values:
            raise ValueError(f"the ignored value {self.ignore} is a class; expected another one")
        self._check_regions()
        return self

    def _check_regions(self) -> None:
        for region in self.regions:
            if not region.values or not set(region.values) <= set(self.values[1:]):
                raise ValueError(
                    f"region '{region.name}' has the values {list(region.values)}; expected some "
                    f"of {sorted(self.values[1:])}"
                )
        if len({region.name for region in self.regions}) < len(self.regions):
            raise ValueError("two regions have the same name; rename one")

    def find_merged(self) -> list[tuple[str, str]]:
        """Pairs of classes that the regions do not tell apart: the first one is predicted."""
        first: dict[tuple[bool, ...], str] = {}
        merged = []
        for name, value in zip(self.names[1:], self.values[1:], strict=True):
            membership = tuple(value in region.values for region in self.regions)
            other = first.setdefault(membership, name)
            if any(membership) and other != name:
                merged.append((other, name))
        return merged

    @property
    def num_classes(self) -> int:
        """Number of classes, background counted."""
        return len(self.names)

    @property
    def candidates(self) -> tuple[tuple[int, ...], ...]:
        """What each label index from ``num_classes`` on stands for: indices of classes."""
        everything = () if self.ignore is None else (tuple(range(self.num_classes)),)
        return everything + self.unsure

    @property
    def num_indices(self) -> int:
        """Number of label indices: classes, and sets of classes that are not told apart."""
        return self.num_classes + len(self.candidates)

    @property
    def known_values(self) -> tuple[int, ...]:
        """What label files may hold, in the order of the indices."""
        return self.values if self.ignore is None else (*self.values, self.ignore)

    @property
    def num_outputs(self) -> int:
        """Channels of a network's logits: one per region, or one per class."""
        return len(self.regions) or self.num_classes

    @property
    def output_names(self) -> tuple[str, ...]:
        """What each channel of a network's logits stands for."""
        return tuple(region.name for region in self.regions) or self.names

    @property
    def region_indices(self) -> tuple[tuple[int, ...], ...]:
        """Class indices of each region."""
        return tuple(
            tuple(self.values.index(value) for value in region.values) for region in self.regions
        )

    @property
    def shown(self) -> tuple[int, ...]:
        """Indices of the foreground classes that an output of the network shows."""
        if not self.regions:
            return tuple(range(1, self.num_classes))
        return tuple(sorted(set(itertools.chain(*self.region_indices))))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Smallest integer type that holds every label value."""
        return np.result_type(
            np.min_scalar_type(min(self.values)), np.min_scalar_type(max(self.values))
        )

    def with_unsure(self, cases: Sequence[Case]) -> Classes:
        """The classes with a label index for each kind of partly annotated case.

        Raises:
            DataError: a case names a class that there is not.
        """
        partial = (self.find_unsure(case.annotated) for case in cases if case.annotated is not None)
        unsure = sorted({indices for indices in partial if len(indices) > 1})
        return self.model_copy(update={"unsure": tuple(unsure)})

    def unknown_values(self, labels: NDArray[Any]) -> list[int]:
        """Values in `labels` that belong to no class, ascending."""
        return sorted(set(np.unique(labels).tolist()) - set(self.known_values))

    def find_unsure(self, annotated: Sequence[str]) -> tuple[int, ...]:
        """Indices of the classes that background may be where only some were annotated.

        Raises:
            DataError: a name of no class, or background.
        """
        if unknown := sorted(set(annotated) - set(self.names[1:])):
            raise DataError(
                f"annotated class '{unknown[0]}'; expected some of {', '.join(self.names[1:])}. "
                "Correct the name."
            )
        others = (i for i, name in enumerate(self.names) if i and name not in annotated)
        return (0, *others)

    def encode(self, labels: NDArray[Any], annotated: Sequence[str] | None = None) -> NDArray[Any]:
        """Label values to label indices.

        Args:
            labels: as in the file.
            annotated: classes that the file shows, if not all; see `Case`.

        Raises:
            DataError: a value that belongs to no class.
        """
        if unknown := self.unknown_values(labels):
            raise DataError(
                f"label values {unknown[:5]}; expected only {sorted(self.known_values)}. "
                "Correct the label file or declare the class."
            )
        order = np.argsort(self.known_values)
        ranks = np.searchsorted(np.asarray(self.known_values)[order], labels)
        indices = order.astype(np.uint8 if self.num_indices <= 256 else np.int16)[ranks]
        if annotated is not None and len(unsure := self.find_unsure(annotated)) > 1:
            place = self.candidates.index(unsure)
            indices[indices == 0] = self.num_classes + place
        return indices

    def decode(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Class indices to label values, in `dtype`."""
        if self.values == tuple(range(len(self.values))):
            return indices.astype(self.dtype, copy=False)
        values: NDArray[Any] = np.asarray(self.values, dtype=self.dtype)[indices]
        return values


class Split(Record):
    """Case ids to learn from, and case ids to validate on."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


class Dataset(Record):
    """Cases that share channels and classes, found in one folder or datalist.

    `cases` have labels; `unlabelled` do not (a test set). `splits` are those that the dataset
    itself declares, empty for most. A case may lack `optional_channels`.
    """

    name: str
    root: Path
    layout: str
    channels: tuple[str, ...]
    classes: Classes
    cases: tuple[Case, ...]
    unlabelled: tuple[Case, ...] = ()
    splits: tuple[Split, ...] = ()
    optional_channels: tuple[str, ...] = ()

    def with_labels(self, config: DataConfig) -> Dataset:
        """The same with what the user says of the labels in place of what the dataset declares.

        Args:
            config: regions, none of them if empty, and the value that is ignored, which is then
                no class. What is None stays.

        Raises:
            ConfigError: an unknown label value, two regions of one name, or the background is to be
                ignored.
        """
        changed = self.classes.model_dump()
        if config.regions is not None:
            named = config.regions.items()
            changed["regions"] = [{"name": name, "values": values} for name, values in named]
        if config.ignore_label is not None:
            pairs = zip(self.classes.names, self.classes.values, strict=True)
            kept = {name: value for name, value in pairs if value != config.ignore_label}
            changed["names"], changed["values"] = tuple(kept), tuple(kept.values())
            changed["ignore"] = config.ignore_label
            if config.ignore_label == self.classes.values[0]:
                raise ConfigError(
                    f"data.ignore_label {config.ignore_label} is the value of "
                    f"{self.classes.names[0]}; expected that of voxels that nobody has labelled, "
                    "beside a background that somebody has. Give those another value."
                )
        changed["unsure"] = ()
        classes = Classes.parse(changed, "data")
        return self.model_copy(update={"classes": classes.with_unsure(self.cases)})


def number_channels(num_channels: int) -> tuple[str, ...]:
    """Names for channels that nobody named.

    >>> number_channels(2)
    ('channel_0', 'channel_1')
    """
    return tuple(f"channel_{number}" for number in range(num_channels))


def are_other_channels(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether two lists of channels differ in number or names, where somebody named both.

    >>> are_other_channels(["T1", "FLAIR"], ["FLAIR", "T1"])
    True
    >>> are_other_channels(["T1", "FLAIR"], ["channel_0", "channel_1"])
    False
    """
    if len(first) != len(second):
        return True
    unnamed = number_channels(len(first))
    both = (tuple(first), tuple(second))
    folded = [[name.casefold() for name in names] for names in both]
    return unnamed not in both and folded[0] != folded[1]
