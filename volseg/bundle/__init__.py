"""A trained run as a MONAI bundle."""

from volseg.bundle.export import export_bundle

__all__ = ["export_bundle"]
