"""``volseg networks``: the table, the drawing of one network, options and what is refused."""

from __future__ import annotations

import json

import pytest

from volseg.cli import main
from volseg.networks import PRESETS, build_network, list_networks

SMALL = ("--spatial-dims", "2", "--set", "channels=[4,6,8]")


@pytest.fixture
def run_networks(capsys: pytest.CaptureFixture[str]):
    """Exit code, lines on standard output, text on standard error."""

    def run(*arguments: str) -> tuple[int, list[str], str]:
        code = main(["networks", *arguments])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


@pytest.fixture
def read_json(run_networks):
    def read(*arguments: str):
        code, lines, _ = run_networks(*arguments, "--json")
        assert code == 0
        return json.loads("\n".join(lines))

    return read


def drawing_of(lines: list[str]) -> list[str]:
    """The lines between the first two empty ones."""
    first = lines.index("")
    return lines[first + 1 : lines.index("", first + 1)]


def test_table_fits_80_columns_and_names_every_network_with_its_source(run_networks):
    code, lines, _ = run_networks(*SMALL)
    assert code == 0
    assert max(map(len, lines)) <= 80
    first_words = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert [word for word in first_words if word in PRESETS] == list_networks()
    assert "Zhuang 2018" in next(line for line in lines if line.startswith("laddernet "))


def test_table_shows_widths_of_the_sources_and_counts_in_millions(run_networks):
    _, lines, _ = run_networks()
    # The parameters of Cicek's network with one channel and two classes.
    assert next(line for line in lines if line.startswith("unet3d_original")).split()[1] == "19.07"


def test_costs_are_those_of_the_network_that_is_built(read_json):
    rows = read_json(*SMALL, "--in-channels", "2", "--classes", "5")
    assert [row["name"] for row in rows] == list_networks()
    for row in rows:
        network = build_network(
            row["name"], spatial_dims=2, in_channels=2, out_channels=5, channels=[4, 6, 8]
        )
        assert row["parameters"] == sum(p.numel() for p in network.parameters())
        assert row["gflop"] > 0
        assert row["problem"] is None


def test_operations_grow_with_the_patch(read_json):
    small, large = (read_json(*SMALL, "--patch", patch)[0] for patch in ("32,32", "64,64"))
    assert large["gflop"] == pytest.approx(4 * small["gflop"])
    # Statistics of a normalisation do not grow.
    assert large["training_mb"] == pytest.approx(4 * small["training_mb"], rel=0.01)


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("unet", ("channels=[4,4,4,4,4,4]",), 64),
        # One voxel at the coarsest level is too few: 2 * 2**6.
        ("unet", ("channels=[4,4,4,4,4,4,4]",), 128),
        # Multiples of 9.
        ("unet", ("channels=[4,4,4]", "strides=[1,3,3]"), 72),
        # 188 falls to 4 at the coarsest level, and 4 stays 4 on the way up; 3 would fall to 0.
        ("unet_original", ("padding=valid", "align=crop"), 188),
    ],
)
def test_a_patch_is_64_or_what_the_network_needs(name, options, size, read_json):
    arguments = [part for option in options for part in ("--set", option)]
    found = read_json(name, "--spatial-dims", "2", *arguments)
    assert found["size"] == [size, size]


def test_the_table_has_one_patch_for_all_networks(run_networks):
    deep = ("--spatial-dims", "2", "--set", "channels=[4,4,4,4,4,4,4]")
    _, lines, _ = run_networks(*deep)
    assert next(line for line in lines if line.startswith("unet ")).split()[1] != "-"
    # The network of most need is resnet_unet, whose stem strides too: 2 * 2**7.
    assert any("Per image of 256x256:" in line for line in lines)
    _, lines, _ = run_networks(*SMALL)
    assert any("Per image of 64x64:" in line for line in lines)


def test_a_patch_that_is_given_is_kept_or_refused(run_networks, read_json):
    deep = ("unet", "--spatial-dims", "2", "--set", "channels=[4,4,4,4,4,4,4]")
    assert read_json(*deep, "--patch", "64,128")["size"] == [64, 128]
    code, _, err = run_networks(*deep, "--patch", "64,64")
    assert code == 2
    assert "one voxel at the coarsest level" in err


def test_a_network_that_cannot_take_the_patch_says_why(run_networks, read_json):
    rows = {row["name"]: row for row in read_json(*SMALL, "--patch", "30,32")}
    assert "input size [30, 32]" in rows["unet"]["problem"]
    assert rows["unet"]["parameters"] is None
    assert rows["unet_original"]["problem"] is None
    _, lines, _ = run_networks(*SMALL, "--patch", "30,32")
    assert max(map(len, lines)) <= 80
    assert "Pad to [32, 32]." in " ".join(" ".join(lines).split())


