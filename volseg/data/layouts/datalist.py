"""A CSV or JSON file that lists images and labels, wherever they lie.

CSV has the columns ``image`` (or one ``image_<channel>`` for each channel) and ``label``; JSON is
a list of entries, or MONAI's ``{"training": [...], "validation": [...], "testing": [...]}``.
Optional in both: ``case_id``, ``patient_id``, ``fold``, and ``annotated``, the names or values of
the classes that a label shows, if not all (in CSV with ``|`` between them). Paths are relative to
the file or absolute. An empty cell of a channel, or null in the images of a JSON entry, is a
channel that the case lacks.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volseg.config import Record
from volseg.data.cases import Case, Classes, Dataset, Split, number_channels
from volseg.data.layouts.classes import find_classes
from volseg.data.layouts.declared import parse_channels, parse_labels, read_json
from volseg.data.layouts.files import split_suffix
from volseg.data.splits import check_splits
from volseg.errors import DataError
from volseg.images import read_header

_SECTIONS = {
    "training": ("training", "train"),
    "validation": ("validation", "val"),
    "testing": ("testing", "test"),
}


class _Entry(Record):
    """What one row of the list may say."""

    image: str | tuple[str | None, ...]
    label: str | None = None
    case_id: str | None = None
    patient_id: str | None = None
    fold: int | None = None
    annotated: str | int | tuple[str | int, ...] | None = None


@dataclass(frozen=True)
class _Row:
    case: Case
    fold: int | None


@dataclass
class _Listing:
    """The parsed file. Channels and classes are None where it does not declare them."""

    rows: dict[str, list[_Row]]
    channels: tuple[str, ...] | None = None
    classes: Classes | None = None


def detect(path: Path) -> bool:
    """Whether `path` is a CSV or JSON file."""
    return path.is_file() and path.suffix.lower() in (".csv", ".json")


def find(path: Path) -> Dataset:
    """Read the list; what it does not declare is read from headers and labels that are there.

    Raises:
        DataError: an unknown column or key, cases with different channels, or none of the files
            that would tell channels or classes is there.
    """
    listing = _read_csv(path) if path.suffix.lower() == ".csv" else _read_json(path)
    cases = [row.case for rows in listing.rows.values() for row in rows]
    if not cases:
        raise DataError(f"{path} lists no cases; expected at least one. Add them.")
    channels = _find_channels(cases, listing.channels, path)
    labels = [case.label for case in cases if case.label]
    classes = listing.classes or find_classes(_choose_existing(labels, path), path)
    cases = [_name_annotated(case, classes) for case in cases]
    try:
        classes = classes.with_unsure(cases)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return Dataset(
        name=path.stem,
        root=path.parent,
        layout="datalist",
        channels=channels,
        classes=classes,
        cases=tuple(case for case in cases if case.label),
        unlabelled=tuple(case for case in cases if not case.label),
        splits=_find_splits(listing, path),
    )


def _read_csv(path: Path) -> _Listing:
    try:
        # Spreadsheets write a byte order mark, and semicolons where the comma is decimal.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}. Save it as CSV.") from error
    header = text.partition("\n")[0]
    delimiter = ";" if header.count(";") > header.count(",") else ","
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    columns = [column.strip() for column in next(reader, [])]
    images = [column for column in columns if column == "image" or column.startswith("image_")]
    if not images or ("image" in images and len(images) > 1):
        raise DataError(
            f"{path} has the columns {', '.join(columns) or 'none'}; expected image, or one "
            "image_<channel> for each channel, and label. Correct the first line."
        )
    rows = [
        _parse_line(columns, images, cells, path, f"{path}: line {reader.line_num}")
        for cells in reader
        if any(cells)
    ]
    named = None if images == ["image"] else tuple(c.removeprefix("image_") for c in images)
    return _Listing({"training": rows}, named)


def _parse_line(
    columns: Sequence[str], images: Sequence[str], cells: Sequence[str], path: Path, source: str
) -> _Row:
    if len(cells) != len(columns):
        raise DataError(
            f"{source} has {len(cells)} cells; expected {len(columns)} ({', '.join(columns)}). "
            "Quote paths that hold a comma."
        )
    filled = {c: cell.strip() for c, cell in zip(columns, cells, strict=True) if cell.strip()}
    paths = [filled.pop(column, None) for column in images]
    if not any(paths):
        raise DataError(
            f"{source}: {'column' if len(images) == 1 else 'every column'} {', '.join(images)} is "
            "empty; expected a path. Fill it in."
        )
    return _make_row({"image": paths, **filled}, path.parent, source)


def _read_json(path: Path) -> _Listing:
    content = read_json(path)
    if isinstance(content, list):
        content = {"training": content}
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a list of cases, or an object with key 'training'.")
    listing = _Listing({section: [] for section in _SECTIONS})
    for section, keys in _SECTIONS.items():
        for key in keys:
            for index, item in enumerate(content.get(key) or ()):
                fields = item if isinstance(item, dict) else {"image": item}
                row = _make_row(fields, path.parent, f"{path}: {key}[{index}]")
                listing.rows[section].append(row)
    if "modality" in content:
        listing.channels = parse_channels(content["modality"], path)
    if "labels" in content:
        listing.classes = parse_labels(content["labels"], path)
    return listing


def _make_row(fields: Any, root: Path, source: str) -> _Row:
    entry = _Entry.parse(fields, source, DataError)
    listed = (entry.image,) if isinstance(entry.image, str) else entry.image
    images = tuple(root / image if image else None for image in listed)
    if not any(images):
        raise DataError(f"{source}: no image; expected at least one. Add it.")
    first = next(image for image in images if image is not None)
    case_id = entry.case_id or split_suffix(first.name)[0]
    case = Case(
        case_id=case_id,
        images=images,
        label=root / entry.label if entry.label else None,
        patient_id=entry.patient_id or case_id,
        annotated=_split_annotated(entry.annotated),
    )
    return _Row(case, entry.fold)


def _find_channels(
    cases: Sequence[Case], declared: tuple[str, ...] | None, path: Path
) -> tuple[str, ...]:
    first = cases[0]
    for case in cases:
        if len(case.images) != len(first.images):
            raise DataError(
                f"{path}: case '{case.case_id}' has {len(case.images)} images and "
                f"'{first.case_id}' has {len(first.images)}; expected the same channels in every "
                "case. Correct the list."
            )
    if len(first.images) == 1:
        if declared:
            return declared
        (file, *_) = _choose_existing([case.files[0] for case in cases], path)
        return number_channels(read_header(file)[1])
    if declared and len(declared) != len(first.images):
        raise DataError(
            f"{path} declares {len(declared)} channels ({', '.join(declared)}) and lists "
            f"{len(first.images)} images for each case; expected as many. Correct the list."
        )
    return declared or number_channels(len(first.images))


def _choose_existing(files: Sequence[Path], path: Path) -> Sequence[Path]:
    existing = [file for file in files if file.exists()]
    if files and not existing:
        raise DataError(
            f"{path}: none of {len(files)} files exists, the first is {files[0]}; expected paths "
            f"relative to {path.parent}, or absolute ones. Correct them, or restore the files."
        )
    return existing


def _find_splits(listing: _Listing, path: Path) -> tuple[Split, ...]:
    """The splits that the list declares: its validation section, or the folds of its cases."""
    rows = [
        row
        for section in ("training", "validation")
        for row in listing.rows.get(section, [])
        if row.case.label
    ]
    held_out = {row.case.case_id for row in listing.rows.get("validation", []) if row.case.label}
    folds = sorted({row.fold for row in rows if row.fold is not None})
    if not folds and not held_out:
        return ()
    if folds and (held_out or any(row.fold is None for row in rows)):
        raise DataError(
            f"{path}: only some labelled cases have a fold; expected a fold for every case, or a "
            "validation section and no folds. Correct the list."
        )
    ids = [row.case.case_id for row in rows]
    sides = [{r.case.case_id for r in rows if r.fold == fold} for fold in folds] or [held_out]
    splits = [
        Split(
            train=tuple(case_id for case_id in ids if case_id not in side),
            validation=tuple(case_id for case_id in ids if case_id in side),
        )
        for side in sides
    ]
    check_splits(splits, [row.case for row in rows], path)
    return tuple(splits)


def _split_annotated(listed: str | int | tuple[str | int, ...] | None) -> tuple[str, ...] | None:
    if listed is None:
        return None
    parts = listed.split("|") if isinstance(listed, str) else listed
    return tuple(str(p).strip() for p in (parts if isinstance(parts, (list, tuple)) else (parts,)))


def _name_annotated(case: Case, classes: Classes) -> Case:
    """With names in place of the label values that the list may give."""
    if case.annotated is None:
        return case
    names = {str(v): name for v, name in zip(classes.values, classes.names, strict=True)}
    return case.model_copy(update={"annotated": tuple(names.get(a, a) for a in case.annotated)})
