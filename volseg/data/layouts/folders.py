"""A folder of images beside a folder of labels, matched by file name.

``images/a.nii.gz`` goes with ``labels/a.nii.gz``; several channels are files ``a_0000``,
``a_0001``, ... or one 4D file. Classes are not declared here, so every label file is read.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from volseg.data.cases import Case, Dataset, number_channels
from volseg.data.layouts.classes import find_classes
from volseg.data.layouts.files import (
    group_channels,
    list_images,
    order_channels,
    split_suffix,
)
from volseg.errors import DataError
from volseg.images import read_header

IMAGE_FOLDERS = ("images", "image", "imagestr")
LABEL_FOLDERS = (
    "labels",
    "label",
    "labelstr",
    "masks",
    "mask",
    "segmentations",
    "segmentation",
)


def detect(path: Path) -> bool:
    """Whether `path` holds a folder of images and one of labels, by their names."""
    return bool(_matching(path, IMAGE_FOLDERS) and _matching(path, LABEL_FOLDERS))


def find(path: Path, optional: Container[str] = ()) -> Dataset:
    """Match images and labels by name; an image without label is unlabelled.

    A case may lack channels that are `optional`.

    Raises:
        DataError: several folders of images or labels, a label without image, a missing channel.
    """
    image_folder = _only(path, IMAGE_FOLDERS)
    files = list_images(image_folder)
    labels = list_images(_only(path, LABEL_FOLDERS))
    if not files:
        raise DataError(f"{image_folder} holds no images; expected files such as case_01.nii.gz.")
    images, channels = _match_channels(files, labels, image_folder, optional)
    if orphans := sorted(labels.keys() - images.keys()):
        raise DataError(
            f"{labels[orphans[0]]} has no image; expected {image_folder / orphans[0]}.nii.gz or "
            "another format. Give both the same name, or list the pairs in a CSV."
        )
    cases = [
        Case(case_id=stem, images=paths, label=labels.get(stem), patient_id=stem)
        for stem, paths in images.items()
    ]
    return Dataset(
        name=path.name,
        root=path,
        layout="folders",
        channels=channels,
        classes=find_classes(list(labels.values()), path),
        cases=tuple(case for case in cases if case.label),
        unlabelled=tuple(case for case in cases if not case.label),
    )


def _match_channels(
    files: Mapping[str, Path], labels: Mapping[str, Path], folder: Path, optional: Container[str]
) -> tuple[dict[str, tuple[Path | None, ...]], tuple[str, ...]]:
    """Image files of each case, and the channel names."""
    # A label "a_0001" beside an image "a_0001" is a case of that name, not a channel.
    if not any(f"{stem}_0000" in files and stem not in files for stem in labels):
        return {stem: (path,) for stem, path in files.items()}, _count_channels(files.values())
    groups = group_channels(files)
    highest = max(max(found) for found in groups.values())
    if not highest:
        # Each file has all channels, whatever its number.
        alone = {stem: found[0] for stem, found in groups.items()}
        return {stem: (path,) for stem, path in alone.items()}, _count_channels(alone.values())
    channels = number_channels(1 + highest)
    suffix = split_suffix(next(iter(files.values())).name)[1]
    images = {
        stem: order_channels(stem, found, channels, folder, suffix, optional)
        for stem, found in groups.items()
    }
    return images, channels


def _count_channels(files: Iterable[Path]) -> tuple[str, ...]:
    """Names of the channels of the first file that can be read; what others have is told of them.

    Raises:
        DataError: no file can be read; that of the first.
    """
    errors = []
    for path in files:
        try:
            return number_channels(read_header(path)[1])
        except DataError as error:
            errors.append(error)
    raise errors[0]


def _matching(path: Path, names: tuple[str, ...]) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(f for f in path.iterdir() if f.is_dir() and f.name.lower() in names)


def _only(path: Path, names: tuple[str, ...]) -> Path:
    found = _matching(path, names)
    if len(found) > 1:
        raise DataError(
            f"{path} holds both {found[0].name} and {found[1].name}; expected one of them. "
            "Move one elsewhere, or list the pairs in a CSV."
        )
    return found[0]
