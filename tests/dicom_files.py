"""DICOM series on disk, written by pydicom alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])
Change = Callable[[int, Dataset], None]


def write_series(
    folder: Path,
    array: NDArray[np.integer],
    affine: NDArray[np.float64],
    *,
    slopes: Sequence[float] | None = None,
    intercept: float = -1024.0,
    change: Change | None = None,
) -> Path:
    """Write ``(X, Y, Z)`` stored values as a CT series on the grid of `affine` (index to RAS+ mm).

    Args:
        folder: made if missing.
        array: what the files store, before their slope and intercept.
        affine: (4, 4).
        slopes: one per slice; 1 if left out.
        intercept: of all slices.
        change: called with number and dataset of every slice before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    directions = RAS_TO_LPS @ (affine[:3, :3] / spacing)
    # Names out of order, as scanners export them.
    for place, index in enumerate(np.random.default_rng(0).permutation(array.shape[2])):
        dataset = Dataset()
        dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, generate_uid()
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
        dataset.FrameOfReferenceUID = frame
        dataset.Modality, dataset.SeriesDescription = "CT", "abdomen"
        dataset.PatientID, dataset.PatientName = "P1", "Test^Patient"
        dataset.PatientBirthDate = dataset.PatientSex = dataset.AccessionNumber = ""
        dataset.StudyDate = dataset.StudyTime = dataset.ReferringPhysicianName = ""
        dataset.StudyID, dataset.SeriesNumber = "1", 1
        dataset.Manufacturer, dataset.PositionReferenceIndicator = "", ""
        dataset.InstanceNumber = int(index) + 1
        position = RAS_TO_LPS @ (affine @ [0, 0, index, 1])[:3]
        dataset.ImagePositionPatient = [f"{value:.9g}" for value in position]
        dataset.ImageOrientationPatient = [f"{value:.9g}" for value in directions[:, :2].T.ravel()]
        dataset.PixelSpacing = [f"{value:.9g}" for value in spacing[[1, 0]]]
        dataset.SliceThickness = f"{spacing[2]:.9g}"
        dataset.Columns, dataset.Rows = array.shape[:2]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit, dataset.PixelRepresentation = 15, 1
        dataset.RescaleSlope = "1" if slopes is None else f"{slopes[index]:.9g}"
        dataset.RescaleIntercept, dataset.RescaleType = f"{intercept:g}", "HU"
        dataset.PixelData = np.ascontiguousarray(array[:, :, index].T, np.int16).tobytes()
        if change:
            change(int(index), dataset)
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.save_as(folder / f"I{place:04d}.dcm", enforce_file_format=True)
    return folder
