"""A trained run as a MONAI bundle."""

from volseg.bundle.export import export_bundle
from volseg.bundle.transforms import ResampleToSpacingd

__all__ = ["ResampleToSpacingd", "export_bundle"]
