"""Which edits of a fold's ``config.yaml`` a resumed training follows, and which it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY

import volseg
from volseg.cli import main
from volseg.config import Config, load_config
from volseg.errors import ConfigError
from volseg.networks.weights import load_weights, save_weights
from volseg.training.checkpoints import list_settings
from volseg.training.muon import Muon

CONFIG = load_config(None, [*TINY, "training.steps_per_epoch=4"])
FOLLOWED = {
    *(f"loss.{key}" for key in type(CONFIG.loss).model_fields),
    *(f"augmentation.{key}" for key in type(CONFIG.augmentation).model_fields),
    "optimizer.learning_rate",
    "optimizer.warmup",
    "optimizer.power",
    "optimizer.gradient_clip",
    "optimizer.ema",
    "training.foreground",
    "training.patience",
    "training.parts",
    "training.precision",
    "training.compile",
    "training.recompute",
    "training.log",
    "training.workers",
}


def train_until_killed(
    balls: Path, path: Path, *, config: Config, epochs: int, whole_steps: int
) -> None:
    """A training that is killed in the step behind so many."""
    steps, update = iter(range(whole_steps)), Muon.step

    def step(self: Any, closure: Any = None) -> Any:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return update(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Muon, "step", step)
        with pytest.raises(KeyboardInterrupt):
            volseg.train(balls, path, config=config, epochs=epochs, device="cpu")


@pytest.fixture(scope="module")
def stopped(balls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of four steps, killed in the sixth step; not to be changed."""
    path = tmp_path_factory.mktemp("runs") / "stopped"
    train_until_killed(balls, path, config=CONFIG, epochs=3, whole_steps=5)
    return path


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def edit(run: Path, **values: Any) -> None:
    """Set values of ``config.yaml``, two underscores between section and key."""
    path = run / "fold_0" / "config.yaml"
    data = yaml.safe_load(path.read_text())
    for name, value in values.items():
        section, _, key = name.partition("__")
        data[section][key] = value
    path.write_text(yaml.safe_dump(data))


def read_last(run: Path) -> dict[str, Any]:
    return load_weights(run / "fold_0" / "checkpoint_last.pt")


def test_every_setting_is_followed_or_kept() -> None:
    keys = {
        f"{section}.{key}" for section, values in Config().model_dump().items() for key in values
    }
    kept = set(list_settings(Config()))
    assert kept | FOLLOWED == keys
    assert not kept & FOLLOWED


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("training__epochs", 5, "training.epochs 5 instead of 3"),
        ("training__steps_per_epoch", 9, "training.steps_per_epoch 9 instead of 4"),
        ("training__seed", 1, "training.seed 1 instead of 0"),
        ("training__num_folds", 2, "training.num_folds 2 instead of 5"),
        ("training__start_from", "other", "training.start_from 'other' instead of None"),
        ("optimizer__name", "sgd", "optimizer.name 'sgd' instead of 'muon'"),
        ("optimizer__momentum", 0.9, "optimizer.momentum 0.9 instead of None"),
        ("optimizer__weight_decay", 0.5, "optimizer.weight_decay 0.5 instead of 0.3"),
        ("optimizer__freeze", ["encoder"], "optimizer.freeze ['encoder'] instead of []"),
        ("network__name", "laddernet", "network.name 'laddernet' instead of 'unet'"),
        ("network__pretrained", "r.pth", "network.pretrained 'r.pth' instead of None"),
        ("plan__batch_size", 7, "plan.batch_size 7 instead of None"),
        ("data__ignore_label", 7, "data.ignore_label 7 instead of None"),
    ],
)
def test_edit_that_cannot_be_followed_is_refused(
    key: str, value: Any, said: str, balls: Path, run: Path
) -> None:
    edit(run, **{key: value})
    before = (run / "fold_0" / "checkpoint_last.pt").read_bytes()
    told = rf"fold_0.config\.yaml has {re.escape(said)}; expected what .* Put it back"
    with pytest.raises(ConfigError, match=told):
        volseg.train(balls, run, resume=True, device="cpu")
    assert (run / "fold_0" / "checkpoint_last.pt").read_bytes() == before


def test_all_of_them_are_named_and_how_to_train_longer(balls: Path, run: Path) -> None:
    edit(run, training__minutes=5, training__epochs=None, optimizer__weight_decay=0)
    with pytest.raises(ConfigError) as refused:
        volseg.train(balls, run, resume=True, device="cpu")
    said = str(refused.value)
    assert "training.minutes 5.0 instead of None, training.epochs None instead of 3" in said
    assert "optimizer.weight_decay 0.0 instead of 0.3" in said
    assert said.endswith("made longer by --resume with --minutes or --epochs.")


