"""What ``volseg networks`` does: a table of all networks, or one of them drawn and described."""

from __future__ import annotations

import dataclasses
import inspect
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml

from volseg.cli.drawing import WIDTH, draw, wrap
from volseg.config import parse_yaml
from volseg.errors import ConfigError, check_choice
from volseg.extensions import describe as describe_package
from volseg.extensions import find_installed
from volseg.networks import (
    PRESETS,
    OwnNetwork,
    SegmentationNetwork,
    build_network,
    choose_shape_device,
    list_networks,
    list_options,
)
from volseg.networks.cost import NetworkCost, count_cost
from volseg.networks.structure import trace_structure


@dataclass(frozen=True)
class Request:
    """What is asked of the networks.

    Attributes:
        spatial_dims: 2 or 3.
        patch: voxels per axis, as typed; None for 64 along every axis, or more where needed.
        in_channels: of the image.
        classes: background counted.
        overrides: options of the network's constructor as ``KEY=VALUE``, the values in YAML.
    """

    spatial_dims: int = 3
    patch: str | None = None
    in_channels: int = 1
    classes: int = 2
    overrides: Sequence[str] = ()

    @cached_property
    def networks(self) -> dict[str, SegmentationNetwork | ConfigError]:
        """All by name; in place of one that cannot be built, the reason.

        Raises:
            ConfigError: an option that no network has.
        """
        _ = self.options
        found: dict[str, SegmentationNetwork | ConfigError] = {}
        for name in [*list_networks(), *list_installed()]:
            try:
                found[name] = self.build(name)
            except ConfigError as error:
                found[name] = error
        return found

    @property
    def common_size(self) -> list[int]:
        """Of a patch for all networks that can be built; see `find_size`."""
        return self.find_size([n for n in self.networks.values() if not isinstance(n, ConfigError)])

    def find_size(self, networks: Sequence[SegmentationNetwork]) -> list[int]:
        """Voxels per axis: as typed; else 64, or the smallest size above that all networks take.

        Raises:
            ConfigError: no list of whole numbers, or another number of axes.
        """
        if self.patch is None:
            return [_find_smallest(networks, axis) for axis in range(self.spatial_dims)]
        texts = self.patch.split(",")
        if len(texts) != self.spatial_dims or not all(text.strip().isdecimal() for text in texts):
            raise ConfigError(
                f"--patch {self.patch}; expected {self.spatial_dims} whole numbers with commas "
                f"between (--spatial-dims {self.spatial_dims})."
            )
        return [int(text) for text in texts]

    @property
    def options(self) -> dict[str, Any]:
        """Keywords for the constructor.

        Raises:
            ConfigError: an override that is malformed, or an option that no network has.
        """
        known = list(dict.fromkeys(o for name in list_networks() for o in list_options(name)))
        options: dict[str, Any] = {}
        for override in self.overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise ConfigError(f"--set {override!r}; expected key=value, as in channels=[8,16].")
            check_choice("option", key, known)
            try:
                options[key] = parse_yaml(text)
            except yaml.YAMLError as error:
                raise ConfigError(f"--set {override!r}: the value is not valid YAML.") from error
        return options

    def build(self, name: str) -> SegmentationNetwork:
        """A network of which only the shape is asked; the weights of volseg's have no values."""
        with choose_shape_device(name):
            return build_network(
                name,
                spatial_dims=self.spatial_dims,
                in_channels=self.in_channels,
                out_channels=self.classes,
                **self.options,
            )


def compare(request: Request) -> list[dict[str, Any]]:
    """Cost and source of every network; where one cannot be built or take the patch, the reason.

    Raises:
        ConfigError: a patch or an option that no network could take.
    """
    size = request.common_size
    rows: list[dict[str, Any]] = []
    for name, network in request.networks.items():
        cost, problem = _try_cost(network, size)
        fields = {**_cost_fields(cost), "source": _find_source(name), "problem": problem}
        rows.append({"name": name, **fields})
    if all(row["problem"] for row in rows):
        raise ConfigError(rows[0]["problem"])
    return rows


