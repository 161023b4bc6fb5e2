"""Begin with the weights of another model: the same network for other classes or channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from volseg.config import PlanConfig
from volseg.data.cases import Case, Classes, Dataset
from volseg.data.splits import read_splits
from volseg.errors import ConfigError, DataError
from volseg.inference.model import ModelFacts, find_weights, read_facts, trained_folds
from volseg.networks import build_network, choose_shape_device
from volseg.networks.weights import load_weights
from volseg.planning.plan import Plan
from volseg.run_folder import DATASET_FILE, SPLITS_FILE

_QUOTED = 5
"""Names of tensors that a line of the log has."""


@dataclass(frozen=True)
class TransferReport:
    """What became of the weights of another model.

    Attributes:
        source: the file.
        loaded: tensors that were taken as they are.
        adapted: tensors of which classes or channels were matched by name.
        fresh: tensors that the other model says nothing of.
        unused: tensors of the other model that have no place.
        new_classes: outputs that begin fresh.
        new_channels: inputs that begin with the mean of the other model's channels.
    """

    source: Path
    loaded: tuple[str, ...]
    adapted: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    new_classes: tuple[str, ...]
    new_channels: tuple[str, ...]

    def __str__(self) -> str:
        """One line for a log."""
        parts = [
            f"{len(self.loaded)} tensors loaded",
            f"{len(self.adapted)} matched by name",
            f"{len(self.fresh)} left as initialised{_quote(self.fresh)}",
            f"{len(self.unused)} not used{_quote(self.unused)}",
        ]
        for what, names in (("classes", self.new_classes), ("channels", self.new_channels)):
            if names:
                parts.append(f"new {what}: {', '.join(names)}")
        return f"weights from {self.source}: {'; '.join(parts)}"


def adapt_plan(plan: Plan, source: Path, fixed: PlanConfig | None = None) -> Plan:
    """What was planned for a dataset, with network, patch and spacing of the model `source`.

    Channels that both have keep the other model's normalisation.

    Args:
        plan: what was planned, with the values that the user fixed.
        source: a run folder or bundle.
        fixed: which values those are. What the weights do not depend on is kept: spacing, patch,
            batch and normalisation.

    Raises:
        ConfigError: `source` is no model, or for another number of spatial axes, or cannot have the
            fixed values.
    """
    other = read_facts(source).plan
    if other.spatial_dims != plan.spatial_dims:
        raise ConfigError(
            f"{source} is a model of {other.spatial_dims}D images; expected one of "
            f"{plan.spatial_dims}D, as the dataset."
        )
    said = set() if fixed is None else set(fixed.model_dump(exclude_none=True))
    known = {channel.channel: channel for channel in other.normalisation}
    if "normalisation" in said:
        known = {}
    normalisation = tuple(
        known.get(c.channel, c).model_copy(update={"optional": c.optional})
        for c in plan.normalisation
    )
    kept = {key: getattr(plan, key) for key in said & {"spacing_mm", "patch", "batch_size"}}
    adapted = other.model_copy(update={"normalisation": normalisation, **kept})
    return Plan.parse(adapted.model_dump(mode="json"), f"plan of {source} with your values")


def _quote(names: Sequence[str]) -> str:
    """The first of some names, in brackets; nothing where there is none."""
    if not names:
        return ""
    more = ", ..." if len(names) > _QUOTED else ""
    return f" ({', '.join(names[:_QUOTED])}{more})"


def transfer_weights(
    network: nn.Module, plan: Plan, classes: Classes, source: Path, fold: int = 0
) -> TransferReport:
    """Copy into `network` what fits from the model `source`, by name and shape.

    Heads are copied class by class and first convolutions channel by channel, each by its name.

    Args:
        network: built from `plan`; changed in place.
        plan: of the training.
        classes: of the training.
        source: a run folder or bundle.
        fold: that is trained. Of a run its own fold of this number is taken, if it was trained,
            else the first that was.

    Raises:
        ConfigError: `source` is no model, or nothing of it fits.
        DataError: its weights are damaged.
    """
    facts, path = read_facts(source), _find_source(source, fold)
    state = load_weights(path, mapped=True)
    theirs: dict[str, Tensor] = state.get("network", state)
    ours = network.state_dict()
    axes = _find_named_axes(plan, classes)
    loaded, adapted = [], []
    with torch.no_grad():
        for name, tensor in ours.items():
            if name not in theirs:
                continue
            if name in axes and _fits(tensor, theirs[name], axes[name][1]):
                _copy_by_name(tensor, theirs[name], *_names(axes[name], plan, classes, facts))
                adapted.append(name)
            elif tensor.shape == theirs[name].shape:
                tensor.copy_(theirs[name])
                loaded.append(name)
    if not loaded:
        raise ConfigError(
            f"no tensor of {path} fits the planned network; expected a model of the same network. "
            "Leave plan and network to it, or train without."
        )
    taken = {*loaded, *adapted}
    return TransferReport(
        path,
        tuple(loaded),
        tuple(adapted),
        fresh=tuple(name for name in ours if name not in taken),
        unused=tuple(name for name in theirs if name not in taken),
        new_classes=_list_new(classes, facts.classes),
        new_channels=_missing(plan.channel_names, facts.plan.channel_names),
    )


def count_seen(source: Path, fold: int, cases: Sequence[Case]) -> int | None:
    """How many cases the weights that `transfer_weights` takes were trained on.

    A case is known by where its images are.

    Args:
        source: a run folder or bundle.
        fold: that is trained.
        cases: that are to validate.

    Returns:
        None if the source does not say.
    """
    number = _find_source(source, fold).parent.name.removeprefix("fold_")
    try:
        dataset = Dataset.read_json(source / DATASET_FILE)
        trained = set(read_splits(source / SPLITS_FILE, dataset.cases)[int(number)].train)
    except (ConfigError, DataError, ValueError, IndexError):
        # A bundle, or splits that were edited since.
        return None
    seen = {_locate(case) for case in dataset.cases if case.case_id in trained}
    return sum(_locate(case) in seen for case in cases)


def _locate(case: Case) -> tuple[Path, ...]:
    return tuple(path.resolve() for path in case.files)


def _find_source(source: Path, fold: int) -> Path:
    """The weights of a model: of a run those of the same fold, if there are any."""
    return find_weights(source, (fold,) if fold in trained_folds(source) else None)[0]


def _missing(names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in known)


def _find_named_axes(plan: Plan, classes: Classes) -> dict[str, tuple[str, int]]:
    """Tensors with an axis of classes or of channels: what differs where there is one more."""
    inputs, outputs = len(plan.normalisation), classes.num_outputs

    def shapes(in_channels: int, out_channels: int) -> dict[str, torch.Size]:
        with choose_shape_device(plan.network.name):
            network = build_network(
                plan.network.name,
                spatial_dims=plan.spatial_dims,
                in_channels=in_channels,
                out_channels=out_channels,
                **plan.network.keywords(),
            )
        return {name: tensor.shape for name, tensor in network.state_dict().items()}

    usual = shapes(inputs, outputs)
    others = {"class": shapes(inputs, outputs + 1), "channel": shapes(inputs + 1, outputs)}
    return {
        name: (kind, axis)
        for name, shape in usual.items()
        for kind, other in others.items()
        for axis, size in enumerate(shape)
        if size != other[name][axis]
    }


def _match_names(classes: Classes) -> tuple[str, ...]:
    """Outputs by the name under which they are matched: the background has many, capitals any."""
    names = tuple(name.casefold() for name in classes.output_names)
    if len(set(names)) < len(names):
        names = classes.output_names
    return names if classes.regions else ("background", *names[1:])


def _list_new(classes: Classes, known: Classes) -> tuple[str, ...]:
    """Names of the outputs that another model has not."""
    pairs = zip(classes.output_names, _match_names(classes), strict=True)
    return tuple(name for name, matched in pairs if matched not in _match_names(known))


def _fits(ours: Tensor, theirs: Tensor, axis: int) -> bool:
    """Whether both have the same shape but for one axis."""
    shapes = [[n for i, n in enumerate(t.shape) if i != axis] for t in (ours, theirs)]
    return ours.dim() == theirs.dim() and shapes[0] == shapes[1]


def _names(
    axis: tuple[str, int], plan: Plan, classes: Classes, facts: ModelFacts
) -> tuple[int, Sequence[str], Sequence[str], bool]:
    """The axis, its names here and there, and whether a new one begins with the mean."""
    if axis[0] == "class":
        return axis[1], _match_names(classes), _match_names(facts.classes), False
    return axis[1], plan.channel_names, facts.plan.channel_names, True


def _copy_by_name(
    ours: Tensor,
    theirs: Tensor,
    axis: int,
    names: Sequence[str],
    known: Sequence[str],
    takes_mean: bool,
) -> None:
    for index, name in enumerate(names):
        if name in known:
            ours.select(axis, index).copy_(theirs.select(axis, list(known).index(name)))
        elif takes_mean:
            ours.select(axis, index).copy_(theirs.mean(axis))


def freeze(network: nn.Module, parts: Sequence[str]) -> None:
    """Keep some parts as they are: weights, and running statistics of their normalisation.

    Args:
        network: in training mode. Where it is frozen its parameters no longer need a gradient, and
            norms that have running statistics use those and leave them, in eval mode.
        parts: names, or beginnings of names, of modules or parameters, as in ``encoder``.

    Raises:
        ConfigError: nothing has such a name, or nothing is left to train.
    """
    for part in parts:
        found = [
            parameter
            for name, parameter in network.named_parameters()
            if name == part or name.startswith(f"{part}.")
        ]
        if not found:
            top = ", ".join(name for name, _ in network.named_children())
            raise ConfigError(
                f"optimizer.freeze '{part}'; expected the name of a part of the network, such as "
                f"{top}, or of one inside it."
            )
        for parameter in found:
            parameter.requires_grad_(False)
        for name, module in network.named_modules():
            is_inside = name == part or name.startswith(f"{part}.")
            if is_inside and getattr(module, "running_mean", None) is not None:
                module.eval()
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ConfigError(f"optimizer.freeze {list(parts)} leaves nothing to train. Shorten it.")
