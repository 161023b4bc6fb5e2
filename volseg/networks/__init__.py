"""Networks for 2D and 3D segmentation; each can be used without the rest of volseg.

`build_network` builds one by name. Every network is a `SegmentationNetwork`: image in, logits out.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from volseg.errors import ConfigError
from volseg.networks.network import SegmentationNetwork
from volseg.networks.unet import UNet

__all__ = ["SegmentationNetwork", "UNet", "build_network", "list_networks"]

_NETWORKS: dict[str, type[SegmentationNetwork]] = {"unet": UNet}


def list_networks() -> list[str]:
    """Names that `build_network` knows."""
    return list(_NETWORKS)


def build_network(
    name: str, *, spatial_dims: int, in_channels: int, out_channels: int, **options: Any
) -> SegmentationNetwork:
    """Build a network by name.

    Args:
        name: one of `list_networks`.
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: classes, background counted.
        options: keywords of the network's own constructor.

    Raises:
        ConfigError: unknown name or option, or a value that the network refuses.

    >>> build_network("unet", spatial_dims=3, in_channels=1, out_channels=2).divisor
    (16, 16, 16)
    """
    if name not in _NETWORKS:
        raise ConfigError(f"network '{name}'; {_suggest(name, list_networks())}")
    network = _NETWORKS[name]
    known = [
        parameter.name
        for parameter in inspect.signature(network).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for option in options:
        if option not in known:
            raise ConfigError(f"option '{option}' of network '{name}'; {_suggest(option, known)}")
    return network(spatial_dims, in_channels, out_channels, **options)


def _suggest(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    return f"expected one of {', '.join(known)}.{hint}"