def test_edits_are_refused_before_any_fold_is_trained(balls: Path, run: Path) -> None:
    shutil.copytree(run / "fold_0", run / "fold_1")
    edit(run, training__seed=1)
    (run / "fold_0").rename(run / "fold_3")
    with pytest.raises(ConfigError, match=r"fold_3.config\.yaml has training\.seed 1"):
        volseg.train(balls, run, fold="all", resume=True, device="cpu")
    assert not (run / "fold_0").exists()


def test_fold_does_not_depend_on_the_file_of_another(balls: Path, run: Path) -> None:
    shutil.copytree(run / "fold_0", run / "fold_1")
    splits = json.loads((run / "splits.json").read_text())
    (run / "splits.json").write_text(json.dumps([splits[1], splits[0], *splits[2:]]))
    edit(run, data__ignore_label=7)
    volseg.train(balls, run, fold=1, resume=True, device="cpu")
    assert load_weights(run / "fold_1" / "checkpoint_last.pt")["counters"]["step"] == 12


def test_other_edits_are_followed(balls: Path, run: Path) -> None:
    edit(run, optimizer__learning_rate=0.005, loss__name="tversky", training__foreground=1)
    volseg.train(balls, run, resume=True, device="cpu")
    rows = [json.loads(line) for line in (run / "fold_0" / "history.jsonl").open()]
    # The last step of an epoch begins at 3, 7 and 11 twelfths; the first epoch was before.
    rates = [rate * (1 - step / 12) ** 0.9 for rate, step in ((1e-2, 3), (5e-3, 7), (5e-3, 11))]
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates)
    assert read_last(run)["counters"]["step"] == 12


def test_length_of_an_extension_is_kept_from_then_on(balls: Path, run: Path) -> None:
    volseg.train(balls, run, resume=True, device="cpu")
    edit(run, training__steps_per_epoch=2)
    volseg.train(balls, run, resume=True, epochs=1, device="cpu")
    assert read_last(run)["counters"]["step"] == 14
    volseg.train(balls, run, resume=True, device="cpu")
    edit(run, training__epochs=3)
    with pytest.raises(ConfigError, match=r"training\.epochs 3 instead of 1; "):
        volseg.train(balls, run, resume=True, device="cpu")
    edit(run, optimizer__weight_decay=0.5)
    with pytest.raises(ConfigError, match=r"yaml has optimizer\.weight_decay 0\.5 instead of 0"):
        volseg.train(balls, run, resume=True, epochs=1, device="cpu")


def test_several_folds_by_number_are_no_fold(balls: Path, run: Path) -> None:
    with pytest.raises(ConfigError, match=r"fold 0,1; expected 0 to 4, or all"):
        volseg.train(balls, run, fold="0,1", resume=True, device="cpu")


def test_another_split_is_refused(balls: Path, run: Path) -> None:
    path = run / "splits.json"
    splits = json.loads(path.read_text())
    first, second = splits[0], splits[1]
    path.write_text(json.dumps([second, first, *splits[2:]]))
    for fold in (0, "all"):
        with pytest.raises(
            ConfigError, match=r"last\.pt was trained on another split than that of"
        ):
            volseg.train(balls, run, fold=fold, resume=True, device="cpu")
    output = run.with_name("predicted")
    assert main(["predict", str(run), "--validation", "-o", str(output)]) == 2
    assert not output.exists()
    # Other folds may change.
    path.write_text(json.dumps([first, *splits[:1:-1], second]))
    volseg.train(balls, run, resume=True, device="cpu")


def test_checkpoint_of_an_older_version_is_resumed(balls: Path, run: Path) -> None:
    state = read_last(run)
    del state["settings"], state["split"]
    save_weights(run / "fold_0" / "checkpoint_last.pt", state)
    volseg.train(balls, run, resume=True, device="cpu")
    assert read_last(run)["settings"]["training.epochs"] == 3


def test_patience_that_comes_later_has_validations_to_go_by(balls: Path, tmp_path: Path) -> None:
    config, run = load_config(None, [*TINY, "training.steps_per_epoch=1"]), tmp_path / "run"
    train_until_killed(balls, run, config=config, epochs=20, whole_steps=2)
    kept = run / "fold_0" / "config.yaml"
    text = kept.read_text()
    kept.write_text(text.replace("patience: null", "patience: 19"))
    with pytest.raises(ConfigError, match=r"patience 19 .* can validate 20 times"):
        volseg.train(balls, run, resume=True, device="cpu")
    assert read_last(run)["counters"]["validate_every"] > 1
    kept.write_text(text.replace("patience: null", "patience: 6"))
    volseg.train(balls, run, resume=True, device="cpu")
    counters = read_last(run)["counters"]
    assert (counters["validate_every"], counters["patience"]) == (1, 6)
