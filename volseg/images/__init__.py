"""Image files in and out: a path gives an `Image`, an array and its grid give a file.

NIfTI, NRRD, MetaImage (MHA, MHD), MGH and DICOM series in 3D, and PNG or TIFF pictures in 2D. What
cannot be read completely and unambiguously is refused with a `DataError` that names the file. Which
files belong together, and what the values mean, is left to `volseg.data`.
"""

from __future__ import annotations

from volseg.images.formats import (
    DICOM,
    IMAGE_SUFFIXES,
    SEGMENTS,
    image_stem,
    is_picture,
    is_series,
    list_stored,
)
from volseg.images.image import Image
from volseg.images.reading import from_nibabel, from_sitk, read_header, read_image, read_labels
from volseg.images.writing import check_label_suffix, write_image, write_labels

__all__ = [
    "DICOM",
    "IMAGE_SUFFIXES",
    "SEGMENTS",
    "Image",
    "check_label_suffix",
    "from_nibabel",
    "from_sitk",
    "image_stem",
    "is_picture",
    "is_series",
    "list_stored",
    "read_header",
    "read_image",
    "read_labels",
    "write_image",
    "write_labels",
]
