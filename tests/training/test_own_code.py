"""The user's own network and loss through every command, and that no file makes them imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from conftest import TINY
from monai.bundle import ConfigParser
from monai.networks.nets import SegResNet

from volseg import extensions
from volseg.bundle.workflow import make_inference_config
from volseg.cli import main
from volseg.config import Config, load_config
from volseg.data.cases import Classes
from volseg.errors import ConfigError
from volseg.inference.model import read_facts
from volseg.planning import Plan
from volseg.training.checks import check_training
from volseg.training.loss import make_loss

CODE = """
import pathlib

pathlib.Path(__file__).with_name("imported").touch()

from monai.losses import DiceLoss
from monai.networks.nets import SegResNet


def make(spatial_dims, in_channels, out_channels, width=8):
    blocks = {"blocks_down": (1, 1), "blocks_up": (1,)}
    return SegResNet(spatial_dims, width, in_channels, out_channels, **blocks)


def compare(batch=False):
    return DiceLoss(to_onehot_y=True, softmax=True, batch=batch)
"""
SETTINGS = [word for option in TINY for word in ("--set", option)]
REFUSED = "is code of your own, which is never imported because a file names it"


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extensions, "_registered", {})


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    (folder / "own_code.py").write_text(CODE)
    return folder


def volseg_anew(code: Path, *arguments: str | Path) -> int:
    """Exit code of a command that finds `code` on Python's path and has imported nothing of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extensions, "_registered", {})
        patch.delitem(sys.modules, "own_code", raising=False)
        patch.syspath_prepend(code)
        (code / "imported").unlink(missing_ok=True)
        exit_code = main([str(argument) for argument in arguments])
        sys.modules.pop("own_code", None)
    return exit_code


