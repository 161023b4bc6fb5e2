"""2D networks on the slices of thick-sliced volumes, from the command line to the scores."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from makers import make_affine, write_nifti
from numpy.typing import NDArray

import volseg
from volseg.cli import main
from volseg.config import load_config
from volseg.inference import load_model
from volseg.inference.windows import choose_axis, count_at_once, stream_scores
from volseg.planning import Plan

PIXEL, THICK = 1.4, 8.0
SHAPE = (26, 22, 5)
SETTINGS = [
    "plan.slices=true",
    "plan.width=8",
    "plan.num_levels=3",
    "training.steps_per_epoch=30",
    "optimizer.learning_rate=0.01",
]


def make_volume(seed: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A long bright box and a square dark one beside its end; in the last slice the long one."""
    rng = np.random.default_rng(seed)
    label = np.zeros(SHAPE, np.uint8)
    x, y = rng.integers(2, 6, 2)
    label[x : x + 14, y : y + 5, 1:] = 3
    label[x : x + 6, y + 7 : y + 13, 1:4] = 7
    image = rng.normal(0, 0.3, SHAPE)
    image[label == 3] += 3
    image[label == 7] -= 3
    return image.astype(np.float32), label


def write_dataset(folder: Path, axis: int, thickness: tuple[float, ...] = (THICK,)) -> Path:
    """Five oblique cases whose slices lie along file axis `axis`."""
    for seed in range(5):
        spacing = np.insert([PIXEL, PIXEL], axis, thickness[seed % len(thickness)])
        affine = make_affine(tuple(spacing), oblique=True)
        for kind, array in zip(("images", "labels"), make_volume(seed), strict=True):
            turned = np.ascontiguousarray(np.moveaxis(array, 2, axis))
            write_nifti(folder / kind / f"case_{seed}.nii.gz", turned, affine)
    return folder


def run_cli(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def settings(*more: str) -> list[str]:
    return [part for setting in (*SETTINGS, *more) for part in ("--set", setting)]


@pytest.mark.parametrize("axis", [2, 0])
def test_the_whole_way_on_slices(tmp_path: Path, axis: int) -> None:
    # Slices of two thicknesses, which are never resampled.
    data = write_dataset(tmp_path / "data", axis, (THICK, THICK, 10.0))
    run, predicted = tmp_path / "run", tmp_path / "predicted"
    patch = np.insert([16, 16], axis, 1).tolist()
    options = settings(f"plan.patch={patch}")
    assert run_cli("train", data, "-o", run, "--epochs", "3", "--device", "cpu", *options) == 0
    plan = Plan.read_yaml(run / "plan.yaml")
    assert plan.network.slice_axis == axis
    assert plan.patch == tuple(patch)
    assert plan.spacing_mm == pytest.approx(np.insert([PIXEL, PIXEL], axis, THICK))
    prepared = sorted((run / "cache").glob("*/label.npy"))
    assert {np.load(path).shape for path in prepared} == {tuple(np.insert([26, 22], axis, 5))}
    assert run_cli("predict", run, "-i", data / "images", "-o", predicted) == 0
    for source in sorted((data / "images").iterdir()):
        ours, theirs = nib.load(predicted / source.name), nib.load(source)
        assert ours.shape == theirs.shape
        assert ours.affine.tobytes() == theirs.affine.tobytes()
    assert run_cli("evaluate", predicted, data, "-o", tmp_path / "scores") == 0
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary["num_cases"] == 5
    # The content is asymmetric: were it turned or shifted by a slice, little would be left.
    assert min(row["mean_dice"] for row in summary["classes"]) > 0.8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slices")
    data = write_dataset(folder / "data", 2)
    config = load_config(None, [*SETTINGS, "plan.patch=[16, 16, 1]"])
    return volseg.train(data, folder / "run", config=config, epochs=1, device="cpu")


def test_a_volume_is_predicted_slice_by_slice(run: Path) -> None:
    """Another slice changes nothing, since the image's statistics are the same here."""
    predictor = volseg.Predictor.load(run, device="cpu")
    array = make_volume(9)[0]
    swapped = array[..., [0, 3, 2, 1, 4]]
    affine = make_affine((PIXEL, PIXEL, THICK), oblique=True)
    first = predictor((array, affine), probabilities=True).probabilities
    second = predictor((swapped, affine), probabilities=True).probabilities
    assert first is not None
    assert second is not None
    assert second == pytest.approx(first[..., [0, 3, 2, 1, 4]], abs=1e-4)
    assert np.abs(first[..., 1] - first[..., 3]).max() > 0.01


@torch.no_grad()
def collect(network: torch.nn.Module, image: torch.Tensor, window: tuple[int, ...]) -> torch.Tensor:
    axis = choose_axis(image.shape[1:], window)
    at_once = count_at_once(window, torch.device("cpu"))
    parts = stream_scores(network, image, window, at_once=at_once, axis=axis)
    return torch.cat([part.clone() for part in parts], axis + 1)


def test_several_slices_go_through_the_network_at_once(run: Path) -> None:
    model = load_model(run, "cpu")
    network, plan = model.networks[0], model.facts.plan
    image = torch.from_numpy(make_volume(4)[0])[None]
    sizes: list[int] = []
    hook = network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    scores = collect(network, image, plan.patch)
    hook.remove()
    # Windows of 16 in 26 and 22 pixels, half overlapping: 3 x 2, in 5 slices.
    assert sizes == [30]
    alone = [collect(network, image[..., z : z + 1], plan.patch) for z in range(image.shape[-1])]
    torch.testing.assert_close(scores, torch.cat(alone, -1), atol=1e-4, rtol=1e-4)


def test_windows_of_volumes_go_one_by_one() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert count_at_once((192, 160, 1), cpu) == 8
    assert count_at_once((1024, 1024, 1), cpu) == 1
    assert count_at_once((1024, 1024, 1), gpu) == 4
    assert count_at_once((16, 16, 16), cpu) == 1


def test_a_run_on_slices_goes_on_and_starts_others(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = run.parent / "data"
    config = load_config(None, [*SETTINGS, "optimizer.freeze=[network.encoder]"])
    config = config.model_copy(
        update={"training": config.training.model_copy(update={"start_from": str(run)})}
    )
    with caplog.at_level(logging.INFO):
        other = volseg.train(data, tmp_path / "run", config=config, epochs=1, device="cpu")
    assert "0 left as initialised" in caplog.text
    assert Plan.read_yaml(other / "plan.yaml") == Plan.read_yaml(run / "plan.yaml")


def test_thick_slices_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    thick = write_dataset(tmp_path / "thick", 2)
    with caplog.at_level(logging.INFO):
        assert run_cli("plan", thick, "-o", tmp_path / "a") == 0
    # 8 / 1.4
    assert "slices are 5.7 times as thick" in caplog.text
    assert Plan.read_yaml(tmp_path / "a" / "plan.yaml").network.slice_axis is None
    caplog.clear()
    thin = write_dataset(tmp_path / "thin", 2, (2.9 * PIXEL,))
    with caplog.at_level(logging.INFO):
        assert run_cli("plan", thin, "-o", tmp_path / "b") == 0
        assert run_cli("plan", thick, "-o", tmp_path / "c", *settings()) == 0
        assert run_cli("plan", thick, "-o", tmp_path / "d", "--set", "plan.slices=false") == 0
    assert "as thick" not in caplog.text
    assert Plan.read_yaml(tmp_path / "c" / "plan.yaml").network.slice_axis == 2
