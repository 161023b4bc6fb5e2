"""nnU-Net raw folders of version 1 and 2: ``imagesTr/CASE_0000.nii.gz``, ``labelsTr/CASE.nii.gz``.

Version 1 lists its cases in ``dataset.json``; version 2 leaves them to the folders, or names files
elsewhere in its ``dataset`` entry. Where a label is declared as a list of values, all labels but
the background are regions.
"""

from __future__ import annotations

import logging
from collections.abc import Container
from pathlib import Path
from typing import Any

from volseg.data.cases import Case, Classes, Dataset
from volseg.data.layouts.classes import make_classes
from volseg.data.layouts.declared import parse_channels, parse_labels, read_description
from volseg.data.layouts.files import (
    cure_absence,
    group_channels,
    holds_all,
    list_images,
    order_channels,
    split_suffix,
)
from volseg.errors import DataError

logger = logging.getLogger(__name__)


def detect(path: Path) -> bool:
    """Whether ``dataset.json`` is nnU-Net's, by its keys (2) or its numbered files (1)."""
    description = read_description(path)
    if _is_version_2(description):
        return True
    # Any of them, since files may be missing.
    names = [split_suffix(label) for label in _listed_labels(description)]
    return any((path / "imagesTr" / f"{stem}_0000{suffix}").is_file() for stem, suffix in names)


def find(path: Path, optional: Container[str] = ()) -> Dataset:
    """Read ``dataset.json`` and match the files in ``imagesTr`` and ``labelsTr``.

    A case of these folders may lack channels that are `optional`.

    Raises:
        DataError: a key, label or channel is missing.
    """
    source = path / "dataset.json"
    description = read_description(path)
    if _is_version_2(description):
        channels = parse_channels(_require(description, "channel_names", source), source)
        classes = _parse_labels(_require(description, "labels", source), source)
        suffix = str(_require(description, "file_ending", source))
    else:
        channels = parse_channels(_require(description, "modality", source), source)
        classes = parse_labels(_require(description, "labels", source), source)
        suffix = split_suffix(_listed_labels(description)[0])[1]
    return Dataset(
        name=str(description.get("name") or path.name),
        root=path,
        layout="nnU-Net",
        channels=channels,
        classes=classes,
        cases=_find_training(path, description, channels, suffix, optional),
        unlabelled=_find_cases(path / "imagesTs", None, channels, suffix, optional),
    )


def _is_version_2(description: dict[str, Any]) -> bool:
    return "channel_names" in description or "file_ending" in description


def _listed_labels(description: dict[str, Any]) -> list[str]:
    """File names of the labels that version 1 lists."""
    entries = description.get("training")
    labels = [e.get("label") for e in entries if isinstance(e, dict)] if entries else []
    return [Path(label).name for label in labels if isinstance(label, str)]


def _require(description: dict[str, Any], key: str, source: Path) -> Any:
    if key not in description:
        raise DataError(f"{source}: key '{key}' is missing; expected it in nnU-Net raw. Add it.")
    return description[key]


def _parse_labels(labels: Any, source: Path) -> Classes:
    """Classes from ``{"background": 0, "liver": 1}``, where a region has a list of values."""
    if not isinstance(labels, dict):
        raise DataError(f'{source}: labels {labels!r}; expected {{"background": 0, "liver": 1}}.')
    names: dict[int, str] = {}
    try:
        members = {
            name: [int(value) for value in (values if isinstance(values, list) else [values])]
            for name, values in labels.items()
        }
    except (TypeError, ValueError) as error:
        raise DataError(f"{source}: a label value is not an integer. Correct it.") from error
    # nnU-Net's word for voxels that nobody has labelled.
    ignored = members.pop("ignore", None)
    if ignored is not None and len(ignored) != 1:
        raise DataError(
            f"{source}: 'ignore' has the values {ignored}; expected one. Give all such voxels the "
            "same."
        )
    for name, values in sorted(members.items(), key=lambda item: len(item[1])):
        for value in values:
            names.setdefault(value, name if len(values) == 1 else f"label_{value}")
    regions = {name: values for name, values in members.items() if name.lower() != "background"}
    if all(len(values) == 1 for values in regions.values()):
        regions = {}
    return make_classes(names, source, regions, ignored[0] if ignored else None)


def _find_training(
    path: Path,
    description: dict[str, Any],
    channels: tuple[str, ...],
    suffix: str,
    optional: Container[str],
) -> tuple[Case, ...]:
    if files := description.get("dataset"):
        return _read_files(path, files, channels, optional)
    listed = [name.removesuffix(suffix) for name in _listed_labels(description)]
    cases = _find_cases(path / "imagesTr", path / "labelsTr", channels, suffix, optional, listed)
    expected = description.get("numTraining", len(cases))
    if _is_version_2(description) and expected != len(cases):
        raise DataError(
            f"{path}: {len(cases)} training cases; expected {expected} as numTraining in "
            "dataset.json says. Complete the copy or correct numTraining."
        )
    return cases


def _read_files(
    path: Path, files: Any, channels: tuple[str, ...], optional: Container[str]
) -> tuple[Case, ...]:
    """Cases of the ``dataset`` entry, whose paths are relative to the folder or absolute."""
    cases = []
    for case_id, entry in sorted(files.items()):
        source = f"{path / 'dataset.json'}: dataset '{case_id}'"
        if not isinstance(entry, dict) or not {"images", "label"} <= entry.keys():
            raise DataError(f"{source}: expected images and label. Add them.")
        images = tuple(None if image is None else path / str(image) for image in entry["images"])
        is_whole = len(images) == 1 and images[0] and holds_all(images[0], len(channels))
        if len(images) != len(channels) and not is_whole:
            raise DataError(
                f"{source}: {len(images)} images; expected {len(channels)} "
                f"({', '.join(channels)}). Correct the list."
            )
        absent = [name for image, name in zip(images, channels, strict=False) if image is None]
        strange = [name for name in absent if name not in optional or not any(images)]
        if strange:
            raise DataError(f"{source}: no image of {strange[0]}. {cure_absence(strange[0])}")
        label = path / str(entry["label"])
        cases.append(Case(case_id=case_id, images=images, label=label, patient_id=case_id))
    return tuple(cases)


def _find_cases(
    image_folder: Path,
    label_folder: Path | None,
    channels: tuple[str, ...],
    suffix: str,
    optional: Container[str],
    listed: list[str] | None = None,
) -> tuple[Case, ...]:
    """Cases by file name; with a label folder every case needs its label."""
    files = list_images(image_folder, suffix) if image_folder.is_dir() else {}
    groups = group_channels(files)
    labels = list_images(label_folder, suffix) if label_folder and label_folder.is_dir() else {}
    cases = []
    for case_id in sorted(listed or groups.keys() | labels.keys()):
        found = groups.get(case_id, {})
        images = order_channels(case_id, found, channels, image_folder, suffix, optional)
        if label_folder and case_id not in labels:
            raise DataError(
                f"case '{case_id}' has no label; expected {label_folder / case_id}{suffix}. "
                "Add the file or remove the case."
            )
        label = labels.get(case_id)
        cases.append(Case(case_id=case_id, images=images, label=label, patient_id=case_id))
    return tuple(cases)
