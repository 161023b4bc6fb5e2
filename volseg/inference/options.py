"""How a loaded model predicts: plain data, which may travel to other machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from volseg.errors import ConfigError, check_choice
from volseg.inference.backends import BackendName
from volseg.inference.precision import PrecisionName


@dataclass(frozen=True)
class Options:
    """What a user may choose besides the model.

    Attributes:
        mirror: average over mirror images, up to eight times the work. For a model that was trained
            with them (``augmentation.flip``); left and right are kept apart.
        step: from window to window, as a share of the window; half of it by default.
        largest: names of the classes of which only the largest connected part is kept; ``all``
            stands for every one.
        least_ml: by name of the class, or ``all``, the volume that a connected part needs.
        backend: what computes the network; see `volseg.inference.backends.prepare_backend`.
        precision: ``auto`` computes the network in 16 bits where the hardware gains by them and
            the labels of noise stay the same; ``float32`` never.
        memory_gb: what this process may take in all; by default what is free. Images then go one by
            one, whoever calls.
    """

    mirror: bool = False
    step: float = 0.5
    largest: tuple[str, ...] = ()
    least_ml: Mapping[str, float] = field(default_factory=dict)
    backend: BackendName = "torch"
    precision: PrecisionName = "auto"
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        check_choice("backend", self.backend, get_args(BackendName))
        # A 16-bit format by name could not follow the model to a machine without it.
        check_choice("precision", self.precision, get_args(PrecisionName))
        if not 0 < self.step <= 1:
            raise ConfigError(f"a step of {self.step:g} windows; expected above 0 and at most 1.")
        if self.memory_gb is not None and not self.memory_gb > 0:
            raise ConfigError(f"memory of {self.memory_gb:g} GB; expected more than 0.")

    def describe(self) -> dict[str, Any]:
        """Those that decide the labels."""
        return {
            "mirror": self.mirror,
            "step": self.step,
            "precision": self.precision,
            "largest": list(self.largest),
            "least_ml": dict(sorted(self.least_ml.items())),
        }
