"""Finds the cases of a dataset in the layout that it already has.

Takes a folder (MSD, nnU-Net raw, BraTS, a pair of folders) or a datalist (CSV, JSON), gives a
`Dataset`. Only names, headers and, where a layout does not declare its classes, labels are read;
whether every file is sound is the business of `volseg.data.check`.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from volseg.data.cases import Dataset
from volseg.data.layouts import brats, datalist, folders, msd, nnunet
from volseg.errors import DataError

__all__ = ["find_dataset"]

logger = logging.getLogger(__name__)

_LAYOUTS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Dataset]], ...] = (
    (datalist.detect, datalist.find),
    (nnunet.detect, nnunet.find),
    (msd.detect, msd.find),
    (brats.detect, brats.find),
    (folders.detect, folders.find),
)

_ACCEPTED = (
    "an MSD or nnU-Net folder with dataset.json, a folder of BraTS cases, "
    "a folder with images/ and labels/ (or masks/), or a .csv or .json datalist"
)


def find_dataset(path: str | os.PathLike[str]) -> Dataset:
    """Find the cases, channels and classes of a dataset, whatever its layout.

    Args:
        path: the dataset's folder, its ``dataset.json``, or a datalist.

    Returns:
        The dataset, with absolute paths; it has at least one labelled case.

    Raises:
        DataError: no known layout, a listed file is missing, or no case has a label.
    """
    path = Path(os.path.abspath(path))
    if not path.exists():
        raise DataError(f"{path} does not exist; expected {_ACCEPTED}. Correct the path.")
    if path.name == "dataset.json":
        path = path.parent
    find = _detect(path)
    if find is None:
        raise DataError(f"{path} is in no known layout; expected {_ACCEPTED}. {_suggest(path)}")
    dataset = find(path)
    _check_ids(dataset, path)
    logger.info(
        "dataset: %s, layout %s, %d labelled and %d unlabelled cases, channels %s, classes %s",
        dataset.name,
        dataset.layout,
        len(dataset.cases),
        len(dataset.unlabelled),
        ", ".join(dataset.channels),
        ", ".join(dataset.classes.names),
    )
    return dataset


def _detect(path: Path) -> Callable[[Path], Dataset] | None:
    return next((find for detect, find in _LAYOUTS if detect(path)), None)


def _suggest(path: Path) -> str:
    """The next act: the one dataset a level below, if there is just one."""
    below = sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
    fitting = [child for child in below if _detect(child)]
    if len(fitting) == 1:
        return f"Give {fitting[0]}, which is in a known layout."
    return "Arrange the files so, or list them in a CSV with the columns image and label."


def _check_ids(dataset: Dataset, path: Path) -> None:
    if not dataset.cases:
        raise DataError(
            f"{path}: no case has a label ({len(dataset.unlabelled)} images without); "
            "expected at least one labelled case. Add the label files."
        )
    counts = Counter(case.case_id for case in (*dataset.cases, *dataset.unlabelled))
    for case_id, count in counts.items():
        # Case ids become file names of predictions, so they must stay in their folder.
        if case_id != Path(case_id).name or case_id.startswith(".") or "\\" in case_id:
            raise DataError(
                f"{path}: case id '{case_id}'; expected a plain file name. Rename the case."
            )
        if count > 1:
            raise DataError(
                f"{path}: {count} cases are named '{case_id}'; expected each case id once. "
                "Rename the files, or list them in a CSV with a column case_id."
            )