def test_a_network_without_the_option_says_so(read_json):
    rows = {row["name"]: row for row in read_json(*SMALL, "--set", "num_ladders=3")}
    assert rows["laddernet"]["problem"] is None
    assert "option of network 'unet' 'num_ladders'" in rows["unet"]["problem"]


@pytest.mark.parametrize("name", list_networks())
def test_every_network_is_drawn_in_80_columns(name, run_networks):
    code, lines, _ = run_networks(name)
    assert code == 0
    assert max(map(len, lines)) <= 80
    drawing = drawing_of(lines)
    assert drawing[0].startswith("1 64x64x64    (1)") or drawing[1].startswith("1 64x64x64    (1)")
    assert sum(line.startswith("1") for line in drawing) >= 4
    assert "[2]" in "".join(drawing) or "[+]" in "".join(drawing) or "[c2]" in "".join(drawing)
    for fact in ("parameters", "operations", "memory", "divisor", "source", "options"):
        assert any(line.startswith(fact) for line in lines)
    assert any("doi" in line for line in lines)


def test_drawing_of_a_unet_by_hand(run_networks):
    _, lines, _ = run_networks("unet", *SMALL, "--set", "deep_supervision=true", "--patch", "8,8")
    assert drawing_of(lines) == [
        "1 8x8    (1)─4───────>c4─[2]",
        "1/2 4x4        6──>c6",
        "1/4 2x2          8",
    ]


def test_what_lines_cannot_show_is_said(run_networks):
    _, lines, _ = run_networks("unetplusplus", *SMALL)
    assert "nodes.0_2 also takes nodes.0_0" in lines
    _, lines, _ = run_networks("unet_summed_logits", *SMALL)
    assert "the sum behind encoder.0 also takes transitions.0" in lines
    _, lines, _ = run_networks("resnet_unet", "--patch", "64,64,96")
    assert "decoder.2 also takes stages.1 (at 1/4)" in lines


def test_options_are_shown_as_they_are_set(run_networks):
    _, lines, _ = run_networks("laddernet", "--set", "num_ladders=3", "--set", "norm=batch")
    shown = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert shown["num_ladders"] == "3"
    assert shown["norm"] == "batch"
    assert shown["dropout"] == "0.25"
    assert sum("+16" in line for line in drawing_of(lines)) == 1
    # Every ladder has its decoder, and all but the first add the one before.
    assert drawing_of(lines)[0].count("+16") == 5


def test_options_of_the_preset_are_the_defaults(read_json):
    assert read_json("unet_keras")["options"]["upsampling"] == "nearest"
    assert read_json("unet_original")["options"]["upsampling"] == "deconv"


def test_too_many_blocks_are_listed_instead(run_networks):
    code, lines, _ = run_networks("laddernet", "--set", "num_ladders=9")
    assert code == 0
    assert max(map(len, lines)) <= 80
    assert "1/8 8x8x8     128 128 128 128 128 128 128 128 128" in lines


def test_description_as_json(read_json):
    found = read_json("unet", *SMALL)
    assert found["divisor"] == [4, 4]
    blocks = found["structure"]["blocks"]
    assert [block["channels"] for block in blocks] == [1, 4, 6, 8, 6, 4, 2]
    assert found["structure"]["edges"][0] == {"source": 0, "target": 1, "stride": [1, 1]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ladernet"], "Did you mean 'laddernet'?"),
        (["unet", "--set", "channel=[4,8]"], "Did you mean 'channels'?"),
        (["--set", "channel=[4,8]"], "Did you mean 'channels'?"),
        (["unet", "--set", "num_ladders=3"], "option of network 'unet' 'num_ladders'"),
        (["unet", "--set", "channels"], "expected key=value"),
        (["unet", "--set", "channels=[4"], "not valid YAML"),
        (["unet", "--set", "channels=[4]"], "two levels or more"),
        (["unet", "--patch", "64,64"], "--patch 64,64; expected 3 whole numbers"),
        (["--patch", "64,64,a"], "--patch 64,64,a; expected 3 whole numbers"),
        (["unet", "--patch", "60,64,64"], "Pad to [64, 64, 64]"),
        (["--patch", "0,0,0"], "expected"),
        (["--spatial-dims", "4"], "spatial_dims 4; expected 2 or 3"),
        (["--classes", "0"], "out_channels 0; expected at least 1"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, message, run_networks):
    code, lines, err = run_networks(*arguments)
    assert code == 2
    assert lines == []
    assert len(err.splitlines()) == 1
    assert message in err


def test_a_long_chain_moves_closer_together(run_networks):
    _, lines, _ = run_networks("laddernet", "--set", "num_ladders=3", "--patch", "128,128,128")
    drawing = drawing_of(lines)[:4]
    assert max(map(len, drawing)) <= 80
    assert drawing[3].split() == ["1/8", "16x16x16", "128", "128", "128"]
    # Columns are kept: the second coarsest block stands left of the coarsest.
    assert drawing[2].index(" 64─") < drawing[3].index(" 128 ")
