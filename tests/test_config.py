"""Configuration files and overrides, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from volseg.config import Config, dump_yaml, load_config, parse_yaml, with_length
from volseg.errors import ConfigError

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))


def test_override_wins_over_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("plan: {width: 32}\noptimizer: {learning_rate: 1e-3}\n")
    config = load_config(path, ["plan.width=8", "plan.patch=[32, 32, 16]"])
    assert (config.plan.width, config.plan.patch) == (8, (32, 32, 16))
    assert config.optimizer.learning_rate == 0.001


def test_config_survives_a_round_trip(tmp_path: Path) -> None:
    config = load_config(None, ["training.minutes=4", "plan.spacing_mm=[1, 1, 2.5]"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config.model_dump(mode="json")))
    assert Config.read_yaml(path) == config


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "+1.e-5", "1.0e-5", "100e-7", ".1e-4"])
def test_a_number_may_be_written_as_everywhere(text: str) -> None:
    options = load_config(None, [f"loss.options={{smooth: {text}}}"]).loss.options
    assert options["smooth"] == pytest.approx(1e-5)


@pytest.mark.parametrize("text", ["1e-5", "3E2", ".5e3", "1e", "e5", "1e5a", "1-e5"])
def test_text_that_looks_like_a_number_stays_text(text: str) -> None:
    written = dump_yaml({"name": text, "names": [text]})
    assert parse_yaml(written) == {"name": text, "names": [text]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["netwrk.name=x"], "unknown key 'netwrk'. Did you mean 'network'"),
        (["network.nme=x"], "unknown key 'network.nme'. Did you mean 'network.name'"),
        (["training.minutes=-1"], "training.minutes: input should be greater than 0"),
        (["plan.width"], "expected key=value"),
        (["plan.width=3", "plan.width.x=1"], "'width' is a value, not a section"),
        (["plan.patch=[1"], "not valid YAML"),
    ],
)
def test_wrong_override_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_file_is_named_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("optimizer: {nesterov: true}")
    with pytest.raises(ConfigError, match=r"c\.yaml: unknown key 'optimizer.nesterov'"):
        load_config(path)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match=r"c\.yaml is not valid YAML"):
        load_config(path)


def test_yaml_tags_are_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"a: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path)
    assert not (tmp_path / "made").exists()


def test_length_is_minutes_or_epochs() -> None:
    assert with_length(Config(), None, None).training.minutes == 60
    assert with_length(Config(), 4, None).training.minutes == 4
    by_epochs = with_length(load_config(None, ["training.minutes=4"]), None, 3).training
    assert (by_epochs.minutes, by_epochs.epochs) == (None, 3)
    with pytest.raises(ConfigError, match="both minutes and epochs"):
        with_length(Config(), 4, 3)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid_and_commented(path: Path) -> None:
    load_config(path)
    assert path.read_text().startswith("#")
    assert yaml.safe_load(path.read_text())


def test_momentum_is_refused_where_it_would_do_nothing() -> None:
    with pytest.raises(ConfigError, match="momentum is of muon and sgd"):
        load_config(None, ["optimizer.momentum=0.9", "optimizer.name=adamw"])
    assert load_config(None, ["optimizer.momentum=0.9"]).optimizer.momentum == 0.9
