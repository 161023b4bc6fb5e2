"""Classes of a dataset: from declared names, or from the values that its label files hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from volseg.cores import count_readers
from volseg.data.cases import Classes
from volseg.errors import DataError
from volseg.images import read_labels


def make_classes(
    names: Mapping[int, str],
    source: Path,
    regions: Mapping[str, Sequence[int]] | None = None,
    ignore: int | None = None,
) -> Classes:
    """Order declared classes: background first, the others by value.

    Background is the class of that name, else value 0, which is added if it is not declared.

    Args:
        names: name of each label value.
        source: the file that declares them, for messages.
        regions: label values of unions of classes, by name.
        ignore: value of voxels that were not annotated.

    Raises:
        DataError: no class but background, two values with one name, or a region of a value that
            no class has.
    """
    background = next((v for v, name in names.items() if name.lower() == "background"), 0)
    names = {background: "background", **names}
    values = [background, *sorted(value for value in names if value != background)]
    name, count = Counter(names.values()).most_common(1)[0]
    if count > 1:
        raise DataError(
            f"{source}: {count} label values are named '{name}'; expected each name once. "
            "Rename one."
        )
    return Classes.parse(
        {
            "names": [names[value] for value in values],
            "values": values,
            "regions": [{"name": n, "values": v} for n, v in (regions or {}).items()],
            "ignore": ignore,
        },
        str(source),
        DataError,
    )


def find_classes(labels: Sequence[Path], source: Path) -> Classes:
    """Classes for every value in `labels`, named ``label_<value>``.

    Args:
        labels: label files; all are read.
        source: the dataset, for messages.

    Raises:
        DataError: a label file cannot be read, or all hold background only.
    """
    values = set().union(*read_label_values(labels))
    if not values - {0}:
        raise DataError(
            f"{source}: the {len(labels)} label files hold only the value 0; expected at least "
            "one other value. Check that these are the label files."
        )
    return make_classes({value: f"label_{value}" for value in values - {0}}, source)


def read_label_values(labels: Sequence[Path]) -> Iterator[set[int]]:
    """Yield the values that each label file holds, in order; files are read in parallel.

    A caller that has seen enough may stop: files that were not begun are then not read.
    """
    pool = ThreadPoolExecutor(count_readers())
    try:
        yield from pool.map(_values_of, labels)
    finally:
        pool.shutdown(cancel_futures=True)


def _values_of(path: Path) -> set[int]:
    return {int(value) for value in np.unique(read_labels(path).array)}
