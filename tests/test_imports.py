"""The import direction of the package, read from its source."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "volseg"

# A module may import from its own level or below; the first matching prefix decides.
LEVELS = {
    "volseg._version": 0,
    "volseg.errors": 0,
    "volseg.extensions": 0,
    "volseg.atomic": 0,
    "volseg.geometry": 0,
    "volseg.allocation": 0,
    "volseg.control_groups": 0,
    "volseg.cores": 0,
    "volseg.config": 1,
    "volseg.progress": 1,
    "volseg.images": 1,
    "volseg.data.cases": 1,
    "volseg.data.splits": 1,
    "volseg.data.layouts": 1,
    "volseg.data.check": 1,
    "volseg.data.content": 1,
    "volseg.data.reading": 1,
    "volseg.run_folder": 1,
    "volseg.planning": 2,
    "volseg.networks": 2,
    "volseg.losses": 2,
    "volseg.data": 3,
    "volseg.inference": 4,
    "volseg.evaluation": 4,
    "volseg.training": 5,
    "volseg.bundle": 6,
    "volseg.demo": 7,
    "volseg.cli": 7,
    "volseg.__main__": 7,
    "volseg": 7,
}
HEAVY = {"torch", "monai", "ignite"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def level(name: str) -> int:
    return next(
        n for prefix, n in LEVELS.items() if name == prefix or name.startswith(prefix + ".")
    )


def imports(path: Path) -> set[str]:
    """Every module that `path` imports, anywhere in it; type-checking blocks count too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_downwards(path: Path) -> None:
    name = module_name(path)
    for imported in imports(path):
        if imported.startswith("volseg"):
            assert level(imported) <= level(name), f"{name} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_networks_and_losses_know_neither_config_nor_data(path: Path) -> None:
    if module_name(path).startswith(("volseg.networks", "volseg.losses")):
        rooms = {i.split(".")[1] for i in imports(path) if i.startswith("volseg.")}
        assert rooms <= {"networks", "losses", "errors", "extensions", "atomic"}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_training_imports_ignite(path: Path) -> None:
    if not module_name(path).startswith("volseg.training"):
        assert not any(i.split(".")[0] == "ignite" for i in imports(path))


def test_no_module_is_named_after_nothing() -> None:
    stems = {part for path in MODULES for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert not stems & {"utils", "util", "common", "helpers", "base", "misc"}


@pytest.mark.parametrize(
    "statement",
    [
        "import volseg",
        "import volseg.cli",
        "import volseg.planning",
        "import volseg.data.check, volseg.data.layouts",
        "from volseg.cli import main; main(['--help'])",
    ],
)
def test_light_parts_do_not_import_torch(statement: str) -> None:
    assert find_loaded(statement) == set()


def test_prediction_and_networks_do_not_import_monai() -> None:
    assert find_loaded("import volseg; volseg.Predictor") == {"torch"}
    assert find_loaded("import volseg.networks") == {"torch"}
    assert find_loaded("from volseg.inference import SlidingWindow") >= {"torch", "monai"}


def find_loaded(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('LOADED', *{HEAVY!r} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    return set(result.stdout.split("LOADED")[-1].split())


def test_no_function_is_longer_than_fifty_lines() -> None:
    def length(node: ast.FunctionDef) -> int:
        has_doc = ast.get_docstring(node) is not None
        first = node.body[1] if has_doc and len(node.body) > 1 else node.body[0]
        return (node.end_lineno or 0) - first.lineno + 1

    too_long = [
        f"{module_name(path)}.{node.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and length(node) > 50
    ]
    assert too_long == []
