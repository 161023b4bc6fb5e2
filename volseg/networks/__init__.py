"""Networks for 2D and 3D segmentation; each can be used without the rest of volseg.

`build_network` builds one by name. Every network is a `SegmentationNetwork`: image in, logits out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from volseg.errors import ConfigError, check_choice
from volseg.extensions import check_name, find
from volseg.networks.dsn3d import DeeplySupervisedNet
from volseg.networks.hypercolumn_unet import HypercolumnUNet
from volseg.networks.laddernet import LadderNet
from volseg.networks.layers import prefer_speed_
from volseg.networks.network import SegmentationNetwork
from volseg.networks.own import FACTS, OwnNetwork, build_own_network
from volseg.networks.resnet_unet import ResNetUNet
from volseg.networks.slices import SliceNetwork, drop_axis, inside_slices
from volseg.networks.supervision import strip_supervision
from volseg.networks.unet import UNet
from volseg.networks.unet3d import UNet3d
from volseg.networks.unet_original import OriginalUNet
from volseg.networks.unet_summed_logits import SummedLogitsUNet
from volseg.networks.unetplusplus import UNetPlusPlus

__all__ = [
    "DeeplySupervisedNet",
    "HypercolumnUNet",
    "LadderNet",
    "OriginalUNet",
    "OwnNetwork",
    "ResNetUNet",
    "SegmentationNetwork",
    "SliceNetwork",
    "SummedLogitsUNet",
    "UNet",
    "UNet3d",
    "UNetPlusPlus",
    "build_network",
    "build_own_network",
    "choose_shape_device",
    "inside_slices",
    "list_networks",
    "list_options",
    "prefer_speed_",
    "strip_supervision",
]


@dataclass(frozen=True)
class Preset:
    """A name that people type: a class, the options that make it that network, its source."""

    network: type[SegmentationNetwork]
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)


PRESETS = {
    "unet": Preset(UNet, "Ronneberger 2015; Isensee 2021, 2024"),
    "unet_original": Preset(OriginalUNet, "Ronneberger 2015"),
    "unet_keras": Preset(
        OriginalUNet,
        "Ronneberger 2015, a Keras form",
        {"upsampling": "nearest", "skip_first": True, "dropout": 0.5},
    ),
    "unet3d_original": Preset(UNet3d, "Cicek 2016"),
    "unet3d_deep_supervision": Preset(UNet3d, "Zeng 2017; Dou 2017", {"deep_supervision": True}),
    "dsn3d": Preset(DeeplySupervisedNet, "Dou 2016, 2017"),
    "unet_summed_logits": Preset(SummedLogitsUNet, "Kayalibay 2017; Isensee 2018"),
    "unetplusplus": Preset(UNetPlusPlus, "Zhou 2018"),
    "laddernet": Preset(LadderNet, "Zhuang 2018"),
    "resnet_unet": Preset(ResNetUNet, "He 2016; Iakubovskii 2019"),
    "hypercolumn_unet": Preset(HypercolumnUNet, "Hariharan 2015; a Keras form, 2018"),
}


def list_networks() -> list[str]:
    """Names of volseg's own networks; `build_network` knows the user's too."""
    return list(PRESETS)


def build_network(
    name: str,
    *,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    slice_axis: int | None = None,
    **options: Any,
) -> SegmentationNetwork:
    """Build a network by name.

    Args:
        name: one of `list_networks`, or of the user's own (`volseg.extensions`).
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: classes, background counted.
        slice_axis: of volumes whose slices along this spatial axis a 2D network shall see; see
            `SliceNetwork`. Strides and kernels per axis are then 1 there.
        options: keywords of the network's own constructor.

    Raises:
        ConfigError: unknown name or option, or a value that the network refuses.

    >>> build_network("unet", spatial_dims=3, in_channels=1, out_channels=2).divisor
    (16, 16, 16)
    """
    check_name("networks", "network", name, PRESETS)
    if name not in PRESETS:
        if slice_axis is not None:
            raise ConfigError(
                f"network '{name}' is your own and cannot be shown slices; expected one of "
                f"{', '.join(PRESETS)}. Leave plan.slices out."
            )
        facts = dict(zip(FACTS, (spatial_dims, in_channels, out_channels), strict=True))
        return build_own_network(find("networks", name), **facts, **options)
    preset = PRESETS[name]
    known = list_options(name)
    for option in options:
        check_choice(f"option of network '{name}'", option, known)
    chosen = {**preset.options, **options}
    if slice_axis is None:
        return preset.network(spatial_dims, in_channels, out_channels, **chosen)
    if spatial_dims != 3:
        raise ConfigError(f"slice_axis with spatial_dims {spatial_dims}; expected volumes (3).")
    chosen = drop_axis(chosen, slice_axis)
    return SliceNetwork(preset.network(2, in_channels, out_channels, **chosen), slice_axis)


def list_options(name: str) -> list[str]:
    """Keywords that one of volseg's networks takes besides those of `build_network`."""
    check_choice("network", name, PRESETS)
    parameters = inspect.signature(PRESETS[name].network).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def choose_shape_device(name: str) -> torch.device:
    """Where to build a network of which only shapes are asked.

    Volseg's own need no values (``meta``); a constructor of the user's own may compute with them.
    """
    return torch.device("meta" if name in PRESETS else "cpu")
