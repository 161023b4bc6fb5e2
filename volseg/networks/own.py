"""A network of the user's own, with the promises of volseg's around it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from volseg.errors import ConfigError
from volseg.networks.network import SegmentationNetwork

LEVELS = ("channels", "strides", "kernel_sizes")
"""What a plan says of every level; a function that does not ask for it does not get it."""
FACTS = ("spatial_dims", "in_channels", "out_channels")


class OwnNetwork(SegmentationNetwork):
    """Any module that turns images into logits.

    The module gives a tensor ``(B, out_channels, *S)``, or a list of them with the one at full
    resolution first and the others from fine to coarse: all of them train, the first one predicts.

    Attributes:
        network: the module.
    """

    def __init__(
        self, network: nn.Module, spatial_dims: int, in_channels: int, out_channels: int
    ) -> None:
        """Wrap a module.

        Args:
            network: the module.
            spatial_dims: 2 or 3.
            in_channels: channels of the image.
            out_channels: classes, background counted.
        """
        ones = (1,) * spatial_dims
        super().__init__(spatial_dims, in_channels, out_channels, total_stride=ones, norm="none")
        self.network = network
        self.deep_supervision = True

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Turn (B, in_channels, *S) into logits; a list of them in training if there are several.

        Raises:
            ConfigError: the input does not fit, or the module gives something else.
        """
        self.check_input(x)
        output = self.network(x)
        outputs = list(output) if isinstance(output, (list, tuple)) else [output]
        if not outputs or not all(isinstance(logits, torch.Tensor) for logits in outputs):
            raise ConfigError(
                f"{type(self.network).__name__} gives a {type(output).__name__}; expected a tensor "
                "of logits, or a list of them."
            )
        is_supervised = self.training and self.deep_supervision and len(outputs) > 1
        return outputs if is_supervised else outputs[0]

    def find_outputs(self, size: Sequence[int]) -> None:
        """Run the module on zeros, and keep at which resolution it gives logits in training.

        Args:
            size: of the patch, voxels per axis.

        Raises:
            ConfigError: the module cannot take the patch, or gives logits of a wrong shape.
        """
        shadow = copy.deepcopy(self)
        name = type(self.network).__name__
        try:
            # Neither weights nor random numbers of the training may depend on this.
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                trained = shadow.train()(torch.zeros(2, self.in_channels, *size))
                predicted = shadow.eval()(torch.zeros(1, self.in_channels, *size))
        except ConfigError:
            raise
        except Exception as error:  # Code of others fails in its own ways.
            raise ConfigError(
                f"{name} cannot take a patch of {tuple(size)} ({type(error).__name__}: {error}). "
                "Set plan.patch to a size that it takes; --debug shows where it fails."
            ) from error
        outputs = [trained] if isinstance(trained, torch.Tensor) else trained
        for place, logits in enumerate(outputs):
            self._check_logits(logits, 2, size, is_main=place == 0)
        self._check_logits(predicted, 1, size, is_main=True)
        self.supervision_strides = tuple(
            tuple(n // m for n, m in zip(size, logits.shape[2:], strict=True)) for logits in outputs
        )

    def _check_logits(
        self, logits: torch.Tensor, batch: int, size: Sequence[int], is_main: bool
    ) -> None:
        expected = (batch, self.out_channels, *size)
        fits = logits.dim() == len(expected) and logits.shape[:2] == expected[:2]
        if fits:
            fits = all(m and n % m == 0 for n, m in zip(size, logits.shape[2:], strict=True))
        if not fits or (is_main and logits.shape != expected):
            rule = "" if is_main else " or a whole fraction of its size"
            raise ConfigError(
                f"{type(self.network).__name__} turns a patch of {tuple(size)} into "
                f"{tuple(logits.shape)}; expected logits of {expected}{rule}."
            )


def build_own_network(
    make: Callable[..., nn.Module],
    *,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    **options: Any,
) -> OwnNetwork:
    """Build a network of your own.

    Args:
        make: a function or class that takes `spatial_dims`, `in_channels` and `out_channels` as
            keywords, and any of `options`. Of ``channels``, ``strides`` and ``kernel_sizes`` it
            gets those that it asks for by name.
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: classes, background counted.
        options: further keywords.

    Raises:
        ConfigError: an option that `make` does not take, or `make` fails.
    """
    name = getattr(make, "__name__", repr(make))
    known = list_keywords(make)
    strange = [] if known is None else [o for o in options if o not in known and o not in LEVELS]
    if strange:
        words = ", ".join(known or [])
        raise ConfigError(f"'{strange[0]}' for {name}; expected one of its keywords: {words}.")
    taken = {o: value for o, value in options.items() if known is None or o in known}
    facts = dict(zip(FACTS, (spatial_dims, in_channels, out_channels), strict=True))
    try:
        network = make(**facts, **taken)
    except ConfigError:
        raise
    except Exception as error:  # Code of others fails in its own ways.
        raise ConfigError(
            f"{name} cannot build its network ({type(error).__name__}: {error}). It is called with "
            f"{', '.join([*facts, *taken])} as keywords; --debug shows where it fails."
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{name} gives a {type(network).__name__}; expected a torch.nn.Module.")
    return OwnNetwork(network, spatial_dims, in_channels, out_channels)


def list_keywords(make: Callable[..., Any]) -> list[str] | None:
    """Keywords that a function or class takes; None if it takes any, or does not say."""
    try:
        parameters = inspect.signature(make).parameters.values()
    except ValueError:
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY]
