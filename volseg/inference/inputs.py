"""Which images a user means by files and folders: one `Case` without label per image."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from volseg.data.cases import Case, Dataset, are_other_channels
from volseg.data.layouts import find_dataset
from volseg.errors import ConfigError, DataError
from volseg.images import IMAGE_SUFFIXES, image_stem, is_series, read_header

logger = logging.getLogger(__name__)

_CHANNEL_SUFFIX = re.compile(r"_(\d{4})$")
_LISTED = os.R_OK | os.X_OK
"""What it takes to see the files of a folder."""


def find_inputs(
    paths: Sequence[Path], channels: Sequence[str], optional: Collection[int] = ()
) -> list[Case]:
    """Collect cases from image files, folders of images, DICOM series, and datasets.

    A folder with DICOM files is one case, and one with such folders, at any depth, a case for each,
    named by the way to it. Files named
    ``CASE_0000``, ``CASE_0001``, ... are the channels of one case when the model takes several; a
    single file may hold all channels. A dataset that names its channels is brought into the order
    of the model's.

    Args:
        paths: files, folders and datalists.
        channels: names of those that the model takes.
        optional: numbers of those whose file may be missing.

    Raises:
        ConfigError: a path does not exist, a folder may not be read, or nothing was found.
        DataError: two images share a name, or a dataset has other channels than the model.
    """
    cases: list[Case] = []
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path} does not exist; expected an image file or a folder.")
        if path.is_dir():
            inside, found = _look_into(path, channels)
            files += inside
            cases += found
        elif path.suffix.lower() in (".csv", ".json"):
            cases += _of_dataset(path, channels)
        else:
            files.append(path)
    # Channels of a case may lie in several folders.
    cases += _group(files, len(channels), optional)
    seen: dict[str, Case] = {}
    for case in cases:
        if case.case_id in seen:
            raise DataError(
                f"{case.files[0]} and {seen[case.case_id].files[0]} would both be written as "
                f"{case.case_id}; expected different names, and channels numbered as in "
                "CASE_0000, CASE_0001. Predict them into different folders, or rename them."
            )
        seen[case.case_id] = case
    if not cases:
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        raise ConfigError(f"no images in {', '.join(map(str, paths))}; expected {kinds}.")
    return cases


def select_shard(cases: Sequence[Case], shard: str | None) -> Sequence[Case]:
    """The cases of one of several jobs that share them, as ``2/8``; all of them for None.

    They are dealt out by the size of their files, so that all jobs have about as much to do.

    Raises:
        ConfigError: not two numbers, the first from 1 to the second.
    """
    if shard is None:
        return cases
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise ConfigError(f"--shard {shard}; expected a number and how many, as in 1/8 to 8/8.")
    return sorted(cases, key=_size)[::-1][number - 1 :: count]


def _size(case: Case) -> tuple[int, str]:
    files = (
        inner for path in case.files for inner in (path.iterdir() if path.is_dir() else [path])
    )
    # One that is not there fails as a case of its own.
    return sum(file.stat().st_size for file in files if file.exists()), case.case_id


def _look_into(folder: Path, channels: Sequence[str]) -> tuple[list[Path], list[Case]]:
    """A DICOM series; or images directly inside and series in its folders; or else a dataset."""
    if not os.access(folder, _LISTED):
        raise ConfigError(f"{folder} may not be read. Change its permissions, or leave it out.")
    if is_series(folder):
        return [], [_of_series(folder, folder.resolve().name)]
    files = sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and not file.name.startswith(".") and _is_image(file)
    )
    inside = sorted(path for path in folder.rglob("*") if _is_open(path) and is_series(path))
    # Patients, studies and series often lie in folders within folders.
    series = [_of_series(path, "_".join(path.relative_to(folder).parts)) for path in inside]
    return files, series if files or series else _of_dataset(folder, channels)


def _of_dataset(path: Path, channels: Sequence[str]) -> list[Case]:
    """Cases without their labels, their channels as the model takes them.

    Raises:
        DataError: the dataset has others, or in another order in one file.
    """
    # Which of them the model can do without is for its plan to say, case by case.
    dataset = find_dataset(path, None, complete=False, labelled=False)
    cases = [
        case.model_copy(update={"label": None}) for case in dataset.unlabelled or dataset.cases
    ]
    if not are_other_channels(dataset.channels, channels):
        return cases
    if len(dataset.channels) == len(channels) == 1:
        (theirs,), (ours,) = dataset.channels, channels
        logger.warning("%s has the channel %s; the model was trained on %s", path, theirs, ours)
        return cases
    return _reorder(cases, dataset, channels)


def _reorder(cases: Sequence[Case], dataset: Dataset, channels: Sequence[str]) -> list[Case]:
    theirs, ours = ([name.casefold() for name in names] for names in (dataset.channels, channels))
    is_reordered = sorted(theirs) == sorted(ours) and len(set(ours)) == len(ours)
    if not is_reordered or any(len(case.images) != len(ours) for case in cases):
        raise DataError(
            f"{dataset.root} has the channels {', '.join(dataset.channels)}; expected "
            f"{', '.join(channels)}, those of the model. Give a folder of image files instead, "
            "each case's channels in that order, as CASE_0000, CASE_0001, ... or in one file."
        )
    order = [theirs.index(name) for name in ours]
    return [
        case.model_copy(update={"images": tuple(case.images[number] for number in order)})
        for case in cases
    ]


def _is_open(path: Path) -> bool:
    """Whether this is a folder that may be read; one that may not is left out, and told."""
    if not os.path.isdir(path):
        return False
    if not os.access(path, _LISTED):
        logger.warning("%s may not be read; what is in it is left out", path)
        return False
    return True


def _of_series(folder: Path, name: str) -> Case:
    return Case(case_id=name, images=(folder,), patient_id=name)


def _is_image(path: Path) -> bool:
    return any(path.name.lower().endswith(suffix) for suffix in IMAGE_SUFFIXES)


def _group(files: Sequence[Path], num_channels: int, optional: Collection[int]) -> list[Case]:
    """One case per file, or per group of files that differ in their channel suffix."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        stem = image_stem(file)
        groups.setdefault(_CHANNEL_SUFFIX.sub("", stem), []).append(file)
    cases = []
    for case_id, members in groups.items():
        images = _place(members, num_channels, optional)
        if images is None:
            cases += [_single(file, is_alone=len(members) == 1) for file in members]
        else:
            cases.append(Case(case_id=case_id, images=images, patient_id=case_id))
    return cases


