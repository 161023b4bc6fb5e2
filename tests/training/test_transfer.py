"""Trainings that begin with the weights of another model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from makers import make_dataset

import volseg
from volseg.config import Config, PlanConfig, load_config
from volseg.data.cases import Classes
from volseg.data.layouts import find_dataset
from volseg.data.splits import read_splits
from volseg.errors import ConfigError
from volseg.inference.model import build_planned_network, read_facts
from volseg.losses import DiceCrossEntropy, MultiLevelLoss
from volseg.networks import build_network, list_networks
from volseg.networks.weights import load_weights, save_weights
from volseg.planning import Plan
from volseg.training.budget import Budget
from volseg.training.engine import create_trainer, make_learner
from volseg.training.transfer import adapt_plan, count_seen, freeze, transfer_weights


def source_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_weights(run / "fold_0" / "checkpoint_last.pt")["network"]


def build(plan: Plan, classes: Classes) -> torch.nn.Module:
    torch.manual_seed(1)
    return build_planned_network(plan, classes.num_outputs)


def test_same_classes_and_channels_are_taken_as_they_are(run: Path) -> None:
    facts = read_facts(run)
    network = build(facts.plan, facts.classes)
    report = transfer_weights(network, facts.plan, facts.classes, run)
    for name, tensor in source_weights(run).items():
        assert torch.equal(network.state_dict()[name], tensor), name
    assert (report.fresh, report.unused, report.new_classes) == ((), (), ())


def test_classes_are_matched_by_name(run: Path) -> None:
    facts = read_facts(run)
    background, first, second = facts.classes.names
    classes = Classes(names=(background, second, "new", first), values=(0, 1, 2, 3))
    network = build(facts.plan, classes)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = transfer_weights(network, facts.plan, classes, run)
    theirs = source_weights(run)
    heads = [name for name in report.adapted if name.startswith("heads.")]
    assert heads
    assert report.new_classes == ("new",)
    for name in heads:
        ours = network.state_dict()[name]
        assert torch.equal(ours[[0, 1, 3]], theirs[name][[0, 2, 1]]), name
        assert torch.equal(ours[2], before[name][2]), name


def test_channels_are_matched_by_name_and_new_ones_begin_with_the_mean(run: Path) -> None:
    facts = read_facts(run)
    (old,) = facts.plan.normalisation
    new = old.model_copy(update={"channel": "T2"})
    plan = facts.plan.model_copy(update={"normalisation": (new, old)})
    network = build(plan, facts.classes)
    report = transfer_weights(network, plan, facts.classes, run)
    (first,) = [name for name in report.adapted if not name.startswith("heads.")]
    ours, theirs = network.state_dict()[first], source_weights(run)[first]
    assert ours.shape[1] == 2
    assert torch.equal(ours[:, 1:], theirs)
    assert torch.equal(ours[:, :1], theirs.mean(1, keepdim=True))
    assert "new channels: T2" in str(report)


@pytest.mark.parametrize("name", list_networks())
def test_every_network_gives_what_its_classes_gave_before(
    name: str, run: Path, tmp_path: Path
) -> None:
    from bundle.test_export import make_run

    source = make_run(run, name, tmp_path / "source")
    facts = read_facts(tmp_path / "source")
    names = facts.classes.names
    classes = Classes(names=(*names, "new"), values=(*facts.classes.values, 99))
    network = build(facts.plan, classes).eval()
    transfer_weights(network, facts.plan, classes, tmp_path / "source")
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(network(image)[:, : len(names)], source(image))


def test_plan_is_that_of_the_other_model(run: Path) -> None:
    plan = read_facts(run).plan
    other = plan.model_copy(
        update={
            "patch": (32, 32, 32),
            "batch_size": 1,
            "normalisation": tuple(
                n.model_copy(update={"nonzero_only": True}) for n in plan.normalisation
            ),
        }
    )
    assert adapt_plan(other, run) == plan


def test_fixed_values_are_kept_where_the_weights_allow_them(run: Path) -> None:
    plan = read_facts(run).plan
    fixed = {"patch": (32, 32, 16), "batch_size": 3, "spacing_mm": (2.0, 2.0, 3.0)}
    wider = plan.network.model_copy(update={"channels": (6, 10, 14)})
    other = plan.model_copy(update={**fixed, "network": wider})
    assert adapt_plan(other, run, PlanConfig(**fixed)) == plan.model_copy(update=fixed)
    one = PlanConfig(batch_size=3)
    assert adapt_plan(other, run, one) == plan.model_copy(update={"batch_size": 3})


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("plan.width=5", "width"),
        ("plan.num_levels=2", "num_levels"),
        ("network.name=laddernet", "network.name"),
    ],
)
def test_another_network_than_the_weights_have_is_refused(
    setting: str, named: str, run: Path, balls: Path, tmp_path: Path
) -> None:
    config = load_config(None, [setting, f"training.start_from={run}"])
    with pytest.raises(ConfigError, match=rf"contradicts the {re.escape(named)} of .*Leave it out"):
        volseg.train(balls, tmp_path / "run", config=config, epochs=1)
    assert not (tmp_path / "run" / "plan.yaml").exists()


def test_another_network_is_refused(run: Path, tmp_path: Path) -> None:
    facts = read_facts(run)
    shape = facts.plan.network.model_copy(update={"channels": (6, 10, 14)})
    plan = facts.plan.model_copy(update={"network": shape})
    with pytest.raises(ConfigError, match=r"no tensor of .* fits the planned network"):
        transfer_weights(build(plan, facts.classes), plan, facts.classes, run)


def test_training_begins_where_the_other_ended(run: Path, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", "msd", num_cases=5, values=(3, 7), shape=(20, 18, 14))
    settings = (f"training.start_from={run}", "optimizer.learning_rate=1e-9", "optimizer.ema=0")
    config = load_config(None, [*TINY, *settings, "training.steps_per_epoch=1"])
    new = volseg.train(dataset, tmp_path / "run", config=config, epochs=1)
    assert read_facts(new).plan.network == read_facts(run).plan.network
    for name, tensor in source_weights(run).items():
        torch.testing.assert_close(source_weights(new)[name], tensor, atol=1e-6, rtol=0)


def test_frozen_parts_stay_as_they_are(balls: Path, tmp_path: Path) -> None:
    config = load_config(None, [*TINY, "optimizer.freeze=[encoder]"])
    run = volseg.train(balls, tmp_path / "run", config=config, epochs=1)
    facts = read_facts(run)
    torch.manual_seed(0)  # As the first fold's network begins.
    begun = build_planned_network(facts.plan, facts.classes.num_outputs).state_dict()
    for name, tensor in source_weights(run).items():
        assert torch.equal(tensor, begun[name]) == name.startswith("encoder."), name


def test_running_statistics_of_frozen_parts_stay_as_they_are() -> None:
    options = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": (4, 6)}
    network = build_network("unet", **options, norm="batch")
    freeze(network, ["encoder"])
    loss, device = MultiLevelLoss(DiceCrossEntropy()), torch.device("cpu")
    learner = make_learner(network, loss, device, Budget(1), Config().optimizer, seed=0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    image, target = 5 + torch.randn(2, 1, 8, 8), torch.ones(2, 8, 8, dtype=torch.int64)
    create_trainer(learner).run([(image, target)])
    running = [name for name in before if "running_" in name]
    assert {name.partition(".")[0] for name in running} == {"encoder", "decoder"}
    for name in running:
        is_same = torch.equal(network.state_dict()[name], before[name])
        assert is_same == name.startswith("encoder."), name


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["encode"], "expected the name of a part of the network, such as encoder, decoder, heads"),
        (["encoder", "decoder", "heads"], "leaves nothing to train"),
    ],
)
def test_wrong_parts_cannot_be_frozen(parts: list[str], message: str, run: Path) -> None:
    facts = read_facts(run)
    with pytest.raises(ConfigError, match=message):
        freeze(build(facts.plan, facts.classes), parts)


@pytest.fixture
def two_folds(run: Path, tmp_path: Path) -> Path:
    """A run with a second fold of other weights."""
    source = shutil.copytree(run, tmp_path / "source")
    (source / "fold_1").mkdir()
    state = load_weights(source / "fold_0" / "checkpoint_last.pt")
    state["network"] = {name: tensor + 1 for name, tensor in state["network"].items()}
    save_weights(source / "fold_1" / "checkpoint_last.pt", state)
    return source


@pytest.mark.parametrize(("fold", "taken"), [(0, 0), (1, 1), (3, 0)])
def test_fold_begins_with_its_own_number(fold: int, taken: int, two_folds: Path) -> None:
    facts = read_facts(two_folds)
    network = build(facts.plan, facts.classes)
    report = transfer_weights(network, facts.plan, facts.classes, two_folds, fold)
    assert report.source == two_folds / f"fold_{taken}" / "checkpoint_last.pt"


def test_cases_that_the_weights_have_seen_are_counted(two_folds: Path, balls: Path) -> None:
    cases = {case.case_id: case for case in find_dataset(balls).cases}
    splits = read_splits(two_folds / "splits.json", list(cases.values()))
    for fold, (seen, unseen) in enumerate((split.train, split.validation) for split in splits[:2]):
        assert count_seen(two_folds, fold, [cases[name] for name in seen]) == 4
        assert count_seen(two_folds, fold, [cases[name] for name in unseen]) == 0
    # Of fold 2, which was not trained, fold 0 has seen what validates.
    assert count_seen(two_folds, 2, [cases[name] for name in splits[2].validation]) == 1


def test_validation_on_what_the_weights_have_seen_is_said(
    run: Path, balls: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(None, [f"training.start_from={run}", "training.steps_per_epoch=1"])
    volseg.train(balls, tmp_path / "run", config=config, epochs=1)
    assert "that are to validate" not in caplog.text
    volseg.train(balls, tmp_path / "run", config=config, epochs=1, fold=1)
    assert "was trained on 1 of the 1 cases that are to validate" in caplog.text


def test_a_plan_with_another_network_than_the_weights_have_is_refused(
    run: Path, balls: Path, tmp_path: Path
) -> None:
    plan = read_facts(run).plan
    shape = plan.network.model_copy(update={"channels": (6, 10, 14)})
    (tmp_path / "run").mkdir()
    find_dataset(balls).write_json(tmp_path / "run" / "dataset.json")
    plan.model_copy(update={"network": shape}).write_yaml(tmp_path / "run" / "plan.yaml", ())
    config = load_config(None, [f"training.start_from={run}"])
    with pytest.raises(ConfigError, match="is there, with another network than"):
        volseg.train(balls, tmp_path / "run", config=config, epochs=1)


def test_the_background_and_capitals_are_matched_whatever_they_are_called(run: Path) -> None:
    facts = read_facts(run)
    _, first, second = facts.classes.names
    classes = Classes(names=("nothing", first.upper(), second), values=(0, 1, 2))
    network = build(facts.plan, classes)
    report = transfer_weights(network, facts.plan, classes, run)
    assert report.new_classes == ()
    more = Classes(names=("nothing", "New", second), values=(0, 1, 2))
    new = transfer_weights(build(facts.plan, more), facts.plan, more, run).new_classes
    assert new == ("New",)
    for name, tensor in source_weights(run).items():
        assert torch.equal(network.state_dict()[name], tensor), name


def test_report_names_what_is_left(run: Path) -> None:
    facts = read_facts(run)
    deeper = facts.plan.network.model_copy(
        update={
            "channels": (*facts.plan.network.channels, 20),
            "strides": (*facts.plan.network.strides, (2, 2, 2)),
            "kernel_sizes": (*facts.plan.network.kernel_sizes, (3, 3, 3)),
        }
    )
    plan = facts.plan.model_copy(update={"network": deeper})
    report = transfer_weights(build(plan, facts.classes), plan, facts.classes, run)
    assert f"left as initialised ({report.fresh[0]}, {report.fresh[1]}" in str(report)
    assert ", ...)" in str(report)


@pytest.mark.parametrize("splits", ['[{"train": ["case_00"], "validation": []}]', "edited", None])
def test_a_source_that_does_not_say_what_it_has_seen(
    splits: str | None, two_folds: Path, balls: Path
) -> None:
    cases = find_dataset(balls).cases
    path = two_folds / "splits.json"
    path.unlink() if splits is None else path.write_text(splits)
    assert count_seen(two_folds, 1, cases) is None
