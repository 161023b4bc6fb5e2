"""From the configuration to the loss of a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TINY
from torch import Tensor

import volseg
from volseg.config import LossConfig, load_config
from volseg.data.cases import Classes, Region
from volseg.errors import ConfigError
from volseg.losses import (
    BoundaryLoss,
    DiceCrossEntropy,
    DiceFocal,
    HausdorffLoss,
    MultiLevelLoss,
    RegionLoss,
    Tversky,
    list_boundary_terms,
    list_losses,
)
from volseg.training.loss import make_loss

CLASSES = Classes(names=("background", "a", "b"), values=(0, 1, 2))
REGIONS = CLASSES.model_copy(
    update={"regions": (Region(name="all", values=(1, 2)), Region(name="b", values=(2,)))}
)
UNKNOWN = CLASSES.model_copy(update={"ignore": 9})


def make(*settings: str, classes: Classes = CLASSES) -> MultiLevelLoss:
    config = load_config(None, settings).loss
    return make_loss(config, "unet", 2, classes, (2.0, 1.0, 4.0))


def test_default_is_dice_with_cross_entropy_and_nothing_else() -> None:
    loss = make("loss.dice_weight=3", "loss.options.include_background=true")
    assert isinstance(loss.loss, DiceCrossEntropy)
    assert (loss.loss.dice_weight, loss.loss.cross_entropy_weight) == (3, 1)
    assert loss.loss.dice.min_channels == 2
    assert loss.boundary is None


def test_name_and_options_choose_the_loss() -> None:
    focal = make("loss.name=dice_focal", "loss.options={gamma: 3, focal_weight: 2}").loss
    assert isinstance(focal, DiceFocal)
    assert (focal.gamma, focal.focal_weight, focal.activation) == (3, 2, "softmax")
    tversky = make("loss.name=focal_tversky", classes=REGIONS).loss
    assert isinstance(tversky, RegionLoss)
    assert isinstance(tversky.loss, Tversky)
    assert (tversky.loss.activation, tversky.loss.gamma) == ("sigmoid", 4 / 3)


def test_second_term_knows_voxel_size_weight_and_schedule() -> None:
    term = make("loss.boundary=boundary", "loss.boundary_weight=3").boundary
    assert isinstance(term.loss, BoundaryLoss)
    assert term.loss.spacing == (2, 1, 4)
    assert (term.weight, term.schedule) == (3, "linear")
    settings = ["loss.boundary=hausdorff", "loss.boundary_options.alpha=1"]
    term = make(*settings, "loss.boundary_schedule=cosine", classes=REGIONS).boundary
    assert isinstance(term.loss, RegionLoss)
    assert isinstance(term.loss.loss, HausdorffLoss)
    assert (term.loss.loss.alpha, term.loss.loss.activation) == (1, "sigmoid")
    assert term.schedule == "cosine"


@pytest.mark.parametrize(
    ("settings", "classes", "message"),
    [
        (["loss.name=dice"], CLASSES, r"loss\.name 'dice'; expected one of dice_ce"),
        (
            ["loss.name=tversky", "loss.dice_weight=2"],
            CLASSES,
            r"loss\.dice_weight with loss\.name",
        ),
        (["loss.name=tversky", "loss.options.x=2"], CLASSES, "option of loss 'tversky' 'x'"),
        (["loss.name=tversky"], UNKNOWN, "'tversky' with voxels of unknown class"),
        (["loss.boundary=cldice"], UNKNOWN, "'cldice' with voxels of unknown class"),
        (
            ["loss.options.candidates=[[0, 1]]"],
            CLASSES,
            r"loss\.options\.candidates with loss\.name",
        ),
        (["loss.boundary_weight=2"], CLASSES, r"loss\.boundary_weight without loss\.boundary"),
        (["loss.boundary_schedule=cosine"], CLASSES, "boundary_schedule without"),
        (["loss.boundary_options.alpha=2"], CLASSES, "boundary_options without"),
        (["loss.boundary=hausdorf"], CLASSES, "Did you mean 'hausdorff'"),
    ],
)
def test_loss_that_cannot_be_made_is_refused(
    settings: list[str], classes: Classes, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(*settings, classes=classes)


def test_refusal_comes_before_anything_is_prepared(balls: Path, tmp_path: Path) -> None:
    config = load_config(None, [*TINY, "loss.boundary=cldice", "data.ignore_label=7"])
    with pytest.raises(ConfigError, match="'cldice' with voxels of unknown class"):
        volseg.train(balls, tmp_path / "run", config=config, epochs=1)
    assert not (tmp_path / "run" / "plan.yaml").exists()
    assert not (tmp_path / "run" / "cache").exists()


@pytest.mark.parametrize("classes", [CLASSES, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("term", [None, *list_boundary_terms()])
@pytest.mark.parametrize("name", list_losses())
def test_every_loss_with_every_term_trains_all_outputs(
    name: str, term: str | None, classes: Classes
) -> None:
    settings = [f"loss.name={name}"]
    if term:
        settings += [f"loss.boundary={term}", "loss.boundary_schedule=constant"]
    loss = make(*settings, classes=classes)
    generator = torch.manual_seed(0)
    shapes = [(2, classes.num_outputs, n, n, n) for n in (8, 4)]
    logits = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    target = torch.randint(0, 3, (2, 8, 8, 8), generator=generator)
    loss(logits, target).backward()
    for output in logits:
        assert torch.isfinite(output.grad).all()
        assert output.grad.abs().sum() > 0


def test_training_follows_the_schedule_of_the_second_term(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []
    forward = MultiLevelLoss.forward

    def record(self: MultiLevelLoss, logits: list[Tensor], target: Tensor) -> Tensor:
        seen.append((self.progress, self.boundary.weigh(self.progress)))
        return forward(self, logits, target)

    monkeypatch.setattr(MultiLevelLoss, "forward", record)
    settings = [*TINY, "loss.name=dice_focal", "loss.boundary=surface", "loss.boundary_weight=0.8"]
    config = load_config(None, [*settings, "training.steps_per_epoch=4"])
    volseg.train(balls, tmp_path / "run", config=config, epochs=1)
    assert seen == [(0, 0), (0.25, 0.2), (0.5, 0.4), (0.75, pytest.approx(0.6))]


def test_record_of_a_loss_is_read_back() -> None:
    config = LossConfig(name="tversky", boundary="cldice", boundary_options={"iterations": 3})
    assert LossConfig.parse(config.model_dump(mode="json"), "x") == config
