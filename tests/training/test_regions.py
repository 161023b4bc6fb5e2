"""Nested regions of a BraTS-style dataset, from its folders to predictions in its own values."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import TINY
from monai.bundle import ConfigWorkflow
from torch import nn

import volseg
from volseg.bundle import export_bundle
from volseg.config import DataConfig, load_config
from volseg.data.cases import Classes, Region
from volseg.data.layouts import find_dataset
from volseg.errors import ConfigError
from volseg.evaluation.report import score_dataset
from volseg.inference.decoding import to_class_scores
from volseg.inference.members import Members
from volseg.training.validation import validate

BRATS = Classes(
    names=("background", "NCR", "ED", "ET"),
    values=(0, 1, 2, 3),
    regions=(
        Region(name="whole", values=(1, 2, 3)),
        Region(name="core", values=(1, 3)),
        Region(name="ET", values=(3,)),
    ),
)
SUFFIXES = ("t1n", "t1c", "t2w", "t2f")


def write_brats(folder: Path, num_cases: int = 5) -> Path:
    """Balls in balls; each channel shows another part of them."""
    rng = np.random.default_rng(0)
    for number in range(num_cases):
        name = f"BraTS-GLI-{number:05d}-000"
        (folder / name).mkdir(parents=True)
        centre = np.array([10, 9, 8]) + rng.uniform(-2, 2, 3)
        distance = np.linalg.norm(np.indices((20, 18, 16)).T - centre, axis=-1).T
        labels = np.select([distance < 3, distance < 4.5, distance < 6.5], [1, 3, 2], 0)
        shows = {"t1n": (1,), "t1c": (3,), "t2w": (1, 2, 3), "t2f": (2, 3)}
        affine = np.diag([1.0, 1.2, 1.5, 1])
        for suffix, values in shows.items():
            image = rng.normal(1, 0.2, labels.shape) + 2 * np.isin(labels, values)
            path = folder / name / f"{name}-{suffix}.nii.gz"
            nib.save(nib.Nifti1Image(image.astype(np.float32), affine), path)
        path = folder / name / f"{name}-seg.nii.gz"
        nib.save(nib.Nifti1Image(labels.astype(np.uint8), affine), path)
    return folder


@pytest.fixture(scope="module")
def brats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_brats(tmp_path_factory.mktemp("data") / "brats")


@pytest.fixture(scope="module")
def run(brats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_config(None, [*TINY, "plan.width=8", "training.steps_per_epoch=20"])
    return volseg.train(brats, tmp_path_factory.mktemp("runs") / "r", config=config, epochs=10)


def test_class_is_the_most_likely_of_those_that_the_regions_allow() -> None:
    logits = torch.randn(3, 50, generator=torch.manual_seed(0)) * 3
    inside = logits.sigmoid()
    # By hand: in all regions, in no region, ... as the class says.
    likelihoods = torch.stack(
        [
            (1 - inside[0]) * (1 - inside[1]) * (1 - inside[2]),
            inside[0] * inside[1] * (1 - inside[2]),
            inside[0] * (1 - inside[1]) * (1 - inside[2]),
            inside[0] * inside[1] * inside[2],
        ]
    )
    scores = to_class_scores(logits[..., None, None], BRATS)[..., 0, 0]
    assert torch.equal(scores.argmax(0), likelihoods.argmax(0))
    torch.testing.assert_close(scores.softmax(0), likelihoods / likelihoods.sum(0))


def test_classes_without_regions_keep_their_scores() -> None:
    scores = torch.randn(4, 2, 2)
    assert to_class_scores(scores, Classes(names=BRATS.names, values=BRATS.values)) is scores


def test_class_outside_all_regions_is_never_predicted() -> None:
    classes = BRATS.model_copy(update={"regions": BRATS.regions[2:]})
    scores = to_class_scores(torch.tensor([[-50.0, 2.0]]), classes)
    assert scores.argmax(0).tolist() == [0, 3]
    assert torch.isfinite(scores).all()


def test_several_networks_give_the_mean_probability_of_each_region() -> None:
    class Constant(nn.Module):
        def __init__(self, logit: float) -> None:
            super().__init__()
            self.logit = logit

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full_like(x, self.logit)

    networks, cpu = [Constant(2.0), Constant(-0.5)], torch.device("cpu")
    scores = Members(networks, cpu, overlapping=True)(torch.zeros(1, 1, 4, 4, 4))
    expected = torch.tensor([2.0, -0.5]).sigmoid().mean()
    torch.testing.assert_close(scores.sigmoid(), expected.expand(1, 1, 4, 4, 4))


def test_validation_scores_regions(run: Path) -> None:
    class Case:
        case_id = "a"
        image = np.zeros((1, 2, 2, 2), np.float16)
        label = np.array([1, 1, 2, 2, 3, 0, 0, 0], np.uint8).reshape(2, 2, 2)

    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # Predicts 1, 3, 2, 0, 3, 2, 0, 0.
            whole = torch.tensor([1, 1, 1, -1, 1, 1, -1, -1.0])
            core = torch.tensor([1, 1, -1, -1, 1, -1, -1, -1.0])
            enhancing = torch.tensor([-1, 1, -1, -1, 1, -1, -1, -1.0])
            return torch.stack([whole, core, enhancing]).reshape(1, 3, 2, 2, 2)

    class Window:
        patch = (2, 2, 2)

    dice = validate(Fixed(), [Case()], Window(), BRATS, torch.device("cpu"))
    assert dice == pytest.approx([2 * 4 / (5 + 5), 2 * 3 / (3 + 3), 2 * 1 / (1 + 2)])


def test_regions_of_the_edition_are_learnt_and_written_in_its_values(
    brats: Path, run: Path, tmp_path: Path
) -> None:
    dataset = find_dataset(brats)
    assert dataset.classes.output_names == ("whole tumour", "tumour core", "ET")
    predictor = volseg.Predictor.load(run)
    assert predictor.model.networks[0].out_channels == 3
    for case in dataset.cases:
        segmentation = predictor(case.images, probabilities=True)
        assert set(np.unique(segmentation.labels)) == {0, 1, 2, 3}
        assert segmentation.probabilities.shape == (3, *segmentation.labels.shape)
        segmentation.save(tmp_path / "p" / f"{case.case_id}.nii.gz")
    evaluation = score_dataset(tmp_path / "p", dataset, tmp_path / "s")
    rows = {row.class_name: row.mean_dice for row in evaluation.summary.classes}
    assert rows.keys() == {"whole tumour", "tumour core", "ET"}
    assert min(rows.values()) > 0.8


def test_bundle_writes_the_same_values(brats: Path, run: Path, tmp_path: Path) -> None:
    bundle = export_bundle(run, tmp_path / "bundle")
    case = find_dataset(brats).cases[0]
    four = nib.funcs.concat_images([nib.load(path) for path in case.images])
    nib.save(four, tmp_path / "case.nii.gz")
    workflow = ConfigWorkflow(
        config_file=str(bundle / "configs" / "inference.json"),
        workflow_type="infer",
        bundle_root=str(bundle),
        image=str(tmp_path / "case.nii.gz"),
        output_dir=str(tmp_path / "out"),
    )
    workflow.initialize()
    workflow.run()
    written = np.asarray(nib.load(tmp_path / "out" / "case.nii.gz").dataobj)
    expected = volseg.Predictor.load(run)(case.images).labels
    assert (written == expected).mean() > 0.999
    assert set(np.unique(written)) == {0, 1, 2, 3}


def test_own_regions_and_none(brats: Path, tmp_path: Path) -> None:
    dataset = find_dataset(brats)
    own = dataset.with_labels(DataConfig(regions={"all": (1, 2, 3), "rim": (3,)}))
    assert own.classes.region_indices == ((1, 2, 3), (3,))
    assert own.classes.find_merged() == [("NCR", "ED")]
    assert dataset.with_labels(DataConfig(regions={})).classes.num_outputs == 4
    assert dataset.with_labels(DataConfig()) == dataset
    config = load_config(None, [*TINY, "data.regions={all: [1, 7]}"])
    with pytest.raises(ConfigError, match=r"data: region 'all' has the values \[1, 7\]"):
        volseg.train(brats, tmp_path / "run", config=config, epochs=1)
