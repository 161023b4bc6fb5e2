"""Names of the user's own networks and losses: what is imported, and what never is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from volseg import extensions
from volseg.errors import ConfigError
from volseg.extensions import check_name, find, find_installed, list_own, register


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a test registers is known to the next one."""
    monkeypatch.setattr(extensions, "_registered", {})


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module that leaves a file behind when it is imported."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "import pathlib\n"
        "pathlib.Path(__file__).with_name('imported').touch()\n"
        "def make():\n    return 'made'\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return name


def install(folder: Path, group: str, name: str, value: str) -> None:
    """A package as pip leaves it, as far as entry points go."""
    info = folder / "their_package-1.2.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")


def test_module_and_function_are_imported_once_registered(module: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"never imported because a file.*--loss {module}:make"):
        check_name("losses", "loss.name", f"{module}:make", ["dice_ce"])
    assert not (tmp_path / "imported").exists()
    assert module not in sys.modules
    register("losses", f"{module}:make")
    check_name("losses", "loss.name", f"{module}:make", ["dice_ce"])
    assert find("losses", f"{module}:make")() == "made"
    assert (tmp_path / "imported").exists()


def test_what_is_registered_as_one_kind_is_not_the_other(module: str) -> None:
    register("losses", f"{module}:make")
    assert list_own("networks") == []
    with pytest.raises(ConfigError, match=f"--network {module}:make"):
        check_name("networks", "network", f"{module}:make", ["unet"])


def test_function_of_a_notebook_has_any_name() -> None:
    register("networks", "mine", lambda: "made here")
    check_name("networks", "network", "mine", [])
    assert find("networks", "mine")() == "made here"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("make", "expected module:function"),
        (":make", "expected module:function"),
        ("{module}:", "expected module:function"),
        ("no_such_module:make", "finds no module 'no_such_module'.*PYTHONPATH=FOLDER"),
        ("{module}:other", "has no function or class 'other'"),
        ("{module}:number", "has no function or class 'number'"),
        ("broken_code:make", r"cannot be imported \(ZeroDivisionError: division by zero\)"),
    ],
)
def test_what_cannot_be_imported_is_one_error(
    module: str, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "broken_code.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=message):
        register("networks", name.format(module=module))


def test_entry_point_is_found_by_name_and_imported_when_it_is_used(
    module: str, tmp_path: Path
) -> None:
    install(tmp_path, "volseg.losses", "theirs", f"{module}:make")
    check_name("losses", "loss.name", "theirs", ["dice_ce"])
    assert list_own("losses") == ["theirs"]
    assert list_own("networks") == []
    assert extensions.describe(find_installed("losses")["theirs"]) == "their-package 1.2"
    assert not (tmp_path / "imported").exists()
    assert find("losses", "theirs")() == "made"
    assert (tmp_path / "imported").exists()


def test_entry_point_that_cannot_be_imported_names_its_package(module: str, tmp_path: Path) -> None:
    install(tmp_path, "volseg.losses", "theirs", f"{module}:gone")
    with pytest.raises(ConfigError, match=r"'theirs' of .* their-package 1\.2 cannot be imported"):
        find("losses", "theirs")


def test_unknown_name_offers_installed_ones_too(module: str, tmp_path: Path) -> None:
    install(tmp_path, "volseg.networks", "theirs", f"{module}:make")
    with pytest.raises(ConfigError, match=r"'their'; expected one of unet, theirs\..*'theirs'"):
        check_name("networks", "network", "their", ["unet"])
