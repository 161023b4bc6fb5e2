"""From fingerprint, machine and time to a plan.

The rules for spacing, topology and normalisation are nnU-Net's where they are sound (Isensee et
al. 2021, doi 10.1038/s41592-020-01008-z). What differs: width, patch and batch follow from the
measured speed and memory of the machine and from the time that the user gives, so that a short
training on a laptop still makes enough steps to be worth having.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from volseg.config import Config, PlanConfig
from volseg.errors import ConfigError
from volseg.planning.architectures import OWN, choose_supervision, find_architecture
from volseg.planning.cost import compute_cost
from volseg.planning.fingerprint import ChannelFingerprint, Fingerprint
from volseg.planning.machine import Machine
from volseg.planning.plan import NetworkPlan, Normalisation, Plan

ANISOTROPY = 3.0
"""An axis is coarse if its spacing is this many times that of every other axis (nnU-Net's)."""
COVERAGE = 0.25
"""A patch that shows a smaller share of the volume asks for a coarser spacing (nnU-Net's)."""
COARSER = 1.15
RADIUS_SHARE = 0.08
"""No spacing becomes coarser than this share of the thinnest class's radius."""
MIN_LEVEL_SIZE = 4
"""No level is smaller than this along an axis that is strided (nnU-Net's)."""
MAX_CHANNELS = {2: 512, 3: 320}
START_PATCH_VOXELS = {2: 512**2, 3: 128**3}
SMALL_PATCH_VOXELS = {2: 96**2, 3: 48**3}
"""Below this a patch shows too little anatomy; the planner rather narrows the network."""
WIDTHS = (32, 24, 16)
NARROWEST = 8
"""Only for trainings that would otherwise hardly begin."""
BATCH_SIZE = {2: 12, 3: 2}
"""The smallest; two hold a foreground and a random patch."""
GOOD_STEPS = 2500
"""Below this a narrower network, which makes more steps, is the better use of the time."""
ENOUGH_STEPS = 1000
"""Below this a smaller patch is, down to `SMALL_PATCH_VOXELS`."""
FEW_STEPS = 200
"""Below this even the narrowest network is."""
AMPLE_STEPS = 20_000
"""Above this a larger batch is the better use of the time."""
BATCH_SHARE = 0.05
"""A batch holds at most this share of the dataset's voxels (nnU-Net's)."""
MEMORY_SHARE = 0.6
TRAINING_SHARE = 0.9
"""Share of the user's minutes that is spent in training steps; the rest validates."""


@dataclass(frozen=True)
class PlannedTraining:
    """A plan with lines for people that say why, and the machine it was chosen for."""

    plan: Plan
    reasons: tuple[str, ...]
    machine: Machine


def make_plan(
    fingerprint: Fingerprint, machine: Machine, config: Config, num_classes: int
) -> PlannedTraining:
    """Choose spacing, patch, batch and network.

    Args:
        fingerprint: the dataset's.
        machine: speed and memory of the training device.
        config: `plan` values are kept as they are; `training.minutes` bounds the work.
        num_classes: background counted.

    Raises:
        ConfigError: a fixed value contradicts another, or nothing fits into memory.
    """
    fixed = config.plan
    slice_axis = choose_slice_axis(fingerprint) if fixed.slices else None
    _check_fixed(fixed, fingerprint, slice_axis)
    own_mm = fingerprint.median_spacing_mm if fixed.slices else choose_spacing(fingerprint)
    # What the user says stays as it is, digit for digit.
    spacing = fixed.spacing_mm or _round(own_mm)
    search = _Search(fingerprint, machine, config, num_classes, spacing, slice_axis)
    network, patch, batch_size = search.run()
    may_coarsen = not (fixed.slices or fixed.spacing_mm or fixed.patch)
    while may_coarsen and search.coverage(patch) < COVERAGE:
        coarser = coarsen(spacing, fingerprint.radius_mm)
        if coarser is None:
            break
        spacing = _round(coarser)
        search = _Search(fingerprint, machine, config, num_classes, spacing)
        network, patch, batch_size = search.run()
    cost = compute_cost(network, patch, len(fingerprint.channels), num_classes)
    step_seconds = cost.step_seconds(machine, batch_size)
    if slice_axis is not None:
        network, patch = _across_slices(network, patch, slice_axis)
    plan = Plan.parse(
        {
            "spatial_dims": fingerprint.spatial_dims,
            "spacing_mm": spacing,
            "patch": patch,
            "batch_size": batch_size,
            "normalisation": tuple(
                choose_normalisation(channel, fingerprint, fixed)
                for channel in fingerprint.channels
            ),
            "network": network,
        },
        "plan",
    )
    reasons = _explain(plan, search.volume_shape, fingerprint, machine, config, step_seconds)
    return PlannedTraining(plan, reasons, machine)


def _round(spacing_mm: Sequence[float]) -> tuple[float, ...]:
    """To six digits, which a person can read in ``plan.yaml``."""
    return tuple(float(f"{value:.6g}") for value in spacing_mm)


def _check_fixed(fixed: PlanConfig, fingerprint: Fingerprint, slice_axis: int | None) -> None:
    """Refuse values of the user's that do not fit the images."""
    dims = fingerprint.spatial_dims
    for name in ("spacing_mm", "patch"):
        values = getattr(fixed, name)
        if values and len(values) != dims:
            raise ConfigError(f"plan.{name} {values}; expected {dims} values, one per axis.")
    most = MAX_CHANNELS[dims if slice_axis is None else 2]
    if fixed.width and fixed.width > most:
        raise ConfigError(f"plan.width {fixed.width}; expected {most} at most. Lower it.")
    if slice_axis is None:
        return
    if fixed.patch and fixed.patch[slice_axis] != 1:
        raise ConfigError(
            f"plan.patch {fixed.patch} with plan.slices; expected a single slice. Set axis "
            f"{slice_axis} to 1."
        )
    own_mm = fingerprint.median_spacing_mm[slice_axis]
    if fixed.spacing_mm and not math.isclose(fixed.spacing_mm[slice_axis], own_mm, rel_tol=1e-3):
        raise ConfigError(
            f"plan.spacing_mm {fixed.spacing_mm} with plan.slices, which never resamples across "
            f"slices; expected the volumes' own median there. Set axis {slice_axis} to {own_mm:g}."
        )


def choose_slice_axis(fingerprint: Fingerprint) -> int:
    """The coarsest axis, of equal ones the last.

    Raises:
        ConfigError: pictures have no slices.
    """
    if fingerprint.spatial_dims != 3:
        raise ConfigError("plan.slices with 2D images; expected volumes. Leave it out.")
    # Headers say 0.9999999 where they mean 1.
    spacing = [round(value, 3) for value in fingerprint.median_spacing_mm]
    return max(range(3), key=lambda axis: (spacing[axis], axis))


def slice_thickness(fingerprint: Fingerprint) -> float:
    """The coarsest spacing as a multiple of the next one; 1 for pictures."""
    if fingerprint.spatial_dims != 3:
        return 1.0
    *_, next_mm, coarsest_mm = sorted(fingerprint.median_spacing_mm)
    return coarsest_mm / next_mm


def _across_slices(
    network: NetworkPlan, patch: tuple[int, ...], axis: int
) -> tuple[NetworkPlan, tuple[int, ...]]:
    """Network and patch in the plane as those of a volume, with a 1 along the slice axis."""

    def insert(values: Sequence[int]) -> tuple[int, ...]:
        return (*values[:axis], 1, *values[axis:])

    levels = {
        "slice_axis": axis,
        "strides": tuple(map(insert, network.strides)),
        "kernel_sizes": tuple(map(insert, network.kernel_sizes)),
    }
    return network.model_copy(update=levels), insert(patch)


def choose_spacing(fingerprint: Fingerprint) -> tuple[float, ...]:
    """Median spacing; a coarse axis takes its 10th percentile, but stays the coarsest.

    Resampling most thick-slice volumes to the median of a mixed dataset would throw slices away.
    """
    spacing = list(fingerprint.median_spacing_mm)
    shape = np.median([case.shape for case in fingerprint.cases], axis=0)
    worst = int(np.argmax(spacing))
    others = [value for axis, value in enumerate(spacing) if axis != worst]
    other_sizes = [size for axis, size in enumerate(shape) if axis != worst]
    if spacing[worst] > ANISOTROPY * max(others) and ANISOTROPY * shape[worst] < min(other_sizes):
        values = [case.spacing_mm[worst] for case in fingerprint.cases]
        spacing[worst] = max(float(np.percentile(values, 10)), max(others))
    return tuple(spacing)


def coarsen(spacing_mm: Sequence[float], radius_mm: float) -> tuple[float, ...] | None:
    """The finest axes a step coarser; None where the thinnest class would lose its shape."""
    finest = COARSER * min(spacing_mm)
    if finest > RADIUS_SHARE * radius_mm:
        return None
    return tuple(max(value, finest) for value in spacing_mm)


def choose_normalisation(
    channel: ChannelFingerprint, fingerprint: Fingerprint, fixed: PlanConfig
) -> Normalisation:
    """CT by name or by values, else z-score, inside the nonzero voxels of padded images."""
    scheme = fixed.normalisation or ("ct" if is_ct(channel) else "zscore")
    if scheme == "zscore":
        nonzero_only = fingerprint.content_fraction < 0.75
        return Normalisation(
            channel=channel.name,
            scheme="zscore",
            nonzero_only=nonzero_only,
            optional=channel.optional,
        )
    return Normalisation(
        channel=channel.name,
        scheme="ct",
        optional=channel.optional,
        clip_low=round(channel.percentile_0_5, 3),
        clip_high=round(channel.percentile_99_5, 3),
        mean=round(channel.mean, 4),
        std=round(max(channel.std, 1e-3), 4),
    )


def is_ct(channel: ChannelFingerprint) -> bool:
    """Named CT, or its images start at the Hounsfield value of air or of CT padding."""
    if channel.name.upper() in ("CT", "HU"):
        return True
    is_named = not channel.name.startswith("channel_")
    return not is_named and -3100 <= channel.image_minimum <= -900


def plan_levels(
    patch: Sequence[int], spacing_mm: Sequence[float], max_levels: int | None = None
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Strides and kernels per level, by nnU-Net's rule.

    An axis is halved while it keeps at least `MIN_LEVEL_SIZE` voxels and its spacing is below
    twice the finest; its kernel is 1 until its spacing is within twice the finest, and 3 from there
    on, as it is at the last level.
    """
    size, spacing = list(patch), list(spacing_mm)
    strides = [tuple(1 for _ in patch)]
    kernel, kernels = [1 for _ in patch], []
    while True:
        # An axis that is no longer halved must not take the kernels of the others with it.
        kernel = [
            3 if k == 3 or s < 2 * min(spacing) else 1 for k, s in zip(kernel, spacing, strict=True)
        ]
        kernels.append(tuple(kernel))
        can_halve = [n >= 2 * MIN_LEVEL_SIZE for n in size]
        finest = min((s for s, ok in zip(spacing, can_halve, strict=True) if ok), default=0.0)
        halve = [ok and s < 2 * finest for s, ok in zip(spacing, can_halve, strict=True)]
        if len(strides) == 1 and not any(halve):
            # A network has two levels at least; a tiny volume is padded for the second.
            halve = [n > 1 for n in size]
        if not any(halve) or len(strides) == (max_levels or math.inf):
            break
        strides.append(tuple(2 if h else 1 for h in halve))
        # Odd sizes are padded up to the next multiple once the number of levels is known.
        size = [math.ceil(n / 2) if h else n for n, h in zip(size, halve, strict=True)]
        spacing = [s * 2 if h else s for s, h in zip(spacing, halve, strict=True)]
    kernels[-1] = tuple(3 for _ in patch)
    return tuple(strides), tuple(kernels)


class _Search:
    """Walks from the largest sensible training downwards until it fits time and memory."""

    def __init__(
        self,
        fingerprint: Fingerprint,
        machine: Machine,
        config: Config,
        num_classes: int,
        spacing_mm: tuple[float, ...],
        slice_axis: int | None = None,
    ) -> None:
        self.machine, self.config = machine, config
        self.num_channels, self.num_classes = len(fingerprint.channels), num_classes
        zooms = [np.array(case.spacing_mm) / np.array(spacing_mm) for case in fingerprint.cases]
        if slice_axis is not None:
            for zoom in zooms:
                zoom[slice_axis] = 1
        shapes = [
            np.array(case.shape) * zoom for case, zoom in zip(fingerprint.cases, zooms, strict=True)
        ]
        self.dataset_voxels = float(sum(np.prod(shape) for shape in shapes))
        self.volume_shape = tuple(max(1, round(n)) for n in np.median(shapes, axis=0))

        def look(values: Sequence[Any]) -> tuple[Any, ...]:
            """Of the axes along which the network looks."""
            return tuple(value for axis, value in enumerate(values) if axis != slice_axis)

        self.spacing_mm, self.median_shape = look(spacing_mm), look(self.volume_shape)
        self.dims = len(self.spacing_mm)
        self.patch = look(config.plan.patch) if config.plan.patch else None
        self.batch_size = config.plan.batch_size or BATCH_SIZE[self.dims]
        self.parts = config.training.parts

    def run(self) -> tuple[NetworkPlan, tuple[int, ...], int]:
        """Narrow the network first, then shrink the patch, then narrow further."""
        fixed = self.config.plan
        widths = (fixed.width,) if fixed.width else WIDTHS
        patches = [self.patch] if self.patch else self._patches()
        candidates = [(width, patches[0], GOOD_STEPS) for width in widths]
        candidates += [(widths[-1], patch, ENOUGH_STEPS) for patch in patches]
        candidates += [(widths[-1], patches[-1], FEW_STEPS)]
        candidates += [(fixed.width or NARROWEST, patches[-1], 0)]
        fitting = [c for c in candidates if self._cost(*c[:2])[1] <= self._memory_limit()]
        if not fitting:
            raise ConfigError(
                f"no patch and width fit into {self._memory_limit():.1f} GB, "
                f"{MEMORY_SHARE:.0%} of {self.machine.name}. Lower plan.patch, plan.width or "
                f"plan.batch_size, or raise training.parts."
            )
        width, patch, _ = next((c for c in fitting if self._steps(*c[:2]) >= c[2]), fitting[-1])
        network = self._network(width, patch)
        self._use_spare_time(width, patch)
        return network, self._pad(patch, network), self.batch_size

    def coverage(self, patch: Sequence[int]) -> float:
        """Share of the median volume that a patch shows."""
        return math.prod(min(1.0, n / m) for n, m in zip(patch, self.median_shape, strict=True))

    def _use_spare_time(self, width: int, patch: tuple[int, ...]) -> None:
        """Double the batch while time and memory allow, up to a share of the dataset's voxels."""
        if self.config.plan.batch_size or self.config.training.minutes is None:
            return
        most = BATCH_SHARE * self.dataset_voxels / math.prod(patch)
        while 2 * self.batch_size <= most:
            self.batch_size *= 2
            has_time = self._steps(width, patch) >= AMPLE_STEPS
            if not has_time or self._cost(width, patch)[1] > self._memory_limit():
                self.batch_size //= 2
                return

    def _patches(self) -> list[tuple[int, ...]]:
        """From the median volume (or what memory usually holds) down, aspect in mm kept cubic."""
        patch = np.array(self._start_patch(), dtype=float)
        patches = [tuple(round(float(n)) for n in patch)]
        while np.prod(patch) > SMALL_PATCH_VOXELS[self.dims]:
            ratio = patch / np.array(self.median_shape)
            extent = patch * np.array(self.spacing_mm)
            # Shrink where the patch covers most of the volume, between equals the longest axis.
            axis = int(np.argmax(ratio * extent))
            patch[axis] *= 0.85
            patches.append(tuple(round(float(n)) for n in patch))
        return patches

    def _start_patch(self) -> tuple[int, ...]:
        """A cube in mm of `START_PATCH_VOXELS`, clipped to the median shape."""
        spacing = np.array(self.spacing_mm)
        median = np.array(self.median_shape, dtype=float)
        free = np.ones(self.dims, dtype=bool)
        patch = median.copy()
        # Axes that the volume cuts short leave their share of voxels to the others.
        while free.any():
            budget = START_PATCH_VOXELS[self.dims] / np.prod(patch[~free])
            edge_mm = (budget * np.prod(spacing[free])) ** (1 / free.sum())
            wanted = edge_mm / spacing
            short = free & (wanted > median)
            if not short.any():
                patch[free] = wanted[free]
                break
            patch[short] = median[short]
            free &= ~short
        return tuple(round(float(n)) for n in patch)

    def _network(self, width: int, patch: tuple[int, ...]) -> NetworkPlan:
        strides, kernels = plan_levels(patch, self.spacing_mm, self.config.plan.num_levels)
        growth = 1 if self.config.plan.pocket else 2
        channels = tuple(
            min(width * growth**level, MAX_CHANNELS[self.dims]) for level in range(len(strides))
        )
        chosen = self.config.network
        return NetworkPlan.parse(
            {
                "name": chosen.name,
                "channels": channels,
                "strides": strides,
                "kernel_sizes": kernels,
                "deep_supervision": choose_supervision(chosen.name, chosen.deep_supervision),
                "options": {**find_architecture(chosen.name).options, **chosen.options},
            },
            "network",
        )

    def _pad(self, patch: tuple[int, ...], network: NetworkPlan) -> tuple[int, ...]:
        """Round up to what the network divides; a patch that the user fixed stays as it is."""
        if self.patch:
            return patch
        return tuple(math.ceil(n / d) * d for n, d in zip(patch, network.divisor, strict=True))

    def _cost(self, width: int, patch: tuple[int, ...]) -> tuple[float, float]:
        network = self._network(width, patch)
        cost = compute_cost(network, self._pad(patch, network), self.num_channels, self.num_classes)
        seconds = cost.step_seconds(self.machine, self.batch_size)
        return seconds, cost.training_gb(math.ceil(self.batch_size / self.parts))

    def _memory_limit(self) -> float:
        return MEMORY_SHARE * self.machine.memory_gb

    def _steps(self, width: int, patch: tuple[int, ...]) -> float:
        minutes = self.config.training.minutes
        if minutes is None:
            return math.inf
        return TRAINING_SHARE * minutes * 60 / self._cost(width, patch)[0]


def _explain(
    plan: Plan,
    median_shape: tuple[int, ...],
    fingerprint: Fingerprint,
    machine: Machine,
    config: Config,
    step_seconds: float,
) -> tuple[str, ...]:
    """Where the values come from, a line each."""
    minutes = config.training.minutes
    lines = [
        f"Dataset: {fingerprint.dataset}, {len(fingerprint.cases)} cases, median volume "
        f"{' x '.join(map(str, median_shape))} voxels at this spacing.",
        f"Machine: {machine.device} ({machine.name}, {machine.memory_gb:.0f} GB); about "
        f"{step_seconds:.2g} s a step ({'measured' if machine.is_measured else 'estimated'}).",
    ]
    finest, own = min(plan.spacing_mm), min(fingerprint.median_spacing_mm)
    if config.plan.spacing_mm is None and finest > 1.01 * own:
        lines.append(
            f"Spacing: coarser than the volumes' {own:.3g} mm, so that a patch shows more of them, "
            f"and fine enough for structures of {fingerprint.radius_mm:.3g} mm radius."
        )
    if minutes:
        steps = TRAINING_SHARE * minutes * 60 / step_seconds
        lines.append(f"Time: {minutes:g} minutes, about {steps:.0f} steps.")
    if find_architecture(plan.network.name) is OWN:
        lines.append(
            f"Network: '{plan.network.name}' is your own. Its time and memory are taken for those "
            "of the U-Net with these levels; the training measures its speed."
        )
    if (axis := plan.network.slice_axis) is not None:
        lines.append(
            f"Slices: a 2D network sees those along axis {axis} one by one. Volumes are never "
            "resampled there; the spacing is their median."
        )
    most, levels = config.plan.num_levels, len(plan.network.channels)
    if most and levels < most:
        lines.append(f"Levels: {levels}, since a patch of this size has no more to halve.")
    if any(n.scheme == "ct" for n in plan.normalisation) and config.plan.normalisation is None:
        lines.append("Normalisation 'ct': the channel is CT by its name or its values in HU.")
    return tuple(lines)
