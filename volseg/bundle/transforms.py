"""The one step of an exported workflow that MONAI's own transforms cannot say."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.transforms import InvertibleTransform, MapTransform, Resize

from volseg.data.resampling import resampled_shape

_MODES = {2: "bilinear", 3: "trilinear"}


class ResampleToSpacingd(MapTransform, InvertibleTransform):  # type: ignore[misc]
    """Resample metadata tensors ``(C, *S)`` to a voxel size, keeping the outer voxel edges.

    As `volseg.data.resampling.resample`. MONAI's ``Spacingd`` keeps the centre of the first voxel
    instead, and its ``scale_extent`` shifts oblique volumes (MONAI 1.6.1).
    """

    def __init__(self, keys: str | Sequence[str], spacing_mm: Sequence[float | None]) -> None:
        """Resample `keys` to `spacing_mm`, in array axis order; along None they stay."""
        super().__init__(keys)
        self.spacing_mm = tuple(spacing_mm)
        # MONAI's trace of what was applied names this one object, so it is kept for the way back.
        self.resize = Resize(spatial_size=-1, mode=_MODES[len(self.spacing_mm)])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample each key; the size follows from its own spacing."""
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            spacing = [float(value) for value in image.pixdim]
            target = [s if t is None else t for s, t in zip(spacing, self.spacing_mm, strict=True)]
            self.resize.spatial_size = resampled_shape(image.shape[1:], spacing, target)
            result[key] = self.resize(image)
        return result

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample each key back to the size it had."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.resize.inverse(result[key])
        return result
