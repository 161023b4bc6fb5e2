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
_NORMS = (InstanceNorm, _NormBase, nn.GroupNorm, nn.LayerNorm)


def choose_optimizer(config: OptimizerConfig, network: nn.Module) -> OptimizerConfig:
    """The same with the name of an optimiser where it was left open.

    Steps of Muon's size need a normalisation behind them: without any, feature maps of a deep
    network grow from step to step until they leave the range of numbers.

    Raises:
        ConfigError: a momentum was set, and the network is one for AdamW.
    """
    if config.name != "auto":
        return config
    if any(isinstance(module, _NORMS) for module in network.modules()):
        return config.model_copy(update={"name": "muon"})
    if config.momentum is not None:
        raise ConfigError(
            f"optimizer.momentum {config.momentum:g} for a network without normalisation, which "
            "adamw trains; expected none. Leave it out, or set optimizer.name."
        )
    return config.model_copy(update={"name": "adamw"})


def make_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of all parameters that are not frozen, by its name."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    rate, decay, momentum = largest_rate(config), config.weight_decay, config.momentum
    if config.name == "sgd":
        momentum = 0.99 if momentum is None else momentum
        return torch.optim.SGD(
            parameters, rate, momentum, weight_decay=decay, nesterov=momentum > 0
        )
    if config.name == "muon":
        return Muon(parameters, rate, 0.95 if momentum is None else momentum, decay)
    return torch.optim.AdamW(parameters, rate, weight_decay=decay)


def largest_rate(config: OptimizerConfig) -> float:
    """The learning rate at the end of the warm-up."""
    return config.learning_rate or LEARNING_RATES[config.name]


def learning_rate(config: OptimizerConfig, progress: float) -> float:
    """Linear warm-up, then polynomial decay to zero at the end (``progress`` 1)."""
    warmup = min(1.0, progress / config.warmup) if config.warmup > 0 else 1.0
    # The first step must not be idle: it takes the rate of a hundredth of the warm-up.
    return float(largest_rate(config) * max(warmup, 0.01) * (1 - progress) ** config.power)
