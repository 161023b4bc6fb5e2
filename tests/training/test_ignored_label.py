"""Labels of which a part was not annotated, from the files to the scores."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import TINY
from makers import keep

import volseg
from volseg.config import DataConfig, load_config
from volseg.data.cache import build_cache
from volseg.data.cases import Classes
from volseg.data.check import check_dataset
from volseg.data.layouts import find_dataset
from volseg.data.patches import PatchDataset
from volseg.errors import ConfigError, DataError
from volseg.evaluation import evaluate
from volseg.evaluation.report import score_dataset
from volseg.planning import Plan
from volseg.planning.fingerprint import compute_fingerprint

IGNORED = 9
SHAPE = (20, 18, 16)


def write_scribbles(folder: Path, num_cases: int = 5, annotated: int = 3) -> Path:
    """Balls of which only some slices were annotated; nnU-Net's layout."""
    rng = np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr", "full"):
        (folder / part).mkdir(parents=True)
    for number in range(num_cases):
        centre = np.array([10, 9, 8]) + rng.uniform(-2, 2, 3)
        ball = np.linalg.norm(np.indices(SHAPE).T - centre, axis=-1).T < 5
        image = rng.normal(0, 0.3, SHAPE) + 2 * ball
        labels = np.full(SHAPE, IGNORED, np.uint8)
        slices = [4 + i * 12 // annotated for i in range(annotated)]
        labels[:, :, slices] = ball[:, :, slices]
        for part, array in (("labelsTr", labels), ("full", ball.astype(np.uint8))):
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / part / f"c{number}.nii.gz")
        image = nib.Nifti1Image(image.astype(np.float32), np.eye(4))
        nib.save(image, folder / "imagesTr" / f"c{number}_0000.nii.gz")
    description = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "ball": 1, "ignore": IGNORED},
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="module")
def scribbles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scribbles(tmp_path_factory.mktemp("data") / "scribbles")


def test_ignored_value_is_known_and_no_class(scribbles: Path) -> None:
    dataset = find_dataset(scribbles)
    assert (dataset.classes.names, dataset.classes.ignore) == (("background", "ball"), IGNORED)
    assert check_dataset(dataset) == []
    encoded = dataset.classes.encode(np.array([IGNORED, 1, 0, IGNORED]))
    assert encoded.tolist() == [2, 1, 0, 2]
    with pytest.raises(DataError, match=r"label values \[7\]; expected only \[0, 1, 9\]"):
        dataset.classes.encode(np.array([7]))


def test_ignored_value_that_is_a_class_is_refused() -> None:
    with pytest.raises(ValueError, match="the ignored value 1 is a class"):
        Classes(names=("background", "ball"), values=(0, 1), ignore=1)


def test_background_cannot_be_ignored(scribbles: Path) -> None:
    with pytest.raises(ConfigError, match=r"ignore_label 0 is the value of background"):
        find_dataset(scribbles).with_labels(DataConfig(ignore_label=0))


def test_value_of_any_dataset_may_be_ignored(scribbles: Path, tmp_path: Path) -> None:
    for part in ("images", "labels"):
        (tmp_path / part).symlink_to(scribbles / f"{part}Tr")
    dataset = find_dataset(tmp_path).with_labels(DataConfig(ignore_label=IGNORED))
    assert dataset.classes.values == (0, 1)
    assert dataset.classes.ignore == IGNORED


def test_fingerprint_counts_what_was_annotated(scribbles: Path) -> None:
    dataset = find_dataset(scribbles)
    case = compute_fingerprint(dataset).cases[0]
    labels = np.asarray(nib.load(dataset.cases[0].label).dataobj)
    assert case.class_voxels == ((labels == 0).sum(), (labels == 1).sum())


def test_every_patch_holds_an_annotated_voxel(scribbles: Path, tmp_path: Path) -> None:
    dataset = find_dataset(scribbles)
    network = {
        "name": "unet",
        "channels": (4, 8),
        "strides": ((1, 1, 1), (2, 2, 2)),
        "kernel_sizes": ((3, 3, 3),) * 2,
    }
    plan = Plan(
        spatial_dims=3,
        spacing_mm=(1.0, 1.0, 1.0),
        patch=(4, 4, 2),
        batch_size=1,
        normalisation=({"channel": "MR", "scheme": "zscore"},),
        network=network,
    )
    cases = build_cache(dataset, dataset.cases, plan, tmp_path)
    assert (cases[0].label == 2).mean() > 0.5
    patches = PatchDataset(cases, plan.patch, batch_size=1, foreground=0.0, augment=keep, seed=0)
    labels = [patches[number][1] for number in range(60)]
    assert all((label != 2).any() for label in labels)
    assert any((label == 0).any() for label in labels)


def test_training_on_a_few_slices_finds_the_whole(scribbles: Path, tmp_path: Path) -> None:
    config = load_config(None, [*TINY, "plan.width=8", "training.steps_per_epoch=20"])
    run = volseg.train(scribbles, tmp_path / "run", config=config, epochs=6)
    predictor = volseg.Predictor.load(run)
    dataset = find_dataset(scribbles)
    for case in dataset.cases:
        segmentation = predictor(case.images)
        assert set(np.unique(segmentation.labels)) == {0, 1}
        segmentation.save(tmp_path / "p" / f"{case.case_id}.nii.gz")
    assert evaluate(tmp_path / "p", scribbles / "full").summary.mean_dice > 0.85
    scores = score_dataset(tmp_path / "p", dataset, tmp_path / "s")
    assert scores.summary.mean_dice > 0.85
    # Only what was annotated is counted.
    labels = np.asarray(nib.load(dataset.cases[0].label).dataobj)
    assert scores.rows[0].reference_voxels == (labels == 1).sum()
    assert (tmp_path / "s" / "montage.png").exists()


def test_ignored_voxels_have_no_share_of_a_coarser_class(scribbles: Path, tmp_path: Path) -> None:
    deeper = ["plan.patch=[32,32,32]", "plan.num_levels=4", "network.deep_supervision=true"]
    config = load_config(None, [*TINY, *deeper, "loss.supervision_target=area"])
    with pytest.raises(ConfigError, match="with voxels of unknown class; expected 'nearest-exact'"):
        volseg.train(scribbles, tmp_path / "run", config=config, epochs=1)
