"""Label maps as DICOM segmentations (SEG), which refer to the series that they were made from.

Needs highdicom, an optional package: ``pip install volseg[dicom]``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volseg._version import __version__
from volseg.atomic import atomic_path
from volseg.errors import ConfigError, DataError, MachineError
from volseg.geometry import Geometry
from volseg.images import dicom


def write(
    path: Path,
    labels: NDArray[Any],
    geometry: Geometry,
    names: Mapping[int, str],
    series: Path,
) -> None:
    """Write a binary segment for each class that occurs, or an empty one for each where none does.

    Segments carry the generic code for tissue: which organ a name means is not for volseg to say.

    Args:
        path: of the suffix .dcm.
        labels: (*S) label values.
        geometry: the grid of `S`: that of the series.
        names: of the values that are segments, background left out.
        series: folder of the DICOM series that was segmented.

    Raises:
        ConfigError: the series lies on another grid.
        DataError: no class has a name, or the series is bad, or lacks what every segmentation
            repeats of its patient.
        MachineError: highdicom is not installed.
    """
    highdicom = import_highdicom()
    import pydicom

    slices = dicom.load_series(series)
    if not dicom.describe(slices).is_same_grid(geometry):
        raise ConfigError(f"{path}: the label map is not on the grid of {series}.")
    if not names:
        raise DataError(f"{path}: no class has a name; expected one at least for a segment.")
    found = {value: name for value, name in names.items() if (labels == value).any()}
    described = found or names
    if not found:
        # An empty frame for each class: a file without any is not allowed.
        slices, labels = slices[:1], labels[..., :1]
    sources = [pydicom.dcmread(part.path, stop_before_pixels=True) for part in slices]
    # Frames as the slices, rows before columns; segments are numbered from one.
    frames = np.zeros(labels.T.shape, np.uint8 if len(described) < 256 else np.uint16)
    for number, value in enumerate(described, start=1):
        frames[labels.T == value] = number
    try:
        segmentation = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=frames,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[
                _describe(highdicom, number, name)
                for number, name in enumerate(described.values(), start=1)
            ],
            omit_empty_frames=bool(found),
            series_instance_uid=highdicom.UID(),
            series_number=100,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="volseg",
            manufacturer_model_name="volseg",
            software_versions=__version__,
            device_serial_number="0",
            series_description="volseg segmentation",
        )
    except AttributeError as error:
        raise DataError(
            f"{series}: {error}; expected what the DICOM standard requires of every image. Export "
            "the series again, or write another format."
        ) from error
    with atomic_path(path) as temporary:
        segmentation.save_as(temporary)


@functools.cache
def import_highdicom() -> Any:
    """The package that writes segmentations.

    Raises:
        MachineError: it is not installed.
    """
    try:
        import highdicom
    except ImportError as error:
        raise MachineError(
            "DICOM segmentations need highdicom. Install it with `pip install volseg[dicom]`."
        ) from error
    return highdicom


def _describe(highdicom: Any, number: int, name: str) -> Any:
    from pydicom.sr.codedict import codes

    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=codes.SCT.Tissue,
        segmented_property_type=codes.SCT.Tissue,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="volseg", version=__version__, family=codes.DCM.ArtificialIntelligence
        ),
    )