def format_table(rows: Sequence[Mapping[str, Any]], request: Request) -> str:
    """What `compare` found, for the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("network", no_wrap=True)
    for heading in ("parameters", "GFLOP", "MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("source")
    for row in rows:
        if row["problem"]:
            table.add_row(row["name"], "-", "-", "-", row["problem"])
        else:
            costs = f"{row['parameters'] / 1e6:.2f} M", f"{row['gflop']:.1f}"
            table.add_row(row["name"], *costs, f"{row['training_mb']:.0f}", row["source"])
    text = io.StringIO()
    Console(file=text, width=WIDTH, highlight=False, markup=False).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    size = "x".join(map(str, request.common_size))
    note = f"Per image of {size}: operations forward, feature maps kept by a training step."
    return "\n".join([*lines, "", note, "`volseg networks NAME` draws one."])


def describe(name: str, request: Request) -> dict[str, Any]:
    """Structure, cost, source and options of one network.

    Raises:
        ConfigError: unknown name or option, or a patch that the network cannot take.
    """
    if name in list_installed():
        raise ConfigError(
            f"network '{name}' of {_find_source(name)} cannot be drawn; expected one of volseg's: "
            f"{', '.join(PRESETS)}. `volseg networks` lists its cost."
        )
    check_choice("network", name, PRESETS)
    network = request.build(name)
    size = request.find_size([network])
    preset = PRESETS[name]
    parameters = inspect.signature(preset.network).parameters
    defaults = {option: parameters[option].default for option in list_options(name)}
    return {
        "name": name,
        "size": size,
        "structure": trace_structure(network, size),
        **_cost_fields(count_cost(network, size)),
        "divisor": network.divisor,
        "source": preset.source,
        "references": _find_references(preset.network),
        "options": {**defaults, **preset.options, **request.options},
    }


def to_json(description: Mapping[str, Any]) -> dict[str, Any]:
    """What `describe` found, as plain values."""
    return {**description, "structure": dataclasses.asdict(description["structure"])}


def format_description(description: Mapping[str, Any]) -> str:
    """What `describe` found, for the terminal."""
    size = "x".join(map(str, description["size"]))
    facts = {
        "parameters": f"{description['parameters'] / 1e6:.2f} M",
        "operations": f"{description['gflop']:.1f} GFLOP forward",
        "memory": f"{description['training_mb']:.0f} MB of feature maps kept by a training step",
        "divisor": ", ".join(map(str, description["divisor"])),
        "source": description["source"],
    }
    lines = [
        f"{description['name']}, {size}",
        "",
        *draw(description["structure"]),
        "",
        "(image), channels, [logits]; + sum, c concatenation",
        "",
        *(line for name, value in facts.items() for line in wrap(f"{name:<12}{value}", 12)),
        *wrap(f"{'':<12}{description['references']}", 12),
        "",
        "options (--set KEY=VALUE), with their values here:",
    ]
    for option, value in description["options"].items():
        lines += wrap(f"  {option:<18}{value}", 20)
    return "\n".join(lines)


def list_installed() -> list[str]:
    """Networks of installed packages; a name that volseg has itself stands for volseg's."""
    return [name for name in find_installed("networks") if name not in PRESETS]


def _find_source(name: str) -> str:
    """The paper of a network, or the package that it comes from."""
    if name in PRESETS:
        return PRESETS[name].source
    return describe_package(find_installed("networks")[name])


def _find_smallest(networks: Sequence[SegmentationNetwork], axis: int) -> int:
    """The least size from 64 on that leaves every network two voxels at its coarsest level."""
    needed = 64
    for network in networks:
        needed = max(needed, 2 * network.total_stride[axis], network.smallest[axis])
    divisor = math.lcm(*(network.divisor[axis] for network in networks))
    return math.ceil(needed / divisor) * divisor


def _try_cost(
    network: SegmentationNetwork | ConfigError, size: Sequence[int]
) -> tuple[NetworkCost | None, str | None]:
    """The cost, or why there is none."""
    if isinstance(network, ConfigError):
        return None, str(network)
    try:
        return count_cost(network, size), None
    except ConfigError as error:
        return None, str(error)
    except Exception as error:  # Code of others fails in its own ways.
        if not isinstance(network, OwnNetwork):
            raise
        return None, f"cannot be counted ({type(error).__name__}: {error})"


def _cost_fields(cost: NetworkCost | None) -> dict[str, Any]:
    fields = [field.name for field in dataclasses.fields(NetworkCost)]
    return {field: None if cost is None else getattr(cost, field) for field in fields}


def _find_references(network: type[SegmentationNetwork]) -> str:
    """Those of the class's docstring, in one paragraph."""
    _, _, text = (inspect.getdoc(network) or "").partition("References:\n")
    return " ".join(text.partition("\n\n")[0].split())
