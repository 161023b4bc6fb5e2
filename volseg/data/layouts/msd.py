"""Medical Segmentation Decathlon: ``dataset.json`` lists the files, 3D or 4D (channels last).

References:
    Antonelli et al., The Medical Segmentation Decathlon, 2022, doi 10.1038/s41467-022-30695-9.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from volseg.data.cases import Case, Dataset
from volseg.data.layouts.declared import (
    locate_inside,
    parse_channels,
    parse_labels,
    read_description,
)
from volseg.data.layouts.files import split_suffix
from volseg.errors import DataError


def detect(path: Path) -> bool:
    """Whether `path` is a folder with ``dataset.json``."""
    return (path / "dataset.json").is_file()


def find(path: Path) -> Dataset:
    """Read ``dataset.json``.

    Raises:
        DataError: a key is missing, or a path leads out of the folder.
    """
    source = path / "dataset.json"
    description = read_description(path)
    for key in ("modality", "labels", "training"):
        if key not in description:
            raise DataError(
                f"{source}: key '{key}' is missing; expected modality, labels and training. Add it."
            )
    return Dataset(
        name=str(description.get("name") or path.name),
        root=path,
        layout="MSD",
        channels=parse_channels(description["modality"], source),
        classes=parse_labels(description["labels"], source),
        cases=tuple(_read_cases(description, "training", path)),
        unlabelled=tuple(_read_cases(description, "test", path)),
    )


def _read_cases(description: dict[str, Any], section: str, root: Path) -> list[Case]:
    entries = description.get(section, [])
    if not isinstance(entries, list):
        raise DataError(f"{root / 'dataset.json'}: '{section}' is not a list. Correct it.")
    cases = []
    for index, entry in enumerate(entries):
        source = f"{root / 'dataset.json'}: {section}[{index}]"
        fields = entry if isinstance(entry, dict) else {"image": entry}
        image = fields.get("image")
        if isinstance(image, str) and Path(image).name.startswith("._"):
            continue  # macOS resource forks, which some published archives list as images
        if section == "training" and not fields.get("label"):
            raise DataError(
                f"{source} has no label; expected image and label. Add it, or move it to 'test'."
            )
        image = locate_inside(root, image, source)
        label = locate_inside(root, fields["label"], source) if section == "training" else None
        case_id = split_suffix(image.name)[0]
        cases.append(Case(case_id=case_id, images=(image,), label=label, patient_id=case_id))
    return cases