@pytest.fixture(scope="module")
def own_run(code: Path, balls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by the command line with a network and a loss of the user's own."""
    run = tmp_path_factory.mktemp("runs") / "own"
    own = ("--network", "own_code:make", "--loss", "own_code:compare")
    settings = [word for option in TINY if "width" not in option for word in ("--set", option)]
    settings += ["--set", "network.options.width=16", "--set", "loss.options.batch=true"]
    length = ("--epochs", "2", "--device", "cpu")
    assert volseg_anew(code, "train", balls, "-o", run, *own, *settings, *length) == 0
    return run


def test_plan_and_config_record_the_names_alone(own_run: Path) -> None:
    plan = Plan.read_yaml(own_run / "plan.yaml")
    assert (plan.network.name, plan.network.options) == ("own_code:make", {"width": 16})
    assert "taken for those of the U-Net" in " ".join(
        (own_run / "plan.yaml").read_text().replace("\n# ", " ").split()
    )
    loss = Config.read_yaml(own_run / "fold_0" / "config.yaml").loss
    assert (loss.name, loss.options) == ("own_code:compare", {"batch": True})


def test_prediction_needs_the_users_word(
    own_run: Path, code: Path, balls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = balls / "imagesTr" / "case_00.nii.gz"
    predict = ("predict", own_run, "-i", image, "-o", tmp_path / "p")
    capsys.readouterr()
    assert volseg_anew(code, *predict) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert REFUSED in line
    assert "--network own_code:make" in line
    assert not (code / "imported").exists()
    assert volseg_anew(code, *predict, "--network", "own_code:make") == 0
    assert (tmp_path / "p" / "case_00.nii.gz").exists()


@pytest.mark.parametrize("said", [(), ("network",), ("loss",), ("network", "loss")])
def test_resuming_needs_the_users_word_for_both(
    said: tuple[str, ...],
    own_run: Path,
    code: Path,
    balls: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"network": "own_code:make", "loss": "own_code:compare"}
    own = [word for kind in said for word in (f"--{kind}", names[kind])]
    exit_code = volseg_anew(code, "train", balls, "-o", own_run, "--resume", *own)
    assert exit_code == (0 if len(said) == 2 else 2)
    assert (REFUSED in capsys.readouterr().err) == bool(exit_code)
    assert (code / "imported").exists() == bool(said)


@pytest.mark.parametrize("option", ["--network", "--loss"])
def test_word_for_another_name_is_refused_before_the_import(
    own_run: Path, balls: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", str(balls), "-o", str(own_run), "--resume", option, "no_module:at_all"]
    assert main(arguments) == 2
    assert f"{option} no_module:at_all; " in capsys.readouterr().err


@pytest.mark.parametrize("file", ["plan.yaml", "config"])
def test_name_in_a_file_is_never_imported(
    file: str, code: Path, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.syspath_prepend(code)
    monkeypatch.delitem(sys.modules, "own_code", raising=False)
    (code / "imported").unlink(missing_ok=True)
    arguments = ["train", str(balls), "-o", str(tmp_path / "run")]
    if file == "plan.yaml":
        assert main(["plan", str(balls), "-o", str(tmp_path / "run"), *SETTINGS]) == 0
        path = tmp_path / "run" / "plan.yaml"
        path.write_text(path.read_text().replace("name: unet", "name: own_code:make"))
    else:
        (tmp_path / "c.yaml").write_text("network: {name: 'own_code:make'}\n")
        arguments += ["--config", str(tmp_path / "c.yaml")]
    assert main(arguments) == 2
    assert REFUSED in capsys.readouterr().err
    assert not (code / "imported").exists()
    assert "own_code" not in sys.modules


def test_name_of_a_loss_in_a_file_is_never_imported(
    code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(code)
    monkeypatch.delitem(sys.modules, "own_code", raising=False)
    (code / "imported").unlink(missing_ok=True)
    classes = Classes(names=("background", "a"), values=(0, 1))
    config = load_config(None, ["loss.name=own_code:compare"]).loss
    with pytest.raises(ConfigError, match=rf"loss\.name 'own_code:compare' {REFUSED}"):
        make_loss(config, "unet", 1, classes, (1.0, 1.0, 1.0))
    assert not (code / "imported").exists()


def test_export_writes_the_module_once_the_user_says_so(
    own_run: Path, code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    assert volseg_anew(code, "export", own_run, "-o", tmp_path / "a") == 2
    assert REFUSED in capsys.readouterr().err
    assert not (code / "imported").exists()
    assert not (tmp_path / "a").exists()
    export = ("export", own_run, "-o", tmp_path / "b", "--network", "own_code:make")
    assert volseg_anew(code, *export) == 0
    config = json.loads((tmp_path / "b" / "configs" / "inference.json").read_text())
    assert "$import own_code as own_network" in config["imports"]
    assert config["network_def"]["make"] == "$own_network.make"
    assert config["network_def"]["width"] == 16
    monkeypatch.syspath_prepend(code)
    parser = ConfigParser(config)
    parser.get_parsed_content("imports")
    assert isinstance(parser.get_parsed_content("network_def").network, SegResNet)


def test_a_network_of_a_package_is_found_by_monai(
    own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_package").mkdir()
    (tmp_path / "their_package" / "__init__.py").touch()
    (tmp_path / "their_package" / "nets.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    name = "their_package.nets:make"
    extensions.register("networks", name, lambda: None)
    facts = read_facts(own_run)
    network = facts.plan.network.model_copy(update={"name": name})
    plan = facts.plan.model_copy(update={"network": network})
    parser = ConfigParser(make_inference_config(facts.model_copy(update={"plan": plan})))
    parser.get_parsed_content("imports")
    assert isinstance(parser.get_parsed_content("network_def").network, SegResNet)


def test_name_of_this_process_alone_is_not_exported(own_run: Path, tmp_path: Path) -> None:
    facts = read_facts(own_run)
    plan = facts.plan.model_copy(
        update={"network": facts.plan.network.model_copy(update={"name": "mine"})}
    )
    extensions.register("networks", "mine", lambda: None)
    with pytest.raises(ConfigError, match="'mine' is known to this process alone"):
        make_inference_config(facts.model_copy(update={"plan": plan}))


def test_installed_network_needs_no_word_and_is_listed(
    code: Path, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    info = tmp_path / "site" / "their_package-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "[volseg.networks]\ntheirs = own_code:make\nunet = own_code:make\n"
        "[volseg.losses]\ntheirs = own_code:compare\n"
    )
    monkeypatch.syspath_prepend(code)
    monkeypatch.syspath_prepend(tmp_path / "site")
    settings = [word for option in TINY if "width" not in option for word in ("--set", option)]
    settings += ["--set", "network.name=theirs", "--loss", "theirs"]
    run = str(tmp_path / "run")
    assert main(["train", str(balls), "-o", run, *settings, "--epochs", "1"]) == 0
    assert main(["predict", run, "--validation", "-o", str(tmp_path / "p")]) == 0
    assert main(["evaluate", str(tmp_path / "p"), str(balls), "-o", str(tmp_path / "s")]) == 0
    capsys.readouterr()
    assert main(["networks", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["theirs"]["source"] == "their-package 1.2"
    assert rows["theirs"]["problem"] is None
    assert rows["theirs"]["parameters"] > 1000
    assert rows["unet"]["source"].startswith("Ronneberger")
    assert main(["networks", "theirs"]) == 2
    assert "cannot be drawn" in capsys.readouterr().err


def make_plan_of(name: str, own_run: Path) -> Plan:
    data = yaml.safe_load((own_run / "plan.yaml").read_text())
    data["network"] |= {"name": name, "options": {}}
    return Plan.parse(data, "plan")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["plan.width=4"], r"plan\.width with network 'mine', which does not ask for channels"),
        (["plan.pocket=true"], r"plan\.pocket with network 'mine'"),
        (["training.recompute=true"], r"training\.recompute with network 'mine'"),
        (["optimizer.freeze=[encoder]"], r"optimizer\.freeze 'encoder'; .*such as network"),
        (["loss.supervision_weights=[1, 0.5]"], "which has a single output in training"),
        (["loss.dice_weight=2", "loss.name=mine"], r"loss\.dice_weight with loss\.name 'mine'"),
        (["loss.options.dice_weight=2"], r"loss\.options\.dice_weight with loss\.name 'dice_ce'"),
    ],
)
def test_setting_that_would_do_nothing_is_refused(
    own_run: Path, code: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], message: str
) -> None:
    monkeypatch.syspath_prepend(code)
    extensions.register("networks", "own_code:make")
    extensions.register("networks", "mine", extensions.find("networks", "own_code:make"))
    extensions.register("losses", "mine", extensions.find("networks", "own_code:make"))
    plan = make_plan_of("mine", own_run)
    classes = Classes(names=("background", "a", "b"), values=(0, 1, 2))
    check_training(plan, load_config(None, ["network.name=mine"]), classes)
    with pytest.raises(ConfigError, match=message):
        check_training(plan, load_config(None, ["network.name=mine", *settings]), classes)


def test_own_loss_cannot_leave_unknown_voxels_out() -> None:
    extensions.register("losses", "mine", lambda: None)
    classes = Classes(names=("background", "a"), values=(0, 1), ignore=9)
    with pytest.raises(
        ConfigError, match="'mine' with voxels of unknown class; expected 'dice_ce'"
    ):
        make_loss(load_config(None, ["loss.name=mine"]).loss, "unet", 1, classes, (1.0, 1.0, 1.0))
