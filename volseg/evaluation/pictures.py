"""Pictures of an evaluation and of a training, as PNG files.

Takes images with two label maps on the same grid, or the rows of a training's history. Which cases
to show is chosen by `pick_cases`; scoring is left to `volseg.evaluation.evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from volseg.atomic import atomic_path
from volseg.data.cases import Classes
from volseg.errors import ConfigError, DataError
from volseg.evaluation.evaluate import Evaluation
from volseg.geometry import Geometry
from volseg.images import read_image, read_labels

SOFT_TISSUE_WINDOW_HU = (-160.0, 240.0)
"""Grey range for CT: width 400 about 40 HU, as usual for the abdomen."""

_DPI = 100
_MARGIN_MM = 20.0
"""Shown around the labels, so that a small structure fills its panel and no letter covers it."""
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")
"""Told apart with any kind of colour vision: Okabe and Ito (2008), Color Universal Design."""
_MAX_LEGEND = 10

# Plane, the canonical axis across it, the axes drawn to the left and up, and the four edge letters.
_VIEWS = (
    ("axial", 2, 0, 1, "RLAP"),
    ("coronal", 1, 0, 2, "RLSI"),
    ("sagittal", 0, 1, 2, "APSI"),
)


@dataclass(frozen=True, eq=False)
class Panel:
    """One case to draw.

    Attributes:
        case_id: shown in the title.
        dice: mean Dice of the case, shown in the title.
        image: intensities `(*S)`, one channel.
        prediction: label values `(*S)`.
        reference: label values `(*S)`.
        geometry: the grid of all three.
    """

    case_id: str
    dice: float
    image: NDArray[Any]
    prediction: NDArray[Any]
    reference: NDArray[Any]
    geometry: Geometry


def pick_cases(evaluation: Evaluation) -> tuple[str, ...]:
    """Case ids of the worst, the median and the best mean Dice; fewer if there are fewer cases."""
    dice = evaluation.mean_dice_by_case()
    ranked = sorted(dice, key=lambda case_id: (dice[case_id], case_id))
    if not ranked:
        return ()
    picked = (ranked[0], ranked[(len(ranked) - 1) // 2], ranked[-1])
    return tuple(dict.fromkeys(picked))


def read_panel(case_id: str, dice: float, image: Path, prediction: Path, reference: Path) -> Panel:
    """Read one case to draw; of several channels in a file the first is shown.

    Raises:
        DataError: a file cannot be read, or the label files are not on the image's grid.
    """
    shown = read_image(image)
    labels = {path: read_labels(path) for path in (prediction, reference)}
    for path, label in labels.items():
        if not label.geometry.is_same_grid(shown.geometry):
            raise DataError(
                f"{path} is not on the grid of {image}; expected the same shape and affine. "
                "Choose the image that it was made from."
            )
    predicted, known = labels[prediction].array[0], labels[reference].array[0]
    return Panel(case_id, dice, shown.array[0], predicted, known, shown.geometry)


def draw_montage(
    path: Path,
    panels: Sequence[Panel],
    classes: Classes,
    window: tuple[float, float] | None = None,
) -> None:
    """Draw one row for each case: axial, coronal and sagittal slice with both contours.

    Each slice is the one with most foreground in the reference, or in the prediction where the
    reference has none. Volumes are turned to the axis order closest to RAS+ and shown in
    radiological convention; pictures (2D) are shown as stored.

    Args:
        path: PNG file to write.
        panels: the cases, in order.
        classes: names and values; the first is background and not drawn. Colours repeat after
            seven classes.
        window: intensities shown black and white, `SOFT_TISSUE_WINDOW_HU` for CT. By default
            the 0.5th and 99.5th percentile of the voxels other than 0, for each case.

    Raises:
        ConfigError: no panels.
    """
    if not panels:
        raise ConfigError("no cases to draw; expected at least one. Score some cases first.")
    is_flat = all(panel.geometry.spatial_dims == 2 for panel in panels)
    heights = [3.6] * len(panels) + [0.8]
    figure = Figure(figsize=(10, sum(heights)), dpi=_DPI, facecolor="white")
    *rows, foot = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    shown: set[int] = set()
    for row, panel in zip(rows, panels, strict=True):
        row.suptitle(f"{panel.case_id}    mean Dice {panel.dice:.3f}", fontsize=12, y=0.97)
        axes = row.subplots(1, 1 if is_flat else len(_VIEWS), squeeze=False)[0]
        row.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.89, wspace=0.03)
        shown |= _draw_panel(axes, panel, classes, window)
    _draw_legend(foot, classes, sorted(shown), is_flat)
    _save(figure, path)


def _draw_panel(
    axes: Sequence[Axes], panel: Panel, classes: Classes, window: tuple[float, float] | None
) -> set[int]:
    """Draw the slices of one case; returns the class indices drawn."""
    low, high = window or _find_window(panel.image)
    labels = [classes.encode(array) for array in (panel.reference, panel.prediction)]
    # What nobody has annotated is not drawn.
    labels = [np.where(array < classes.num_classes, array, 0) for array in labels]
    stack = np.stack([panel.image, *labels])
    stack, geometry = panel.geometry.to_canonical(stack)
    shown: set[int] = set()
    for axis, cut in zip(axes, _cut_slices(stack, geometry), strict=False):
        axis.imshow(cut.planes[0].T, cmap="gray", vmin=low, vmax=high, **cut.placement)
        shown |= _draw_contours(axis, cut)
        _frame(axis, cut)
    return shown


@dataclass(frozen=True, eq=False)
class _Cut:
    """One slice: planes `(3, *S)` of image, reference and prediction, and where to draw them."""

    planes: NDArray[Any]
    size_mm: tuple[float, float]
    title: str
    letters: str

    @property
    def placement(self) -> dict[str, Any]:
        width, height = self.size_mm
        return {"extent": (0, width, 0, height), "origin": "lower", "interpolation": "nearest"}


def _cut_slices(stack: NDArray[Any], geometry: Geometry) -> list[_Cut]:
    """Orthogonal slices of a canonical `(3, *S)` stack; the whole of a picture."""
    labels = stack[1] if stack[1].any() else stack[2]
    spacing, shape = geometry.spacing_mm, geometry.shape
    if geometry.spatial_dims == 2:
        # Pictures are stored with rows downwards: turned so that they look as in any viewer.
        size = (shape[0] * spacing[0], shape[1] * spacing[1])
        return [_Cut(stack[:, :, ::-1], size, "", "")]
    cuts = []
    for name, across, left, up, letters in _VIEWS:
        counts = np.count_nonzero(labels, axis=(left, up))
        index = int(np.argmax(counts)) if counts.any() else shape[across] // 2
        # Right (or front) grows with the index and belongs on the left of the picture.
        planes = stack.take(index, axis=1 + across)[:, ::-1]
        size = (shape[left] * spacing[left], shape[up] * spacing[up])
        cuts.append(_Cut(planes, size, f"{name} {index + 1}/{shape[across]}", letters))
    return cuts


def _draw_contours(axis: Axes, cut: _Cut) -> set[int]:
    """Reference dotted, prediction as a line; returns the class indices drawn."""
    _, reference, prediction = cut.planes
    found = {int(index) for index in np.unique(cut.planes[1:]) if index > 0}
    centres = [
        (np.arange(count) + 0.5) * size / count
        for count, size in zip(reference.shape, cut.size_mm, strict=True)
    ]
    for index in sorted(found):
        colour = _choose_colour(index)
        for labels, dashes, width in ((reference, "dotted", 1.6), (prediction, "solid", 1.1)):
            mask = (labels == index).T.astype(np.float32)
            if mask.any() and min(mask.shape) > 1:
                axis.contour(
                    *centres, mask, [0.5], colors=[colour], linestyles=dashes, linewidths=width
                )
    return found


def _frame(axis: Axes, cut: _Cut) -> None:
    """Zoom to the labels, and write the plane and the directions."""
    limits = _find_limits(cut)
    axis.set_xlim(*limits[0])
    axis.set_ylim(*limits[1])
    axis.set_aspect("equal")
    axis.set_facecolor("black")
    axis.set_xticks([])
    axis.set_yticks([])
    style: dict[str, Any] = {
        "transform": axis.transAxes,
        "color": "white",
        "fontsize": 9,
        "path_effects": [withStroke(linewidth=2, foreground="black")],
    }
    axis.text(0.02, 0.02, cut.title, ha="left", va="bottom", **style)
    places = (
        (0.02, 0.5, "left", "center"),
        (0.98, 0.5, "right", "center"),
        (0.5, 0.98, "center", "top"),
        (0.5, 0.02, "center", "bottom"),
    )
    for letter, (x, y, ha, va) in zip(cut.letters, places, strict=False):
        axis.text(x, y, letter, ha=ha, va=va, **style)


def _find_limits(cut: _Cut) -> list[tuple[float, float]]:
    """Range in mm to show along both sides: the labels and a margin, or the whole slice."""
    labelled = (cut.planes[1:] != 0).any(axis=0)
    if not labelled.any():
        return [(0.0, size) for size in cut.size_mm]
    limits = []
    for side, size in enumerate(cut.size_mm):
        places = np.flatnonzero(labelled.any(axis=1 - side))
        step = size / labelled.shape[side]
        limits.append((places[0] * step - _MARGIN_MM, (places[-1] + 1) * step + _MARGIN_MM))
    return limits


def _choose_colour(index: int) -> str:
    return _COLOURS[(index - 1) % len(_COLOURS)]


def _find_window(image: NDArray[Any]) -> tuple[float, float]:
    """0.5th and 99.5th percentile of the voxels other than 0, the padding of many images."""
    values = image[image != 0]
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values, (0.5, 99.5))
    return float(low), float(max(high, low + 1e-6))


def _draw_legend(foot: SubFigure, classes: Classes, shown: Sequence[int], is_flat: bool) -> None:
    """Class colours, line styles and the convention, below the rows."""
    handles = [
        Patch(color=_choose_colour(index), label=classes.names[index])
        for index in shown[:_MAX_LEGEND]
    ]
    if hidden := len(shown) - len(handles):
        handles.append(Patch(color="none", label=f"and {hidden} more"))
    lines = [
        Line2D([], [], color="black", linestyle="dotted", linewidth=1.6, label="reference"),
        Line2D([], [], color="black", linewidth=1.1, label="prediction"),
    ]
    foot.legend(handles=[*lines, *handles], loc="upper center", ncols=7, fontsize=10, frameon=False)
    if not is_flat:
        note = "Radiological convention: the patient's right is on the left of the picture."
        foot.text(0.5, 0.04, note, ha="center", va="bottom", fontsize=9, color="#444444")


def draw_progress(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Draw loss, validation Dice and learning rate of a training over its steps and minutes.

    Args:
        path: PNG file to write.
        history: rows with ``step``, ``minutes``, ``loss`` (None where it was not finite) and
            ``learning_rate``; ``val_dice`` where a validation was made.

    Raises:
        ConfigError: no rows.
    """
    if not history:
        raise ConfigError("no history to draw; expected at least one row. Train a step first.")
    steps = [float(row["step"]) for row in history]
    known = [row for row in history if row["loss"] is not None]
    loss_steps, loss = [row["step"] for row in known], [float(row["loss"]) for row in known]
    dice = [(row["step"], row["val_dice"]) for row in history if row.get("val_dice") is not None]
    # A short history is a few points, of which a line alone may show nothing.
    dots: dict[str, Any] = {"marker": "o", "ms": 4} if len(history) < 20 else {}
    figure = Figure(figsize=(10, 7.5), dpi=_DPI, facecolor="white", layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1.6])
    top.plot(loss_steps, loss, color="#56B4E9", linewidth=0.8, alpha=0.7, label="each row")
    smooth = _smooth(loss)
    top.plot(loss_steps, smooth, color="#0072B2", linewidth=1.8, label="moving average", **dots)
    top.set_ylabel("loss")
    top.legend(frameon=False)
    middle.plot(*zip(*dice, strict=True) if dice else ([], []), color="#009E73", marker="o", ms=4)
    middle.set_ylabel("validation Dice")
    middle.set_ylim(0, 1)
    _note_best(middle, dice)
    rates = [float(row["learning_rate"]) for row in history]
    bottom.plot(steps, rates, color="#D55E00", **dots)
    bottom.set_ylabel("learning rate")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    bottom.set_xlabel("step")
    for axis in (top, middle, bottom):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    _add_minutes(top, steps, [float(row["minutes"]) for row in history])
    _save(figure, path)


def _smooth(values: Sequence[float]) -> NDArray[np.float64]:
    """Mean of the rows up to each one, over a twentieth of the training."""
    width = max(1, len(values) // 20)
    total = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return np.asarray((total[ends] - total[starts]) / (ends - starts))


def _note_best(axis: Axes, dice: Sequence[tuple[float, float]]) -> None:
    if not dice:
        axis.text(0.5, 0.5, "no validation yet", transform=axis.transAxes, ha="center", va="center")
        return
    step, best = max(dice, key=lambda point: point[1])
    axis.text(
        0.99, 0.05, f"best {best:.3f} at step {step:.0f}", transform=axis.transAxes, ha="right"
    )


def _add_minutes(axis: Axes, steps: Sequence[float], minutes: Sequence[float]) -> None:
    """A second scale above `axis` that tells the minutes at some of the steps."""
    scale = axis.twiny()
    scale.set_xlim(axis.get_xlim())
    ticks = np.linspace(steps[0], steps[-1], 6 if steps[-1] > steps[0] else 1)
    labels = [f"{minute:.1f}" for minute in np.interp(ticks, steps, minutes)]
    scale.set_xticks(ticks, labels)
    scale.set_xlabel("minutes")
    scale.spines[["right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    """Write as PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
