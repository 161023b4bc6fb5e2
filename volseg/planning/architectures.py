"""What the planner must know about each network, as numbers: it does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from volseg.errors import ConfigError
from volseg.extensions import check_name

SupervisionWeights = Literal["halving", "exp", "two", "same", "dsn"] | tuple[float, ...]


@dataclass(frozen=True)
class Architecture:
    """A network beside the planned U-Net with the same levels and widths.

    Attributes:
        operations: multiplications of one forward pass, as a multiple of the U-Net's.
        memory: feature maps that a training step keeps, as a multiple of the U-Net's. Both are
            counted (`volseg.networks.cost`) at usual depths and hold within a third.
        has_supervision: whether it can be supervised at several outputs in training.
        is_supervised: whether it is, if nobody says.
        supervision_weights: of the outputs in training, per number of outputs, where the source
            has others than halved ones; see `volseg.losses.MultiLevelLoss`.
        options: of the network's constructor, where a plan needs other than the default.
        variants: what an option of a certain value makes of `operations` and `memory`, as factors;
            listed where that is more than a fifth.
    """

    operations: float = 1.0
    memory: float = 1.0
    has_supervision: bool = False
    is_supervised: bool = False
    supervision_weights: Mapping[int, SupervisionWeights] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[tuple[str, Any], tuple[float, float]] = field(default_factory=dict)

    def scale(self, options: Mapping[str, Any]) -> tuple[float, float]:
        """`operations` and `memory` of the network with these options of its constructor."""
        operations, memory = self.operations, self.memory
        for (option, value), factors in self.variants.items():
            if option in options and options[option] == value:
                operations, memory = operations * factors[0], memory * factors[1]
        return operations, memory


_ENCODER_TAPS: Mapping[tuple[str, Any], tuple[float, float]] = {
    ("supervision", "encoder"): (1.25, 1.2)
}

# The sources' running statistics follow by a hundredth per step: too slow for a short training.
_QUICK = {"momentum": 0.1}

ARCHITECTURES = {
    "unet": Architecture(
        has_supervision=True,
        is_supervised=True,
        variants={("encoder", "residual"): (1.5, 1.2)},
    ),
    "unet_original": Architecture(1.0, 0.65),
    "unet_keras": Architecture(1.12, 0.96),
    "unet3d_original": Architecture(1.09, 1.04, has_supervision=True, variants=_ENCODER_TAPS),
    "unet3d_deep_supervision": Architecture(
        1.09, 1.04, has_supervision=True, is_supervised=True, variants=_ENCODER_TAPS
    ),
    "dsn3d": Architecture(
        0.55,
        0.6,
        has_supervision=True,
        is_supervised=True,
        supervision_weights={3: "dsn"},
    ),
    "unet_summed_logits": Architecture(1.45, 1.7),
    "unetplusplus": Architecture(
        3.3,
        3.6,
        has_supervision=True,
        is_supervised=True,
        supervision_weights={outputs: "same" for outputs in range(2, 17)},
        variants={("form", "keras"): (1.0, 0.8)},
    ),
    # Each ladder beyond the second adds as much again.
    "laddernet": Architecture(
        2.35,
        1.85,
        variants={("num_ladders", n): (0.55 * n - 0.1,) * 2 for n in range(3, 13)},
    ),
    # The stem of ImageNet divides by 4 before the first skip connection: too much for a volume.
    "resnet_unet": Architecture(
        1.6,
        1.2,
        options={
            "stem": "k3s1",
            "norm": ["batch", {"eps": 2e-5, **_QUICK}],
            "decoder_norm": ["batch", {"eps": 1e-3, **_QUICK}],
        },
        variants={("depth", 18): (0.75, 0.9), ("depth", 50): (1.1, 2.0)},
    ),
    "hypercolumn_unet": Architecture(
        3.6, 4.0, options={"norm": ["batch", {"eps": 1e-3, **_QUICK}]}
    ),
}


OWN = Architecture()
"""A network of the user's own: taken for the U-Net until its speed is measured."""


def find_architecture(name: str) -> Architecture:
    """Look a network up; `OWN` for one of the user's own.

    Raises:
        ConfigError: unknown name; the nearest one is offered.
    """
    check_name("networks", "network.name", name, ARCHITECTURES)
    return ARCHITECTURES.get(name, OWN)


def choose_supervision(name: str, wanted: bool | None) -> bool | None:
    """Whether a network is supervised at several outputs; None where it has only one.

    A network of the user's own is told what the user says, and nothing if nobody says.

    Raises:
        ConfigError: the user says so of a network that has one output.
    """
    architecture = find_architecture(name)
    if architecture is OWN:
        return wanted
    if architecture.has_supervision:
        return architecture.is_supervised if wanted is None else wanted
    if wanted:
        raise ConfigError(
            f"network.deep_supervision with network '{name}', which has a single output in "
            "training; expected none. Leave it out."
        )
    return None
