"""Random changes of a training patch, by MONAI's transforms on plain tensors.

MONAI's metadata tensors cost several times the transforms themselves on small patches, so
tracking is off while they run; the patch's place in the patient no longer matters here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from monai.data.meta_obj import get_track_meta, set_track_meta
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
    RandSimulateLowResolutiond,
)
from torch import Tensor

from volseg.config import AugmentationConfig
from volseg.data.cases import Classes
from volseg.data.mirroring import plan_mirroring

COARSE_AXIS = 2.0
"""An axis whose spacing is this many times the finest is not rotated into the others."""


class Augmentation:
    """Callable on a patch: image (C, *P) float32 and label (*P) in, the same shapes out."""

    def __init__(
        self, config: AugmentationConfig, spacing_mm: Sequence[float], classes: Classes
    ) -> None:
        self.transforms = Compose(_make_transforms(config, spacing_mm))
        self.mirroring = plan_mirroring(classes, len(spacing_mm))
        self.flip = config.flip

    def __call__(self, image: Tensor, label: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Change the patch; the same `seed` makes the same change."""
        self.transforms.set_random_state(seed=seed)
        was_tracking = get_track_meta()
        set_track_meta(False)
        try:
            patch = self.transforms({"image": image, "label": label[None].float()})
        finally:
            set_track_meta(was_tracking)
        image, label = patch["image"].float(), patch["label"][0].to(label.dtype)
        return self.mirroring.apply(image, label, self.mirroring.draw(self.flip, seed))


def _make_transforms(config: AugmentationConfig, spacing_mm: Sequence[float]) -> list[object]:
    """nnU-Net's set of changes in its order (Isensee 2021), each with its own probability."""
    dims = len(spacing_mm)
    return [
        RandAffined(
            keys=("image", "label"),
            prob=config.rotate,
            rotate_range=rotation_range(config.rotate_degrees, spacing_mm),
            # MONAI adds 1 to the drawn value and samples the patch at that many times its grid.
            scale_range=[(-config.scale, config.scale)] * dims,
            mode=("bilinear", "nearest"),
            # The same for both, or a structure that is continued outside would be background.
            padding_mode="border",
        ),
        RandGaussianNoised(keys="image", prob=config.noise, std=0.15),
        RandGaussianSmoothd(
            keys="image",
            prob=config.blur,
            **{f"sigma_{axis}": (0.4, 1.0) for axis in "xyz"[:dims]},
        ),
        RandScaleIntensityd(keys="image", prob=config.brightness, factors=0.25),
        RandScaleIntensityFixedMeand(
            keys="image", prob=config.contrast, factors=0.25, preserve_range=True
        ),
        RandSimulateLowResolutiond(
            keys="image",
            prob=config.low_resolution,
            upsample_mode="bilinear" if dims == 2 else "trilinear",
            zoom_range=(0.5, 1.0),
        ),
        RandAdjustContrastd(keys="image", prob=config.gamma, gamma=(0.7, 1.5), retain_stats=True),
    ]


def rotation_range(degrees: float, spacing_mm: Sequence[float]) -> list[float] | float:
    """Largest rotation in radians about each array axis (about the normal, in 2D).

    Rotation happens on the voxel grid. Turning a coarse axis into a fine one would shear the
    anatomy, so on anisotropic grids only the rotation about the coarse axis is left.
    """
    radians = math.radians(degrees)
    if len(spacing_mm) == 2:
        return radians
    is_coarse = [value >= COARSE_AXIS * min(spacing_mm) for value in spacing_mm]
    if not any(is_coarse):
        return [radians] * 3
    return [radians if coarse and sum(is_coarse) == 1 else 0.0 for coarse in is_coarse]
