"""The values that people write or read on disk: frozen, typed, refused by name when wrong.

`Record` is the base of every value that volseg stores as JSON or YAML. `Config` is what a user may
set for a training, from a YAML file and ``--set key=value``.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from volseg.atomic import write_json
from volseg.errors import ConfigError, VolsegError

RecordT = TypeVar("RecordT", bound="Record")


class Record(BaseModel):
    """A frozen value with a fixed set of keys; unknown keys are refused with the nearest name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(
        cls: type[RecordT], data: Any, source: str, error: type[VolsegError] = ConfigError
    ) -> RecordT:
        """Build from plain `data`; `source` (a file name) and the key lead every message.

        Raises:
            VolsegError: of the class `error`, naming the first wrong key and its rule.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as invalid:
            raise error(f"{source}: {_explain(cls, invalid)}") from invalid

    @classmethod
    def read_json(
        cls: type[RecordT], path: Path, error: type[VolsegError] = ConfigError
    ) -> RecordT:
        """Read a JSON file that `write_json` wrote."""
        return cls.parse(_load(path, json.loads, "JSON", error), str(path), error)

    @classmethod
    def read_yaml(
        cls: type[RecordT], path: Path, error: type[VolsegError] = ConfigError
    ) -> RecordT:
        """Read a YAML file of plain values (no tags, no code)."""
        return cls.parse(_load(path, parse_yaml, "YAML", error) or {}, str(path), error)

    def write_json(self, path: Path) -> None:
        """Write to `path`, whole or not at all."""
        write_json(path, self.model_dump(mode="json"))


class _Loader(yaml.SafeLoader):
    """Takes ``1e-5`` for a number, as YAML 1.2 does; YAML 1.1 asks for ``1.0e-5``."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for a number."""


for _kind in (_Loader, _Dumper):
    _number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _number, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """Plain values (no tags, no code) of YAML text.

    Raises:
        yaml.YAMLError: it is none.
    """
    return yaml.load(text, Loader=_Loader)


