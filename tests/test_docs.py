"""What README.md and docs/ say of the networks is so."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from volseg.cli import main
from volseg.config import load_config
from volseg.networks import build_network, list_networks, list_options

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(name):
    (text,) = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return text


def code_blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(start):
    lines = [line.partition("  #")[0].strip() for line in (PAGE + README).splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(start)]


@pytest.mark.parametrize("name", list_networks())
def test_every_network_has_a_section_with_its_drawing_and_its_call(name):
    text = section(name)
    assert f"(images/networks/{name}.svg)" in text
    (code,) = code_blocks(text, "python")
    with torch.device("meta"):
        exec(code, found := {})
    expected = build_network(name, spatial_dims=2, in_channels=1, out_channels=2)
    assert type(found["network"]) is type(expected)
    assert f'"{name}"' in code


@pytest.mark.parametrize("name", list_networks())
def test_quoted_parameters_are_those_of_the_code(name):
    (quoted,) = re.findall(r"^Parameters: ([\d,]+) in 2D, ([\d,]+) in 3D", section(name), re.M)
    for spatial_dims, count in zip((2, 3), quoted, strict=True):
        with torch.device("meta"):
            network = build_network(name, spatial_dims=spatial_dims, in_channels=1, out_channels=2)
        assert count == f"{sum(p.numel() for p in network.parameters()):,}"


@pytest.mark.parametrize("name", list_networks())
def test_drawing_is_that_of_the_code_and_small(name):
    drawn = runpy.run_path(str(ROOT / "scripts" / "draw_networks.py"))["draw"](name)
    path = ROOT / "docs" / "images" / "networks" / f"{name}.svg"
    assert path.read_text(encoding="utf-8") == drawn, "run scripts/draw_networks.py"
    assert path.stat().st_size < 30_000


def test_no_drawing_is_left_of_a_network_that_is_gone():
    drawings = (ROOT / "docs" / "images" / "networks").iterdir()
    assert sorted(path.stem for path in drawings) == sorted(list_networks())


def test_readme_lists_every_network():
    assert re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE) == list_networks()


@pytest.mark.parametrize("code", code_blocks(section("Deep supervision"), "python"))
def test_example_of_deep_supervision_trains(code):
    exec(code, found := {})
    assert all(parameter.grad is not None for parameter in found["network"].parameters())


@pytest.mark.parametrize("text", code_blocks(PAGE, "json"))
def test_network_of_a_bundle_can_be_built(text):
    with torch.device("meta"):
        network = ConfigParser(json.loads(text)).get_parsed_content("network_def")
    assert len(network.ladders) == 3


def test_table_of_deep_supervision_is_that_of_the_code():
    rows = re.findall(r"^\| (`\w+`.*?) \| .*? \| (.*?) \|", section("Deep supervision"), re.M)
    outputs = {name: text for names, text in rows for name in re.findall(r"`(\w+)`", names)}
    assert sorted(outputs) == sorted(list_networks())
    for name, text in outputs.items():
        has_list = "deep_supervision" in list_options(name)
        assert text.startswith("one tensor") != has_list, name


@pytest.mark.parametrize("arguments", commands("volseg networks"), ids=" ".join)
def test_command_about_networks_runs(arguments, capsys):
    assert main(arguments) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("arguments", commands("volseg train"), ids=" ".join)
def test_settings_of_a_training_exist(arguments):
    settings = [b for a, b in itertools.pairwise(arguments) if a == "--set"]
    config = load_config(None, settings)
    assert config.network.name in list_networks()


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[\w-]*)?\)", text):
            assert not target or (page.parent / target).exists(), f"{page}: {target}"
