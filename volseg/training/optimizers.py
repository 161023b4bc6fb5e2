"""Which optimiser a network is trained by, and its learning rate from step to step."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from volseg.config import OptimizerConfig
from volseg.errors import ConfigError
from volseg.networks.layers import InstanceNorm
from volseg.training.muon import Muon

LEARNING_RATES = {"muon": 1e-2, "adamw": 3e-3, "sgd": 1e-2}
WEIGHT_DECAYS = {"muon": 0.3, "adamw": 1e-2, "sgd": 3e-5}
_NORMS = (InstanceNorm, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def choose_optimizer(config: OptimizerConfig, network: nn.Module) -> OptimizerConfig:
    """The same with an optimiser's name, rate and decay where they were left open.

    Steps of Muon's size need a normalisation behind them: without any, feature maps of a deep
    network grow from step to step until they leave the range of numbers. One module of
    normalisation, torch's or volseg's, is enough for a network to count as one that has it.

    Raises:
        ConfigError: a momentum was set, and the network is one for AdamW.
    """
    name = config.name if config.name != "auto" else _suit(network)
    if name == "adamw" and config.momentum is not None:
        raise ConfigError(
            f"optimizer.momentum {config.momentum:g} for a network without normalisation, which "
            "adamw trains; expected none. Leave it out, or set optimizer.name."
        )
    rate = config.learning_rate or LEARNING_RATES[name]
    decay = WEIGHT_DECAYS[name] if config.weight_decay is None else config.weight_decay
    settled = {"name": name, "learning_rate": rate, "weight_decay": decay}
    return config.model_copy(update=settled)


def _suit(network: nn.Module) -> str:
    has_norm = any(isinstance(module, _NORMS) for module in network.modules())
    return "muon" if has_norm else "adamw"


def make_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of all parameters that are not frozen, of what `choose_optimizer` gave."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    rate, decay, momentum = get_rate(config), _get_decay(config), config.momentum
    if config.name == "sgd":
        momentum = 0.99 if momentum is None else momentum
        return torch.optim.SGD(
            parameters, rate, momentum, weight_decay=decay, nesterov=momentum > 0
        )
    if config.name == "muon":
        return Muon(parameters, rate, 0.95 if momentum is None else momentum, decay)
    return torch.optim.AdamW(parameters, rate, weight_decay=decay)


def get_rate(config: OptimizerConfig) -> float:
    """The learning rate at the end of the warm-up, once it is chosen."""
    return _settled(config.learning_rate)


def _get_decay(config: OptimizerConfig) -> float:
    return _settled(config.weight_decay)


def _settled(value: float | None) -> float:
    if value is None:
        raise ValueError("expected a configuration that choose_optimizer gave.")
    return value


def learning_rate(config: OptimizerConfig, progress: float) -> float:
    """Linear warm-up, then polynomial decay to zero at the end (``progress`` 1).

    Args:
        config: what `choose_optimizer` gave.
        progress: share of the training that is done.
    """
    warmup = min(1.0, progress / config.warmup) if config.warmup > 0 else 1.0
    # The first step must not be idle: it takes the rate of a hundredth of the warm-up.
    return float(get_rate(config) * max(warmup, 0.01) * (1 - progress) ** config.power)
