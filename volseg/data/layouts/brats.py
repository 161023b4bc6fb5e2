"""BraTS folders of every edition since 2018, told apart by the names of the case folders.

The meaning of a label value changed between editions: 4 is enhancing tumour until 2021, absent in
2023, the resection cavity of treated gliomas in 2024. Names decide; only paediatric and metastasis
cases kept their names when their values changed, and there the occurrence of a value 4 decides.

References:
    Baid et al., The RSNA-ASNR-MICCAI BraTS 2021 Benchmark, 2021, arXiv 2107.02314.
    de Verdier et al., The 2024 BraTS Challenge: Glioma Segmentation on Post-treatment MRI, 2024,
    arXiv 2405.18368.
    Fathi Kazerooni et al., The BraTS-PEDs Challenge 2024, arXiv 2404.15009.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

from volseg.data.cases import Case, Classes, Dataset
from volseg.data.layouts.classes import make_classes, read_label_values
from volseg.data.layouts.files import cure_absence
from volseg.errors import DataError

logger = logging.getLogger(__name__)

_SUFFIXES_2018 = {"T1": "_t1", "T1c": "_t1ce", "T2": "_t2", "FLAIR": "_flair"}
_SUFFIXES_2023 = {"T1": "-t1n", "T1c": "-t1c", "T2": "-t2w", "FLAIR": "-t2f"}

_NAMES_2018 = {1: "NCR_NET", 2: "ED", 4: "ET"}
_NAMES_2021 = {1: "NCR", 2: "ED", 4: "ET"}
_NAMES_2023 = {1: "NCR", 2: "ED", 3: "ET"}
_NAMES_TREATED = {1: "NETC", 2: "SNFH", 3: "ET", 4: "RC"}
_NAMES_PED_2023 = {1: "NC", 2: "ED", 3: "ET"}
_NAMES_PED_2024 = {1: "ET", 2: "NET", 3: "CC", 4: "ED"}

_CORE = {"NCR", "NCR_NET", "NETC", "NC", "NET", "CC", "ET"}
"""Parts of the tumour core; with the oedema around it they are the whole tumour."""


@dataclass(frozen=True)
class Edition:
    """One year and task of the challenge.

    Attributes:
        name: as in ``BraTS 2023 GLI``.
        folder: pattern of a whole case folder's name, with a group ``patient``.
        names: class name of each label value but background.
        suffixes: ending of each channel's file after the folder's name.
        label: ending of the label file.
        with_value_4: name and classes of the later edition that has the same folder names.
    """

    name: str
    folder: str
    names: Mapping[int, str]
    suffixes: Mapping[str, str]
    label: str
    with_value_4: tuple[str, Mapping[int, str]] | None = None


EDITIONS = (
    Edition("BraTS 2018", r"(?P<patient>Brats18_.+)_\d+", _NAMES_2018, _SUFFIXES_2018, "_seg"),
    Edition("BraTS 2019", r"(?P<patient>BraTS19_.+)_\d+", _NAMES_2018, _SUFFIXES_2018, "_seg"),
    Edition("BraTS 2020", r"(?P<patient>BraTS20_\w+_\d+)", _NAMES_2018, _SUFFIXES_2018, "_seg"),
    Edition("BraTS 2021", r"(?P<patient>BraTS2021_\d+)", _NAMES_2021, _SUFFIXES_2018, "_seg"),
    Edition(
        "BraTS 2023 GLI",
        r"(?P<patient>BraTS-GLI-\d+)-0\d\d",
        _NAMES_2023,
        _SUFFIXES_2023,
        "-seg",
    ),
    # Treated gliomas: time points are numbered from 100.
    Edition(
        "BraTS 2024 GLI",
        r"(?P<patient>BraTS-GLI-\d+)-1\d\d",
        _NAMES_TREATED,
        _SUFFIXES_2023,
        "-seg",
    ),
    Edition(
        "BraTS 2023 MEN",
        r"(?P<patient>BraTS-MEN-\d+)-\d{3}",
        _NAMES_2023,
        _SUFFIXES_2023,
        "-seg",
    ),
    # Tumours of all kinds: a case has a number and no time point.
    Edition(
        "BraTS 2024 GoAT",
        r"(?P<patient>BraTS-GoAT-\d+)",
        _NAMES_2023,
        _SUFFIXES_2023,
        "-seg",
    ),
    Edition(
        "BraTS 2023 SSA",
        r"(?P<patient>BraTS-SSA-\d+)-\d{3}",
        _NAMES_2023,
        _SUFFIXES_2023,
        "-seg",
    ),
    Edition(
        "BraTS 2023 MET",
        r"(?P<patient>BraTS-MET-\d+)-\d{3}",
        _NAMES_2023,
        _SUFFIXES_2023,
        "-seg",
        with_value_4=("BraTS 2025 MET", _NAMES_TREATED),
    ),
    Edition(
        "BraTS 2023 PED",
        r"(?P<patient>BraTS-PED-\d+)-\d{3}",
        _NAMES_PED_2023,
        _SUFFIXES_2023,
        "-seg",
        with_value_4=("BraTS 2024 PED", _NAMES_PED_2024),
    ),
    Edition(
        "BraTS 2024 MEN-RT",
        r"(?P<patient>BraTS-MEN-RT-\d+)-\d+",
        {1: "GTV"},
        {"T1c": "_t1c"},
        "_gtv",
    ),
)


def detect(path: Path) -> bool:
    """Whether `path` holds a case folder of a known edition, directly or below HGG or LGG."""
    return any(True for _ in _case_folders(path))


def find(path: Path, optional: Container[str] = ()) -> Dataset:
    """Find the case folders; channels in the order T1, T1c, T2, FLAIR whatever the edition.

    A case may lack channels that are `optional`.

    Raises:
        DataError: several editions in one folder, or a case without one of its channels.
    """
    folders = dict(_case_folders(path))
    edition = _only_edition(path, folders)
    ordered = sorted(folders, key=lambda folder: folder.name)
    cases = [_read_case(folder, edition, optional) for folder in ordered]
    labelled = tuple(case for case in cases if case.label)
    name, classes = _choose_classes(edition, labelled, path)
    return Dataset(
        name=path.name,
        root=path,
        layout=name,
        channels=tuple(edition.suffixes),
        classes=classes,
        cases=labelled,
        unlabelled=tuple(case for case in cases if not case.label),
    )


def _case_folders(path: Path) -> list[tuple[Path, Edition]]:
    found = []
    for parent in (path, path / "HGG", path / "LGG"):
        for folder in sorted(parent.iterdir()) if parent.is_dir() else []:
            edition = _edition_of(folder.name)
            if edition and folder.is_dir():
                found.append((folder, edition))
    return found


def _edition_of(name: str) -> Edition | None:
    return next((edition for edition in EDITIONS if re.fullmatch(edition.folder, name)), None)


def _only_edition(path: Path, folders: Mapping[Path, Edition]) -> Edition:
    examples = {edition.name: folder.name for folder, edition in folders.items()}
    if len(examples) > 1:
        listed = " and ".join(f"{name} ({folder})" for name, folder in examples.items())
        raise DataError(
            f"{path} mixes {listed}; expected one edition, since label values differ in meaning. "
            "Put each edition in a folder of its own."
        )
    return next(iter(folders.values()))


def _read_case(folder: Path, edition: Edition, optional: Container[str]) -> Case:
    images = [_find_file(folder, suffix) for suffix in edition.suffixes.values()]
    for image, (channel, suffix) in zip(images, edition.suffixes.items(), strict=True):
        if image is None and (not any(images) or channel not in optional):
            raise DataError(
                f"case '{folder.name}' has no {channel} image; expected "
                f"{folder / folder.name}{suffix}.nii.gz. {cure_absence(channel)}"
            )
    match = re.fullmatch(edition.folder, folder.name)
    return Case(
        case_id=folder.name,
        images=tuple(images),
        label=_find_file(folder, edition.label) or _find_irregular_label(folder),
        patient_id=match["patient"] if match else folder.name,
    )


def _find_file(folder: Path, suffix: str) -> Path | None:
    candidates = [folder / f"{folder.name}{suffix}{ending}" for ending in (".nii.gz", ".nii")]
    return next((path for path in candidates if path.is_file()), None)


def _find_irregular_label(folder: Path) -> Path | None:
    """A label under another name: case 355 of 2020 has ``W39_1998.09.19_Segm.nii``."""
    pattern = re.compile(r"[^.].*[_-]segm?\.nii(\.gz)?", re.IGNORECASE)
    found = [path for path in sorted(folder.iterdir()) if pattern.fullmatch(path.name)]
    if len(found) > 1:
        raise DataError(
            f"case '{folder.name}' has the labels {found[0].name} and {found[1].name}; expected "
            "one. Remove the other."
        )
    if not found:
        return None
    logger.warning("case '%s': %s is taken as its label", folder.name, found[0].name)
    return found[0]


def _choose_classes(
    edition: Edition, labelled: tuple[Case, ...], path: Path
) -> tuple[str, Classes]:
    name, names = edition.name, edition.names
    if edition.with_value_4:
        labels = [case.label for case in labelled if case.label]
        if any(4 in values for values in read_label_values(labels)):
            name, names = edition.with_value_4
        logger.info("%s: read as %s, by the values of its labels", path, name)
    return name, make_classes(names, path, _make_regions(names))


def _make_regions(names: Mapping[int, str]) -> dict[str, list[int]]:
    """What the challenge scores: whole tumour, tumour core, and the parts that lie on their own.

    Every class is in regions of its own set, so that a prediction has the edition's values again.
    """
    core = [value for value, name in names.items() if name in _CORE]
    if not core:
        return {}
    around = [value for value, name in names.items() if name in ("ED", "SNFH")]
    regions = {"whole tumour": sorted(core + around), "tumour core": core}
    # One part of the core needs no region: it is what the other regions leave of it.
    parts = [value for value in core if names[value] in ("ET", "CC")]
    apart = [value for value in names if value not in (*core, *around)]
    return regions | {names[value]: [value] for value in (*parts, *apart)}
