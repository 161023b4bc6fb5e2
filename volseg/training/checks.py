"""What a training refuses before anything is prepared for it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from volseg.config import Config, LossConfig
from volseg.data.cases import Classes
from volseg.data.splits import Split
from volseg.errors import ConfigError
from volseg.extensions import find
from volseg.inference.model import build_planned_network
from volseg.networks import (
    OwnNetwork,
    ResNetUNet,
    SegmentationNetwork,
    choose_shape_device,
    inside_slices,
)
from volseg.networks.own import LEVELS, list_keywords
from volseg.networks.pretrained import load_resnet
from volseg.networks.resnet_unet import BLOCKS
from volseg.planning import Plan
from volseg.training.loss import make_loss
from volseg.training.optimizers import choose_optimizer
from volseg.training.transfer import freeze, transfer_weights

logger = logging.getLogger(__name__)


def check_training(plan: Plan, config: Config, classes: Classes) -> None:
    """Refuse what a new training cannot follow, before anything is prepared for it.

    Raises:
        ConfigError: the network refuses its options or the patch, or cannot be supervised or begin
            as the configuration says, or mirroring is said for another number of axes.
        DataError: the pretrained weights do not fit.
    """
    network = check_network(plan, classes)
    if isinstance(network, OwnNetwork):
        check_own_network(plan.network.name, config)
    check_supervision(network, plan, config.loss, classes)
    config.augmentation.flips(plan.spatial_dims)
    choose_optimizer(config.optimizer, network)
    freeze(network, config.optimizer.freeze)
    if config.training.start_from is not None:
        transfer_weights(network, plan, classes, Path(config.training.start_from))
    if config.network.pretrained is not None:
        check_pretrained(network, config.network.pretrained, plan.network.name)


def check_patience(patience: int | None, num_rounds: int) -> None:
    """Refuse a patience that would never come to its end.

    Raises:
        ConfigError: there are too few rounds, each of which can validate once, the first of them
            never worse than before.
    """
    if patience is not None and patience + 1 >= num_rounds:
        raise ConfigError(
            f"training.patience {patience} of a training that can validate {num_rounds} times; "
            f"expected less than {num_rounds - 1}. Lower it, or leave it out."
        )


def check_validation(patience: int | None, split: Split, fold: int) -> None:
    """Refuse a patience in a fold without a case that it could go by.

    Raises:
        ConfigError: so it is.
    """
    if patience is not None and not split.validation:
        raise ConfigError(
            f"training.patience without a validation case in fold {fold}; expected one at least. "
            "Leave it out."
        )


def check_network(plan: Plan, classes: Classes) -> SegmentationNetwork:
    """The planned network in eval mode, if it takes the planned patch; volseg's without values.

    Raises:
        ConfigError: the network refuses an option or the patch, or gives another size than the
            patch's.
    """
    with choose_shape_device(plan.network.name):
        network = build_planned_network(plan, classes.num_outputs).eval()
        if isinstance(network, OwnNetwork):
            network.find_outputs(plan.patch)
            return network
        size = network(torch.zeros(1, network.in_channels, *plan.patch)).shape[2:]
    if tuple(size) != plan.patch:
        raise ConfigError(
            f"network '{plan.network.name}' turns a patch of {plan.patch} into {tuple(size)}; "
            "expected the same size. Leave out its options for unpadded or cropped features."
        )
    return network


def check_own_network(name: str, config: Config) -> None:
    """Refuse settings that a network of the user's own does not follow, and say what it ignores.

    Raises:
        ConfigError: widths for a network that does not ask for them, or recomputation.
    """
    if config.training.recompute:
        raise ConfigError(
            f"training.recompute with network '{name}', which is your own; expected one of "
            "volseg's, whose blocks it knows. Leave it out."
        )
    known = list_keywords(find("networks", name))
    unused = [] if known is None else [level for level in LEVELS if level not in known]
    fixed = [key for key in ("width", "pocket") if getattr(config.plan, key) is not None]
    if fixed and "channels" in unused:
        raise ConfigError(
            f"plan.{fixed[0]} with network '{name}', which does not ask for channels. Leave it out."
        )
    if unused:
        logger.info(
            "network %s does not ask for %s: those of the plan count for its estimated cost alone",
            name,
            ", ".join(unused),
        )


def check_supervision(
    network: SegmentationNetwork, plan: Plan, config: LossConfig, classes: Classes
) -> None:
    """Refuse a loss that cannot be made, or settings that the network has no use for.

    Raises:
        ConfigError: it has a single output, outputs at full resolution only, or another number of
            them than weights.
    """
    strides, name = network.supervision_strides, plan.network.name
    changed = {
        key
        for key, value in config.model_dump().items()
        if key.startswith("supervision_") and value != getattr(LossConfig(), key)
    }
    if len(strides) == 1 and changed:
        raise ConfigError(
            f"loss.{min(changed)} with network '{name}', which has a single output in training. "
            "Leave it out."
        )
    idle = changed & {"supervision_target", "supervision_resolution"}
    if idle and all(set(stride) == {1} for stride in strides):
        raise ConfigError(
            f"loss.{min(idle)} with network '{name}', whose outputs in training all have full "
            "resolution. Leave it out."
        )
    if classes.candidates and config.supervision_target != "nearest-exact":
        raise ConfigError(
            f"loss.supervision_target '{config.supervision_target}' with voxels of unknown class; "
            "expected 'nearest-exact'. Leave it out."
        )
    loss = make_loss(config, name, len(strides), classes, plan.spacing_mm)
    if len(strides) > 1:
        try:
            loss.check_outputs(len(strides))
        except ConfigError as error:
            raise ConfigError(f"loss.supervision_weights: {error}") from error


def check_pretrained(network: SegmentationNetwork, path: str, name: str) -> None:
    """Refuse pretrained weights where they cannot be taken over.

    Raises:
        ConfigError: another network, or no such file.
        DataError: the file cannot be read or does not fit.
    """
    network = inside_slices(network)
    if not isinstance(network, ResNetUNet):
        raise ConfigError(
            f"network.pretrained with network '{name}'; expected 'resnet_unet', which alone takes "
            "pretrained weights. Leave it out."
        )
    if not Path(path).is_file():
        raise ConfigError(f"network.pretrained {path} does not exist; expected a state dict.")
    load_resnet(network, Path(path), BLOCKS[network.depth])
