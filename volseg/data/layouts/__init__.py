"""Finds the cases of a dataset in the layout that it already has.

Takes a folder (MSD, nnU-Net raw, BraTS, a pair of folders) or a datalist (CSV, JSON), gives a
`Dataset`. Only names, headers and, where a layout does not declare its classes, labels are read;
whether every file is sound is the business of `volseg.data.check`.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Container, Sequence
from pathlib import Path

from volseg.data.cases import Case, Dataset
from volseg.data.layouts import brats, datalist, folders, msd, nnunet
from volseg.errors import ConfigError, DataError, check_choice

__all__ = ["find_dataset"]

logger = logging.getLogger(__name__)

_Find = Callable[[Path, Container[str]], Dataset]

_LAYOUTS: tuple[tuple[Callable[[Path], bool], _Find], ...] = (
    # A list says itself which images there are, and MSD has all channels in one file.
    (datalist.detect, lambda path, optional: datalist.find(path)),
    (nnunet.detect, nnunet.find),
    (msd.detect, lambda path, optional: msd.find(path)),
    (brats.detect, brats.find),
    (folders.detect, folders.find),
)

_ACCEPTED = (
    "an MSD or nnU-Net folder with dataset.json, a folder of BraTS cases, "
    "a folder with images/ and labels/ (or masks/), or a .csv or .json datalist"
)


_SHOWN = 5
"""Missing files that are named."""


class _EveryChannel(Container[str]):
    def __contains__(self, name: object) -> bool:
        return True


def find_dataset(
    path: str | os.PathLike[str],
    optional_channels: Sequence[str] | None = (),
    *,
    complete: bool = True,
    labelled: bool = True,
) -> Dataset:
    """Find the cases, channels and classes of a dataset, whatever its layout.

    Args:
        path: the dataset's folder, its ``dataset.json``, or a datalist.
        optional_channels: names of those that a case may lack; None is any of them.
        complete: whether to refuse a dataset that lists files of labelled cases which do not exist.
            Otherwise such a case fails where it is read, as one without a label always does.
        labelled: whether to refuse a dataset without any label.

    Returns:
        The dataset, with absolute paths.

    Raises:
        ConfigError: no such channel, or the only one is optional.
        DataError: no known layout, no case has a label, or files are missing.
    """
    path = Path(os.path.abspath(path))
    if not path.exists():
        raise DataError(f"{path} does not exist; expected {_ACCEPTED}. Correct the path.")
    if path.name == "dataset.json":
        path = path.parent
    find = _detect(path)
    if find is None:
        raise DataError(f"{path} is in no known layout; expected {_ACCEPTED}. {_suggest(path)}")
    dataset = find(path, _EveryChannel() if optional_channels is None else optional_channels)
    if labelled and not dataset.cases:
        raise DataError(
            f"{path}: no case has a label ({len(dataset.unlabelled)} images without); "
            "expected at least one labelled case. Add the label files."
        )
    _check_ids(dataset, path)
    if complete:
        _check_files(dataset.cases, path)
    dataset = _name_optional(dataset, optional_channels or ())
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


def _name_optional(dataset: Dataset, declared: Sequence[str]) -> Dataset:
    """With the channels that were declared optional, and those that a case lacks."""
    for name in declared:
        check_choice("data.optional_channels", name, dataset.channels)
    if declared and len(dataset.channels) == 1:
        raise ConfigError(
            f"data.optional_channels {list(declared)} of a dataset with this channel alone; "
            "expected one of several. Leave it out."
        )
    cases = (*dataset.cases, *dataset.unlabelled)
    optional = []
    for number, name in enumerate(dataset.channels):
        # A single file may hold all channels.
        lacking = sum(len(case.images) > number and case.images[number] is None for case in cases)
        if lacking or name in declared:
            optional.append(name)
            logger.info("channel %s: %d of %d cases have none", name, lacking, len(cases))
    return dataset.model_copy(update={"optional_channels": tuple(optional)})


def _detect(path: Path) -> _Find | None:
    return next((find for detect, find in _LAYOUTS if detect(path)), None)


def _suggest(path: Path) -> str:
    """The next act: the one dataset a level below, if there is just one."""
    below = sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
    fitting = [child for child in below if _detect(child)]
    if len(fitting) == 1:
        return f"Give {fitting[0]}, which is in a known layout."
    return "Arrange the files so, or list them in a CSV with the columns image and label."


def _check_files(cases: Sequence[Case], path: Path) -> None:
    listed = [file for case in cases for file in (*case.files, case.label) if file is not None]
    missing = [
        f"{file} (a folder)" if file.is_dir() else str(file)
        for file in listed
        if not file.is_file()
    ]
    if missing:
        shown = ", ".join([*missing[:_SHOWN], *(["..."] if len(missing) > _SHOWN else [])])
        raise DataError(
            f"{path} names files that do not exist ({len(missing)} of {len(listed)}): {shown}; "
            "expected all of the labelled cases. Restore them, or remove these cases."
        )


def _check_ids(dataset: Dataset, path: Path) -> None:
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
