from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from volseg.data.cases import Classes
from volseg.errors import ConfigError, DataError
from volseg.evaluation.evaluate import CaseClassMetrics, Evaluation, Summary
from volseg.evaluation.pictures import (
    Panel,
    _cut_slices,
    _find_window,
    _smooth,
    draw_montage,
    draw_progress,
    pick_cases,
    read_panel,
)
from volseg.geometry import Geometry
from volseg.images import write_image, write_labels

CLASSES = Classes(names=("background", "organ"), values=(0, 4))


def make_evaluation(dice: dict[str, float | None]) -> Evaluation:
    rows = tuple(
        CaseClassMetrics(
            case_id=case_id,
            class_name="organ",
            value=1,
            dice=value,
            reference_voxels=1,
            prediction_voxels=1,
            reference_ml=1.0,
            prediction_ml=1.0,
        )
        for case_id, value in dice.items()
    )
    summary = Summary(
        mean_dice=None, num_cases=len(dice), classes=(), missing=(), unmatched=(), failed={}
    )
    return Evaluation(rows=rows, summary=summary)


def make_panel(shape: tuple[int, ...], affine: np.ndarray | None = None) -> Panel:
    """A bright box in noise, predicted one voxel off."""
    image = np.random.default_rng(0).normal(10, 1, shape)
    reference = np.zeros(shape, dtype=np.uint8)
    reference[(slice(3, 7),) * len(shape)] = 4
    prediction = np.roll(reference, 1, axis=0)
    geometry = Geometry(shape, np.eye(4) if affine is None else affine)
    return Panel("case_1", 0.75, image + reference, prediction, reference, geometry)


def test_worst_median_and_best_case_are_picked():
    evaluation = make_evaluation({"a": 0.9, "b": 0.2, "c": 0.5, "d": 0.8, "e": 0.7, "f": None})
    assert pick_cases(evaluation) == ("b", "e", "a")


@pytest.mark.parametrize(
    ("dice", "expected"), [({}, ()), ({"a": 0.5}, ("a",)), ({"a": 0.5, "b": 0.1}, ("b", "a"))]
)
def test_fewer_cases_are_not_repeated(dice, expected):
    assert pick_cases(make_evaluation(dice)) == expected


def test_axial_slice_shows_the_right_side_on_the_left_and_the_front_up():
    volume = np.zeros((3, 4, 5, 6))
    volume[0, 3, 4, 2] = 1  # The voxel furthest to the right and the front, in slice 2.
    volume[1, :, :, 2] = 1
    axial = _cut_slices(volume, Geometry((4, 5, 6), np.eye(4)))[0]
    assert axial.title == "axial 3/6"
    assert np.argwhere(axial.planes[0]).tolist() == [[0, 4]]


def test_slices_keep_the_size_in_mm():
    volume = np.zeros((3, 4, 5, 6))
    cuts = _cut_slices(volume, Geometry((4, 5, 6), np.diag([1.0, 2.0, 3.0, 1.0])))
    assert [cut.size_mm for cut in cuts] == [(4, 10), (4, 18), (10, 18)]


def test_slice_has_most_of_the_prediction_if_the_reference_is_empty():
    volume = np.zeros((3, 4, 5, 6))
    volume[2, :, :, 1] = 1
    assert _cut_slices(volume, Geometry((4, 5, 6), np.eye(4)))[0].title == "axial 2/6"


def test_grey_window_leaves_out_padding():
    image = np.concatenate([np.zeros(1000), np.linspace(100, 300, 1001)])
    assert _find_window(image) == pytest.approx((101, 299))


@pytest.mark.parametrize("shape", [(12, 10, 8), (12, 10)])
def test_montage_is_a_png_a_thousand_pixels_wide(tmp_path: Path, shape):
    affine = np.array([[0, 0, -2, 5], [1, 0.1, 0, 3], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=float)
    panel = make_panel(shape, affine if len(shape) == 3 else None)
    draw_montage(tmp_path / "montage.png", [panel, panel], CLASSES)
    with Picture.open(tmp_path / "montage.png") as picture:
        assert (picture.format, picture.width) == ("PNG", 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["montage.png"]


def test_montage_colours_the_class(tmp_path: Path):
    draw_montage(tmp_path / "montage.png", [make_panel((12, 10, 8))], CLASSES)
    pixels = np.asarray(Picture.open(tmp_path / "montage.png").convert("RGB")).reshape(-1, 3)
    in_panels = pixels[: len(pixels) * 3 // 4]
    assert (in_panels == (0xE6, 0x9F, 0x00)).all(axis=1).any()


def test_montage_of_nothing_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no cases to draw"):
        draw_montage(tmp_path / "montage.png", [], CLASSES)


def test_panel_is_read_from_files(tmp_path: Path):
    panel = make_panel((12, 10, 8))
    write_image(tmp_path / "image.nii.gz", panel.image[None].astype(np.float32), panel.geometry)
    write_labels(tmp_path / "labels.nii.gz", panel.reference, panel.geometry)
    files = (tmp_path / "image.nii.gz", tmp_path / "labels.nii.gz", tmp_path / "labels.nii.gz")
    read = read_panel("case_1", 1.0, *files)
    assert read.image.shape == (12, 10, 8)
    assert np.array_equal(read.reference, panel.reference)


def test_panel_refuses_labels_of_another_grid(tmp_path: Path):
    panel = make_panel((12, 10, 8))
    write_image(tmp_path / "image.nii.gz", panel.image[None].astype(np.float32), panel.geometry)
    other = Geometry((12, 10, 8), np.diag([1.0, 1.0, 2.0, 1.0]))
    write_labels(tmp_path / "labels.nii.gz", panel.reference, other)
    files = (tmp_path / "image.nii.gz", tmp_path / "labels.nii.gz", tmp_path / "labels.nii.gz")
    with pytest.raises(DataError, match=r"labels\.nii\.gz is not on the grid of .*image\.nii\.gz"):
        read_panel("case_1", 1.0, *files)


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 60])
def test_progress_is_drawn_for_any_length(tmp_path: Path, num_rows, unknown):
    history = [
        {"step": step, "minutes": step / 10, "loss": 1 / step, "learning_rate": 1e-3 / step}
        for step in range(1, num_rows + 1)
    ]
    history[-1]["val_dice"] = 0.8
    if unknown:
        history[0]["loss"] = None
    draw_progress(tmp_path / "progress.png", history)
    with Picture.open(tmp_path / "progress.png") as picture:
        assert picture.size == (1000, 750)


def test_progress_without_rows_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no history to draw"):
        draw_progress(tmp_path / "progress.png", [])


def test_moving_average_covers_a_twentieth_of_the_rows():
    values = [float(value) for value in range(40)]  # Width 2: the mean with the row before.
    assert _smooth(values)[:4].tolist() == [0.0, 0.5, 1.5, 2.5]
