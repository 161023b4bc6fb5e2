"""Cases whose labels show only some of the classes, from a list of files to the scores."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import TINY
from torch import Tensor

import volseg
from volseg.config import DataConfig, LossConfig, load_config
from volseg.data.cache import CachedCase, build_cache
from volseg.data.cases import Classes, Dataset
from volseg.data.layouts import find_dataset
from volseg.evaluation import evaluate
from volseg.evaluation.report import score_dataset
from volseg.planning import Plan
from volseg.training.loss import make_loss

SHAPE = (20, 18, 16)
VALIDATE = ((1,), (2,), (1, 2))
LEARN = ((1,), (1,), (1,), (2,), (1, 2))
"""Per case the label values that somebody has drawn: 1 bright balls, 2 dark ones, which more of the
cases to learn from leave out than show."""
ONLY_FIRST, ONLY_SECOND = 4, 3
"""Label indices of the background where one class alone was drawn; see `Classes.unsure`."""
NETWORK = {
    "name": "unet",
    "channels": (4, 8),
    "strides": ((1, 1, 1), (2, 2, 2)),
    "kernel_sizes": ((3, 3, 3),) * 2,
}


def write_list(folder: Path) -> Path:
    """A CSV list of cases with a ball of each class, of which the labels show some."""
    rng = np.random.default_rng(0)
    lines = ["image,label,annotated,fold"]
    for number, shown in enumerate(VALIDATE + LEARN):
        labels = np.zeros(SHAPE, np.uint8)
        for value, x in ((1, 5), (2, 14)):
            centre = np.array([x, 9, 8]) + rng.uniform(-1, 1, 3)
            labels[np.linalg.norm(np.indices(SHAPE).T - centre, axis=-1).T < 4] = value
        image = rng.normal(0, 0.3, SHAPE) + np.array([0, 2, -2])[labels]
        drawn = np.where(np.isin(labels, shown), labels, 0)
        for part, array in (
            ("images", image.astype(np.float32)),
            ("labels", drawn.astype(np.uint8)),
            ("whole", labels),
        ):
            (folder / part).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / part / f"c{number}.nii.gz")
        listed = "" if len(shown) == 2 else str(shown[0])
        fold = int(number >= len(VALIDATE))
        lines.append(f"images/c{number}.nii.gz,labels/c{number}.nii.gz,{listed},{fold}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder / "list.csv"


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_list(tmp_path_factory.mktemp("data") / "partly")


def prepare(dataset: Dataset, folder: Path) -> list[CachedCase]:
    plan = Plan(
        spatial_dims=3,
        spacing_mm=(1.0, 1.0, 1.0),
        patch=(16, 16, 16),
        batch_size=1,
        normalisation=({"channel": "channel_0", "scheme": "zscore"},),
        network=NETWORK,
    )
    return build_cache(dataset, dataset.cases[:3], plan, folder)


def find_gradient(target: Tensor, classes: Classes) -> tuple[Tensor, Tensor]:
    """Softmax (K, *S) of random logits, and the gradient of the default loss at them."""
    shape, generator = (1, classes.num_outputs, *target.shape), torch.manual_seed(0)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    loss = make_loss(LossConfig(), "unet", 1, classes, (1.0, 1.0, 1.0))
    loss(logits, target[None]).backward()
    assert logits.grad is not None
    return logits.detach().softmax(1)[0], logits.grad[0]


def test_list_says_which_classes_a_label_shows(listed: Path, tmp_path: Path) -> None:
    dataset = find_dataset(listed)
    assert dataset.classes.names == ("background", "label_1", "label_2")
    one, two = ("label_1",), ("label_2",)
    assert [case.annotated for case in dataset.cases] == [one, two, None, one, one, one, two, None]
    # The background of a case with class 1 may be class 2, and the other way round.
    assert dataset.classes.unsure == ((0, 1), (0, 2))
    first, second, whole = (set(np.unique(c.label)) for c in prepare(dataset, tmp_path))
    assert (first, second, whole) == ({1, ONLY_FIRST}, {2, ONLY_SECOND}, {0, 1, 2})


def test_loss_does_not_choose_among_the_classes_that_nobody_drew(
    listed: Path, tmp_path: Path
) -> None:
    dataset = find_dataset(listed)
    cases, indices = prepare(dataset, tmp_path)[:2], (ONLY_FIRST, ONLY_SECOND)
    for case, index, drawn, other in zip(cases, indices, (1, 2), (2, 1), strict=True):
        target = torch.from_numpy(case.label.astype(np.int64))
        p, gradient = find_gradient(target, dataset.classes)
        p, gradient = (values[:, target == index] for values in (p, gradient))
        # There the loss knows q = p_0 + p_other alone, whose derivative by the logit of each of
        # the two is p_k (1 - q): their gradients are as their probabilities.
        ours, theirs = gradient[0] * p[other], gradient[other] * p[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        # What was drawn is known not to be there: less of it, more of both others.
        assert (gradient[drawn] > 0).all()
        assert (gradient[[0, other]] < 0).all()


def test_known_background_is_told_from_both_classes(listed: Path, tmp_path: Path) -> None:
    dataset = find_dataset(listed)
    whole = prepare(dataset, tmp_path)[2]
    target = torch.from_numpy(whole.label.astype(np.int64))
    _, gradient = find_gradient(target, dataset.classes)
    assert (gradient[0, target == 0] < 0).all()
    assert (gradient[1:, target == 0] > 0).all()


def test_region_that_nobody_drew_has_no_gradient(listed: Path, tmp_path: Path) -> None:
    regions = DataConfig(regions={"both": (1, 2), "second": (2,)})
    dataset = find_dataset(listed).with_labels(regions)
    first = prepare(dataset, tmp_path)[0]
    target = torch.from_numpy(first.label.astype(np.int64))
    _, gradient = find_gradient(target, dataset.classes)
    # Class 1 is in "both" and not in "second"; elsewhere either may be.
    assert not gradient[:, target == ONLY_FIRST].any()
    assert (gradient[0, target == 1] < 0).all()
    assert (gradient[1, target == 1] > 0).all()


def test_both_classes_are_found_everywhere(listed: Path, tmp_path: Path) -> None:
    # Were it background where nobody drew it, cross-entropy alone would give up the second class.
    alone = ["loss.dice_weight=0", "training.foreground=0", "training.steps_per_epoch=20"]
    config = load_config(None, [*TINY, "plan.width=8", *alone])
    run = volseg.train(listed, tmp_path / "run", config=config, epochs=5, device="cpu")
    dataset, predictor = find_dataset(listed), volseg.Predictor.load(run, device="cpu")
    for case in dataset.cases:
        segmentation = predictor(case.images)
        assert set(np.unique(segmentation.labels)) == {0, 1, 2}
        segmentation.save(tmp_path / "p" / f"{case.case_id}.nii.gz")
    # Also what the labels of a case do not show.
    found = evaluate(tmp_path / "p", listed.parent / "whole").summary
    assert min(row.mean_dice for row in found.classes) > 0.7
    # Only what they show is scored.
    rows = score_dataset(tmp_path / "p", dataset, tmp_path / "s").rows
    scored = {case.case_id: set() for case in dataset.cases}
    for row in rows:
        scored[row.case_id].add(row.class_name)
    assert list(scored.values()) == [
        {f"label_{value}" for value in shown} for shown in VALIDATE + LEARN
    ]