def _load(path: Path, parse: Any, kind: str, error: type[VolsegError]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist; expected a {kind} file.") from None
    except OSError as unreadable:
        raise error(f"{path} cannot be read ({unreadable.strerror}).") from unreadable
    except (ValueError, yaml.YAMLError) as invalid:
        reason = " ".join(str(invalid).split())
        raise error(f"{path} is not valid {kind}: {reason}.") from invalid


def _explain(cls: type[BaseModel], invalid: ValidationError) -> str:
    """The first error as one line: key, what it got, the rule or the nearest known key."""
    first = invalid.errors()[0]
    location = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = [*_keys(cls)]
        near = difflib.get_close_matches(location, known, n=1, cutoff=0.4)
        hint = f"Did you mean '{near[0]}'?" if near else f"Known keys: {', '.join(known)}."
        return f"unknown key '{location}'. {hint}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "missing":
        return f"key '{location}' is missing."
    return f"{location}: {message} (got {first['input']!r})." if location else f"{message}."


def _keys(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a record, sections and their members."""
    for name, field in cls.model_fields.items():
        yield prefix + name
        members = (
            typing.get_args(field.annotation)
            if isinstance(field.annotation, types.UnionType)
            else (field.annotation,)
        )
        for member in members:
            if isinstance(member, type) and issubclass(member, BaseModel):
                yield from _keys(member, f"{prefix}{name}.")


Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class DataConfig(Record):
    """What the user says about labels and channels, beside what the dataset declares."""

    regions: dict[str, tuple[int, ...]] | None = None
    """Label values of unions of classes that are segmented as a whole and may overlap, by name;
    {} for none where the dataset declares some."""
    ignore_label: int | None = None
    """Value of voxels that were not annotated: no loss, no score."""
    optional_channels: tuple[str, ...] = ()
    """Channels that a case may lack, by name; empty cells of a datalist make theirs optional."""


class PlanConfig(Record):
    """What the user fixes of the plan; anything left out is chosen by the planner."""

    slices: bool | None = None
    """A 2D network on the slices of volumes, which are never resampled across; for thick slices."""
    spacing_mm: tuple[Positive, ...] | None = None
    """Voxel size the network sees, canonical axis order (right, anterior, superior)."""
    patch: tuple[Annotated[int, Field(gt=0)], ...] | None = None
    """Training crop and prediction window in voxels, canonical axis order; 1 across slices."""
    batch_size: Annotated[int, Field(gt=0)] | None = None
    width: Annotated[int, Field(gt=0)] | None = None
    """Feature maps at the finest level; doubled at each coarser one."""
    pocket: bool | None = None
    """The same number of feature maps at every level (PocketNet) instead of twice as many."""
    num_levels: Annotated[int, Field(ge=2)] | None = None
    """At most; a small patch has fewer."""
    normalisation: Literal["ct", "zscore"] | None = None
    """For every channel; by default from the channel's name and its values."""


class NetworkConfig(Record):
    """Which network, and whether it is supervised at several outputs in training."""

    name: str = "unet"
    """One of `volseg networks`, or your own."""
    deep_supervision: bool | None = None
    """By default as the network's source has it."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keywords of the network's constructor, as in ``network.options.num_ladders=3``."""
    pretrained: str | None = None
    """File with weights to begin with, for a network that can take them over."""


class LossConfig(Record):
    """Which loss, and how the outputs in training are supervised."""

    name: str = "dice_ce"
    """One of `volseg.losses.list_losses`, or your own."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keywords of the loss."""
    dice_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of ``dice_ce``."""
    cross_entropy_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of ``dice_ce``."""
    boundary: str | None = None
    """A second term, on the main output: one of `volseg.losses.list_boundary_terms`."""
    boundary_options: dict[str, Any] = Field(default_factory=dict)
    """Keywords of the second term."""
    boundary_weight: Positive = 1.0
    """Of the second term, at the end of the training."""
    boundary_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the weight of the second term gets there."""
    supervision_weights: (
        Literal["halving", "exp", "two", "same", "dsn"]
        | tuple[Annotated[float, Field(ge=0)], ...]
        | None
    ) = None
    """A rule, or one weight per output, main output first; see `volseg.losses.MultiLevelLoss`. By
    default equal for ``unetplusplus``, ``dsn`` for ``dsn3d`` with three outputs, else halved."""
    supervision_target: Literal["nearest-exact", "area", "max"] = "nearest-exact"
    """How the labels are brought to a coarser output."""
    supervision_resolution: Literal["native", "full"] = "native"
    """Whether labels go to the resolution of an output, or outputs to the labels'."""
    supervision_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """What is left at the end of the training of all weights but the main output's."""


class OptimizerConfig(Record):
    """Warm-up and polynomial decay over the real length of the training."""

    name: Literal["auto", "muon", "adamw", "sgd"] = "auto"
    """Muon (`volseg.training.muon`), AdamW, or stochastic gradient descent by Nesterov. By default
    Muon, and AdamW for a network without normalisation."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of Muon (0.95 by default) and of stochastic gradient descent (0.99)."""
    learning_rate: Positive | None = None
    """By default 1e-2 of Muon and stochastic gradient descent, and 3e-3 of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """By default 0.3 of Muon, 1e-2 of AdamW and 3e-5 of stochastic gradient descent. Muon leaves
    norms and biases alone."""
    warmup: Probability = 0.03
    """Share of the training over which the learning rate rises linearly from zero."""
    power: Positive = 0.9
    """Exponent of the polynomial decay to zero."""
    gradient_clip: Positive = 12.0
    """Largest norm of the gradient."""
    freeze: tuple[str, ...] = ()
    """Parts of the network that keep their weights, by name, as in ``encoder``."""
    ema: Probability = 0.03
    """Horizon of the moving average of the weights as a share of the training; 0 is off."""

    @model_validator(mode="after")
    def _check_momentum(self) -> OptimizerConfig:
        if self.name == "adamw" and self.momentum is not None:
            raise ValueError("momentum is of muon and sgd; expected none with adamw. Leave it out")
        return self


def _check_order(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError("the smaller number first is expected")
    return limits


Range = Annotated[tuple[Positive, Positive], AfterValidator(_check_order)]


class AugmentationConfig(Record):
    """How often each random change is applied to a training patch, and how strong it is.

    Changes come in the order given here; each happens by its own chance. Ranges are drawn from
    evenly; a factor of brightness, contrast or gamma is as often below 1 as above where its range
    has both. Several channels are changed each by its own draw, but for rotation, scale, mirroring
    and the strength of the noise.
    """

    rotate: Probability = 0.3
    """About every axis at once; where one axis is coarse, about that axis alone."""
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 20.0
    """Largest angle, either way."""
    scale: Probability = 0.3
    scale_range: Range = (0.8, 1.2)
    """The patch shows so many times its extent: above 1, structures become smaller."""
    scale_per_axis: bool = True
    """Draw a factor for each axis instead of one for all."""
    flip: Probability | tuple[Probability, ...] = 0.0
    """For all axes, or one each (right, anterior, superior). Off by default: organs are not
    symmetric. Classes with a side in their names, as in ``left kidney``, change places; an axis is
    left out where one has no counterpart."""
    noise: Probability = 0.15
    noise_deviation: Annotated[
        tuple[Annotated[float, Field(ge=0)], Positive], AfterValidator(_check_order)
    ] = (0.0, 0.15)
    """Standard deviation of Gaussian noise, in units of the normalised image."""
    blur: Probability = 0.1
    blur_sigma: Range = (0.4, 1.0)
    """Of the Gaussian, in voxels."""
    blur_channels: Probability = 1.0
    """Chance of each channel, where there is blurring."""
    brightness: Probability = 0.2
    brightness_range: Range = (0.75, 1.25)
    """Factor of all intensities."""
    contrast: Probability = 0.2
    contrast_range: Range = (0.75, 1.25)
    """Factor of the distances from the mean; the range of the intensities is kept."""
    low_resolution: Probability = 0.1
    low_resolution_range: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]],
        AfterValidator(_check_order),
    ] = (0.5, 1.0)
    """Share of the voxels per axis that are kept, but along a coarse axis."""
    low_resolution_channels: Probability = 1.0
    """Chance of each channel, where there is loss of resolution."""
    gamma_inverted: Probability = 0.0
    """The same as `gamma`, of the negative image."""
    gamma: Probability = 0.2
    gamma_range: Range = (0.7, 1.5)
    """Exponent; mean and standard deviation are kept."""
    drop_channel: Probability = 0.15
    """Of each channel that cases may lack; one channel at least is left."""

    def flips(self, spatial_dims: int) -> tuple[float, ...]:
        """Chance of mirroring along each axis.

        Raises:
            ConfigError: another number of them.
        """
        if isinstance(self.flip, float):
            return (self.flip,) * spatial_dims
        if len(self.flip) != spatial_dims:
            raise ConfigError(
                f"augmentation.flip {list(self.flip)}; expected {spatial_dims} values, one per "
                "axis. Give one for each, or one for all."
            )
        return self.flip


class TrainingConfig(Record):
    """Length, validation and repeatability of a training."""

    minutes: Positive | None = None
    """Wall-clock time for training with its validations; excludes reading and preprocessing."""
    epochs: Annotated[int, Field(gt=0)] | None = None
    """Length in epochs instead of minutes."""
    steps_per_epoch: Annotated[int, Field(gt=0)] = 50
    seed: Annotated[int, Field(ge=0)] = 0
    foreground: Probability = 0.5
    """Share of each batch that is centred on a foreground voxel: of classes as often as of each
    other, but for those that few cases have, and of small parts as often as of large ones."""
    num_folds: Annotated[int, Field(ge=2)] = 5
    start_from: str | None = None
    """A run folder or bundle: its plan is taken over, and its weights by name and shape."""
    patience: Annotated[int, Field(gt=0)] | None = None
    """After so many validations without a better Dice lower the learning rate to zero and end;
    None goes on. There are more of them then, at most one per epoch or 25th of the minutes."""
    parts: Annotated[int, Field(gt=0)] = 1
    """A batch is computed in so many parts, whose gradients are added by their samples: the same
    training in less memory, but for batch normalisation, Dice of whole batches, and cross-entropy
    among voxels of unknown class, which is a mean over the known ones of each part. Doubled where
    memory runs out."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the network's arithmetic; auto takes 16 bits where the hardware gains by it."""
    compile: bool | None = None
    """By torch.compile; by default on a GPU."""
    recompute: bool = False
    """Compute feature maps a second time in the backward pass instead of keeping them."""
    log: tuple[Literal["tensorboard", "mlflow"], ...] = ()
    """Where rows of history go besides ``history.jsonl``."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Loader processes; by default none on a CPU, whose cores the network needs."""


class Config(Record):
    """Everything that a user may set for a training."""

    data: DataConfig = DataConfig()
    plan: PlanConfig = PlanConfig()
    network: NetworkConfig = NetworkConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    training: TrainingConfig = TrainingConfig()


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply ``section.key=value`` overrides on top.

    Args:
        path: YAML with the sections of `Config`; None for the defaults.
        overrides: values are YAML, as in ``plan.patch=[96,96,64]`` or ``optimizer.ema=0``.

    Raises:
        ConfigError: unknown key, wrong value, or a malformed override.
    """
    data: dict[str, Any] = {}
    if path is not None:
        data = _load(path, parse_yaml, "YAML", ConfigError) or {}
        Config.parse(data, str(path))
    for override in overrides:
        _apply(data, override)
    return Config.parse(data, "--set" if overrides else "config")


DEFAULT_MINUTES = 60.0
"""Length of a training if nobody says."""


def with_length(config: Config, minutes: float | None, epochs: int | None) -> Config:
    """Put the length of the training into `config`: what is given here wins, one hour if nothing.

    Raises:
        ConfigError: both minutes and epochs.
    """
    if minutes is None and epochs is None:
        minutes, epochs = config.training.minutes, config.training.epochs
    if minutes is not None and epochs is not None:
        raise ConfigError("both minutes and epochs are set; expected one of them. Drop one.")
    if minutes is None and epochs is None:
        minutes = DEFAULT_MINUTES
    length = {"minutes": minutes, "epochs": epochs}
    TrainingConfig.parse(length, "training length")
    # A copy, not a new parse, remembers which keys the user has set.
    return config.model_copy(update={"training": config.training.model_copy(update=length)})


def as_override(key: str, value: Any) -> str:
    """``key=value`` for `load_config`, whose YAML gives `value` back whatever it looks like."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r}; expected key=value, as in optimizer.ema=0.")
    *sections, name = key.strip().split(".")
    node = data
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override!r}: '{section}' is a value, not a section.")
    node[name] = _load_value(text, override)


def _load_value(text: str, override: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError as invalid:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML.") from invalid


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Plain values as YAML text: block style, short lists on one line, key order kept."""
    return yaml.dump(
        dict(data),
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=100,
    )