def _place(
    members: Sequence[Path], num_channels: int, optional: Collection[int]
) -> tuple[Path | None, ...] | None:
    """Files of a case by the channels in their names; None if each is a case of its own.

    Too few channels or too many are refused when they are read, and the other cases go on.
    """
    matches = [(_CHANNEL_SUFFIX.search(image_stem(file)), file) for file in members]
    files = {int(match[1]): file for match, file in matches if match}
    if num_channels == 1 or len(files) < len(members):
        return None
    may_lack = set(range(num_channels)) - files.keys() <= set(optional)
    # A single file may hold all channels.
    if len(members) == 1 and not (may_lack and _has_one_channel(members[0])):
        return None
    if len(files) != num_channels and not may_lack:
        return tuple(files[number] for number in sorted(files))
    # Numbers that are not the model's make it longer than what the model takes.
    return tuple(files.get(number) for number in range(max(num_channels, max(files) + 1)))


def _has_one_channel(file: Path) -> bool:
    try:
        return read_header(file)[1] == 1
    except (DataError, OSError):
        # Told with the name of its case, when it is read.
        return False


def _single(file: Path, is_alone: bool) -> Case:
    """A file with all channels; ``CASE_0000`` is CASE unless ``_0001`` ... number the cases."""
    stem = image_stem(file)
    case_id = stem.removesuffix("_0000") if is_alone else stem
    return Case(case_id=case_id, images=(file,), patient_id=case_id)
