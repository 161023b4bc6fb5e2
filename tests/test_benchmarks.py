"""What the benchmarks work out from what was measured, and what they do with what goes wrong."""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import predict_files
import pytest
import step_speed
import torch
import train_against_nnunet
import train_networks
import training_runs
import without_network
from ablate_recipe import INTENSITY, RUNS, SPATIAL
from conftest import TINY
from displaced_labels import score_moves
from makers import make_dataset, write_nifti
from monai.bundle import ConfigParser
from sides import Measured, OutOfMemory, run_measured
from step_speed import Speed
from torch import nn
from train_against_nnunet import (
    FITTED,
    Peer,
    Row,
    Span,
    cut_plans,
    describe_raw,
    draw_curve,
    find_minutes_to,
    format_minutes,
    format_rows,
)
from training_runs import Recipe, Result, find_splits, format_table, read, summarise_pace, train

from volseg.atomic import write_json
from volseg.config import load_config
from volseg.data.layouts import find_dataset
from volseg.data.splits import read_splits
from volseg.images import read_labels
from volseg.inference.model import build_planned_network
from volseg.planning.plan import Plan


def make_plan(**changes: object) -> Plan:
    plan = {
        "spatial_dims": 3,
        "spacing_mm": (1.0, 1.5, 2.0),
        "patch": (8, 16, 24),
        "batch_size": 3,
        "normalisation": [{"channel": "image", "scheme": "zscore"}],
        "network": {
            "name": "unet",
            "channels": (4, 8),
            "strides": ((1, 1, 1), (1, 2, 2)),
            "kernel_sizes": ((1, 3, 3), (3, 3, 3)),
        },
    }
    return Plan.parse(plan | changes, "test")


def test_minutes_are_interpolated_in_the_logarithm_of_the_time() -> None:
    # Halfway from 2 to 8 minutes is 4 in the logarithm.
    reached = find_minutes_to(0.85, [(2, 0.8), (8, 0.9)])
    assert reached.low == reached.high == pytest.approx(4)


def test_dice_before_the_first_and_after_the_last_training_is_only_bounded() -> None:
    curve = [(2, 0.8), (8, 0.9)]
    assert find_minutes_to(0.8, curve) == Span(0, 2)
    assert find_minutes_to(0.95, curve) == Span(8, math.inf)


def test_first_training_that_reaches_the_dice_counts() -> None:
    reached = find_minutes_to(0.85, [(2, 0.7), (4, 0.9), (8, 0.8), (16, 0.95)])
    assert reached.low == pytest.approx(2 * 2**0.75)


@pytest.mark.parametrize(
    ("theirs", "ours", "ratio"),
    [
        (Span(6, 6), Span(4, 4), "1.5"),
        (Span(15, math.inf), Span(2, 2), "> 7.5"),
        (Span(3, 3), Span(0, 2), "> 1.5"),
        (Span(3, 3), Span(15, math.inf), "< 0.2"),
        (Span(0, 2), Span(4, 4), "< 0.5"),
        (Span(15, math.inf), Span(15, math.inf), "unknown"),
        (Span(0, 2), Span(0, 2), "unknown"),
    ],
)
def test_ratio_says_no_more_than_is_known(theirs: Span, ours: Span, ratio: str) -> None:
    assert str(theirs / ours) == ratio


def make_row(side: str, asked: float, seed: int, dice: float) -> Row:
    return Row(side, asked, seed, asked + 0.1 * seed, 0, 10, 2.5, 0.04, 100, dice, {})


def test_curve_is_the_mean_over_the_seeds() -> None:
    rows = [
        make_row("volseg", asked, seed, asked / 10 + seed / 50)
        for asked in (8, 2)
        for seed in (0, 1)
    ]
    (first, second) = draw_curve([*rows, make_row("nnunet", 2, 0, 0)], "volseg")
    assert first == pytest.approx((2.05, 0.21))
    assert second == pytest.approx((8.05, 0.81))


def test_table_sets_both_forms_of_nnunet_beside_volseg() -> None:
    scores = {"volseg": (0.8, 0.9), "nnunet": (0.1, 0.2), "nnunet, fitted": (0.7, 0.9)}
    rows = [
        make_row(side, asked, 0, dice)
        for side, both in scores.items()
        for asked, dice in zip((2, 8), both, strict=True)
    ]
    # Of volseg halfway from 2 to 8, of the fitted one three quarters: 4 and 5.66 minutes.
    last = format_minutes(rows, [0.85]).splitlines()[-1]
    assert last == "| 0.85 | 4.0 | > 8.0 | 5.7 | > 2.0 | 1.4 |"


def test_plans_of_nnunet_get_volsegs_network_in_their_own_order_of_axes() -> None:
    architecture = {"arch_kwargs": {"n_stages": 6, "conv_bias": True}}
    plans = {
        "plans_name": "nnUNetPlans",
        "transpose_forward": [2, 0, 1],
        "configurations": {"3d_fullres": {"batch_size": 9, "architecture": architecture}},
    }
    before = copy.deepcopy(plans)
    # Axes of the file: anterior, superior, right; read backwards: right, superior, anterior;
    # transposed: anterior, right, superior.
    cut = cut_plans(plans, make_plan(), "PIR")["configurations"]["3d_fullres"]
    assert cut["patch_size"] == [16, 8, 24]
    assert cut["batch_size"] == 3
    assert cut["architecture"]["arch_kwargs"] == {
        "n_stages": 2,
        "conv_bias": True,
        "features_per_stage": [4, 8],
        "strides": [[1, 1, 1], [2, 1, 2]],
        "kernel_sizes": [[3, 1, 3], [3, 3, 3]],
        "n_conv_per_stage": [2, 2],
        "n_conv_per_stage_decoder": [2],
    }
    assert plans == before


def test_dataset_is_described_to_nnunet_where_it_lies(tmp_path: Path) -> None:
    dataset = find_dataset(make_dataset(tmp_path / "data", num_cases=2, values=(1, 2)))
    ct = {"channel": "image", "scheme": "ct", "clip_low": 0, "clip_high": 1, "mean": 0, "std": 1}
    raw = describe_raw(dataset, make_plan(normalisation=[ct]))
    assert raw["channel_names"] == {"0": "CT"}
    assert raw["labels"] == {name: number for number, name in enumerate(dataset.classes.names)}
    assert [*raw["labels"].values()] == [0, 1, 2]
    assert (raw["numTraining"], raw["file_ending"]) == (2, ".nii.gz")
    assert raw["dataset"]["case_01"] == {
        "images": [str(tmp_path / "data" / "images" / "case_01.nii.gz")],
        "label": str(tmp_path / "data" / "labels" / "case_01.nii.gz"),
    }


def test_labels_that_nnunet_refuses_are_refused(tmp_path: Path) -> None:
    dataset = find_dataset(make_dataset(tmp_path / "data", num_cases=2, values=(3, 7)))
    with pytest.raises(SystemExit, match="labels 0, 1, 2"):
        describe_raw(dataset, make_plan())


@pytest.mark.parametrize("runs", [RUNS, train_networks.RUNS], ids=["recipe", "networks"])
def test_every_row_is_a_configuration_of_its_own(runs: dict[str, list[str]]) -> None:
    configs = [load_config(None, settings) for settings in runs.values()]
    assert all(configs.count(config) == 1 for config in configs)


def test_row_without_augmentation_leaves_no_chance_of_any() -> None:
    assert [*SPATIAL, *INTENSITY] == [*dict.fromkeys([*SPATIAL, *INTENSITY])]
    changes = load_config(None, RUNS["no augmentation"]).augmentation.model_dump()
    strengths = ("_degrees", "_channels", "_range", "_deviation", "_sigma", "_per_axis")
    left = [name for name, value in changes.items() if value and not name.endswith(strengths)]
    # Of channels that cases may lack, which these datasets have not.
    assert left == ["drop_channel"]


def test_recipe_follows_a_plan_but_for_what_it_says_itself(tmp_path: Path) -> None:
    fixed = load_config(None, Recipe().on_plan(make_plan()).settings).plan
    assert fixed.model_dump(exclude_none=True) == {
        "spacing_mm": (1.0, 1.5, 2.0),
        "patch": (8, 16, 24),
        "batch_size": 3,
        "width": 4,
        "pocket": False,
        "num_levels": 2,
    }
    config = tmp_path / "own.yaml"
    config.write_text("plan: {width: 32}\n")
    own = Recipe(("plan.batch_size=1",), config).on_plan(make_plan())
    plan = load_config(own.config, own.settings).plan
    assert (plan.width, plan.batch_size, plan.num_levels) == (32, 1, 2)


def test_speed_and_waiting_of_a_training_are_those_of_its_time() -> None:
    rows = [
        {"step": 10, "steps_per_second": 2.0, "waiting": 0.5},
        {"step": 40, "steps_per_second": 10.0, "waiting": 0.0},
    ]
    # 10 steps in 5 s, half of it waiting, then 30 in 3 s.
    assert summarise_pace(rows) == (pytest.approx(40 / 8), pytest.approx(2.5 / 8))


def test_table_of_both_sides_has_speed_and_waiting() -> None:
    (line,) = format_rows([make_row("volseg", 2, 0, 0.8)]).splitlines()[2:]
    assert line == "| volseg | 2 | 0 | 2.00 | 0 | 10 | 2.50 | 4.0% | 100 | 0.800 |"


def test_table_has_means_ranges_and_what_a_row_gains() -> None:
    def make_result(dice: float) -> Result:
        return Result("4 to 8", 1234, 5.0, 1.0, 300, 1.25, 0.046, dice, {})

    rows = {"recipe": [0.80, 0.84], "other": [0.85, 0.87]}
    table = format_table({name: [make_result(d) for d in dice] for name, dice in rows.items()})
    assert table.splitlines()[2:] == [
        "| recipe | 4 to 8 | 1,234 | 1.00 | 1.25 | 4.6% | 300 | 0.820 | 0.800 to 0.840 |  |",
        "| other | 4 to 8 | 1,234 | 1.00 | 1.25 | 4.6% | 300 | 0.860 | 0.850 to 0.870 | +0.040 |",
    ]


def test_device_reaches_both_sides_of_a_comparison(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, ...]] = []

    def run(peer: Peer, command: str, result: Path, results: Path, *words: str) -> None:
        result.write_text(json.dumps({"predicted": "x"}))
        said.append(words)

    monkeypatch.setattr(training_runs, "volseg", lambda folder, *words: said.append(words))
    monkeypatch.setattr(training_runs, "score", lambda *arguments: None)
    monkeypatch.setattr(train_against_nnunet, "score", lambda *arguments: None)
    monkeypatch.setattr(train_against_nnunet, "cut_plans", lambda *arguments: {})
    monkeypatch.setattr(Peer, "run", run)
    monkeypatch.setattr(Peer, "prepare", lambda peer, plan: {"plans": {}})
    train(Recipe(), balls, tmp_path / "volseg", 1, device="cuda:1")
    assert not any("--mirror" in words for words in said)
    Peer(Path("python"), tmp_path, balls, None, "cuda:1").train(
        FITTED, make_plan(), tmp_path / "nnunet", 1, 0
    )
    assert [words[words.index("--device") + 1] for words in said] == ["cuda:1"] * 3
    # What has seen mirror images averages over them, as nnU-Net does.
    train(Recipe(("augmentation.flip=0.5",)), balls, tmp_path / "mirrored", 1)
    assert "--mirror" in said[-1]


DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


def parse_steps(device: str, *words: str) -> argparse.Namespace:
    small = ("--patch", "16", "16", "16", "--width", "4", "--steps", "2", "--matrix", "64")
    return step_speed.parse_arguments(["--device", device, *small, *words])


@pytest.mark.parametrize("device", DEVICES)
def test_speed_of_steps_is_measured_on_any_device(device: str) -> None:
    speed = step_speed.measure(parse_steps(device, "--precision", "bfloat16"))
    assert min(speed.steps_per_second, speed.rate, speed.matrix_rate) > 0
    assert speed.rate < math.inf


def test_operations_of_a_step_grow_with_the_batch() -> None:
    arguments = parse_steps("cpu")
    work = [
        step_speed.count_operations(
            arguments, (torch.randn(n, 1, 8, 8, 16), torch.zeros(n, 8, 8, 16, dtype=torch.int64))
        )
        for n in (1, 3)
    ]
    assert work[1] == 3 * work[0] > 0


def test_table_of_steps_has_ratios_rates_and_shares() -> None:
    rounds = [
        {"float32": Speed(2.0, 1e12, 4e12), "nnU-Net": Speed(1.0)},
        {"float32": Speed(4.0, 2e12, 5e12), "nnU-Net": Speed(1.0)},
        {"float32": Speed(5.0, 2.5e12, 5e12), "nnU-Net": Speed(1.5)},
    ]
    # Half a Tflop a step; ratios by round are 0.5, 0.25 and 0.3, shares 25, 40 and 50 %.
    assert step_speed.format_rows(rounds).splitlines()[2:] == [
        "| float32 | 4 | 1.00 | 2 | 5 | 40% |",
        "| nnU-Net | 1 | 0.30 | 0.5 | | |",
    ]


def test_nnunet_steps_on_the_network_that_volseg_steps_on() -> None:
    plans = step_speed.make_plans((16, 8), batch=3, width=4)
    configuration = plans["configurations"]["3d_fullres"]
    given = configuration["architecture"]["arch_kwargs"]
    assert (configuration["patch_size"], configuration["batch_size"]) == ([16, 8], 3)
    assert given["features_per_stage"] == [4, 8, 16, 32]
    assert given["strides"] == [[1, 1], [2, 2], [2, 2], [2, 2]]


@pytest.mark.slow
def test_training_of_a_benchmark_is_scored_once_on_the_fold_of_the_first_seed(
    balls: Path, tmp_path: Path
) -> None:
    train(Recipe(tuple(TINY)), balls, tmp_path, minutes=0.05, seed=1)
    result, log = read(tmp_path), (tmp_path / "log.txt").read_text()
    assert 0 <= result.dice <= 1
    assert 0 <= result.waiting < 1
    assert result.steps_per_second > 0
    assert len(result.dice_by_class) == 2
    splits = read_splits(tmp_path / "run" / "splits.json", find_dataset(balls).cases)
    assert splits == find_splits(balls)
    scored = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert scored["num_cases"] == len(splits[0].validation)
    train(Recipe(tuple(TINY)), balls, tmp_path, minutes=0.05, seed=1)
    assert (tmp_path / "log.txt").read_text() == log


def fill(megabytes: int, result: Path, then: str = "") -> list[str]:
    """A side that takes so much memory, and says that it took two seconds."""
    lines = (
        "import json, sys, time",
        f"taken = bytearray({megabytes}_000_000)",
        then,
        f"open({str(result)!r}, 'w').write(json.dumps({{'seconds': 2.0}}))",
    )
    return [sys.executable, "-c", "\n".join(lines)]


def test_memory_of_a_side_is_its_own(tmp_path: Path) -> None:
    kept = np.ones(50_000_000)
    command = fill(200, tmp_path / "r.json", "time.sleep(1)")
    measured = run_measured(command, tmp_path / "r.json", tmp_path / "log")
    assert measured.seconds == 2
    # 200 MB and an interpreter, but not the 400 MB of this process.
    assert 200 < measured.peak_mb < 300 < kept.nbytes / 1e6


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (fill(900, Path("r"), "time.sleep(60)"), "^out of memory of 0.5 GB$"),
        # Two processes that together take more than either may.
        (
            fill(
                300,
                Path("r"),
                "import subprocess; subprocess.run([sys.executable, '-c', 'import time; "
                "taken = bytearray(300_000_000); time.sleep(60)'])",
            ),
            "^out of memory of 0.5 GB$",
        ),
        ([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], "out of memory"),
    ],
    ids=["large", "together", "killed"],
)
def test_side_that_takes_too_much_is_stopped(
    command: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(OutOfMemory, match=message):
        run_measured(command, tmp_path / "r.json", tmp_path / "log", limit_gb=0.5)


def test_nothing_of_a_side_outlives_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; child = subprocess.Popen(['sleep', '60']); "
        "open('child', 'w').write(str(child.pid)); sys.exit(3)"
    )
    command = ["env", "-C", str(tmp_path), sys.executable, "-c", code]
    with pytest.raises(SystemExit, match="ended with 3"):
        run_measured(command, tmp_path / "r", tmp_path / "log")
    status = Path("/proc", (tmp_path / "child").read_text(), "status")

    def is_alive() -> bool:
        # Ended, it may still wait for somebody to ask how.
        return status.exists() and "(zombie)" not in status.read_text()

    end = time.monotonic() + 20
    while is_alive() and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_alive()


def test_memory_that_is_taken_at_the_very_end_counts(tmp_path: Path) -> None:
    late = "taken += bytearray(300_000_000); time.sleep(0.1)"
    command = fill(1, tmp_path / "r.json", late)
    assert run_measured(command, tmp_path / "r.json", tmp_path / "log").peak_mb > 300


def test_side_that_fails_otherwise_is_no_question_of_memory(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("MemoryError: of another side\n")
    with pytest.raises(SystemExit, match=r"ended with 3; see .*log") as caught:
        run_measured([sys.executable, "-c", "import sys; sys.exit(3)"], tmp_path / "r", log)
    assert not isinstance(caught.value, OutOfMemory)


def test_sides_without_memory_are_rows_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_nifti(tmp_path / "ct.nii", np.zeros((100, 100, 100), np.int16))
    begun: list[str] = []

    def list_command(side: str, *others: object) -> list[str]:
        begun.append(side)
        return fill(
            {"volseg": 100, "nnU-Net's export": 900}[side],
            tmp_path / "result.json",
            "time.sleep(1)",
        )

    monkeypatch.setattr(without_network, "list_command", list_command)
    sides = ["volseg", "MONAI", "nnU-Net's export"]
    arguments = Namespace(output=tmp_path, rounds=2, sides=sides, memory=0.5)
    # 150 classes in a million voxels are 0.6 GB in float32, and 0.3 GB in 16 bits.
    without_network.measure(150, path, arguments)
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("| 150 | volseg | 2.0 | 1.0 | ")
    assert rows[1] == "| 150 | MONAI | needs 0.6 GB at least | | | |"
    assert rows[2] == "| 150 | nnU-Net's export | out of memory of 0.5 GB | | | |"
    assert begun == ["volseg", "nnU-Net's export", "volseg"]


def test_export_alone_writes_the_labels_of_the_whole_prediction(tmp_path: Path) -> None:
    path = tmp_path / "ct.nii.gz"
    without_network.make_volume(path, (60, 50, 130))
    sides = {
        "whole": partial(without_network.predict_volseg, memory_gb=8.0),
        "export": without_network.export_volseg,
    }
    labels = {}
    for name, predict in sides.items():
        (tmp_path / name).mkdir()
        assert predict(path, 9, tmp_path / name) > 0
        labels[name] = read_labels(tmp_path / name / "ct.nii.gz").array
    assert len(np.unique(labels["whole"])) > 4
    # The network of the whole prediction may compute in 16 bits.
    assert (labels["whole"] == labels["export"]).mean() > 0.999


def test_ratios_need_volseg_beside_them() -> None:
    rounds = [Measured(3.0, 100.0), Measured(5.0, 300.0)]
    ours = [Measured(1.0, 100.0), Measured(1.0, 100.0)]
    row = without_network.format_row(25, "MONAI", rounds, ours)
    assert row == "| 25 | MONAI | 4.0 | 4.0 | 200 | 2.0 |"
    assert without_network.format_row(25, "MONAI", rounds, []) == "| 25 | MONAI | 4.0 |  | 200 |  |"


def test_all_sides_are_told_the_device(tmp_path: Path) -> None:
    task = predict_files.Task("t", tmp_path, tmp_path, make_plan(), predict_files.name_classes(2))
    arguments = Namespace(peer_python=Path("peer"), device="cuda:1", sides=predict_files.SIDES)
    sides = predict_files.list_sides(arguments)
    assert sides == [side for side in predict_files.SIDES if "openvino" not in side]
    for side in sides:
        words = predict_files.list_command(side, task, tmp_path, tmp_path, tmp_path, arguments)
        assert words[words.index("--device") + 1] == "cuda:1"
    models = [
        words[words.index("--model") + 1]
        for side in sides
        if not side.startswith("nnU-Net")
        for words in [predict_files.list_command(side, task, *[tmp_path] * 3, arguments)]
    ]
    assert [Path(model).name for model in models] == ["run", "run", "bundle", "bundle_of_volseg"]
    arguments.device = "cpu"
    assert predict_files.list_sides(arguments) == list(predict_files.SIDES)


def test_bundles_of_monai_have_the_same_network(tmp_path: Path) -> None:
    shape = (16, 16, 16)
    plan = predict_files.make_plan(
        (1, 1, 1), shape, (2, 4, 6), {"channel": "MRI", "scheme": "zscore"}
    )
    task = predict_files.Task("t", tmp_path, tmp_path, plan, predict_files.name_classes(3))
    network = build_planned_network(plan, 3).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    weights = list_used_weights(network, shape)
    write_json(tmp_path / "configs" / "inference.json", {"run": 1, "network_def": {}})
    (tmp_path / "models").mkdir()
    predict_files.give_monai_network(task, weights, tmp_path)
    config = json.loads((tmp_path / "configs" / "inference.json").read_text())
    assert config["run"] == 1
    theirs = ConfigParser(config).get_parsed_content("network_def").eval()
    assert type(theirs).__module__.startswith("monai.")
    theirs.load_state_dict(torch.load(tmp_path / "models" / "model.pt", weights_only=True))
    image = torch.randn(1, 1, *shape)
    with torch.no_grad():
        torch.testing.assert_close(theirs(image), network(image), rtol=1e-3, atol=1e-3)


def list_used_weights(network: nn.Module, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """As nnU-Net's side lists them: in the order of use, kernels with their axes reversed."""
    used: list[torch.Tensor] = []

    def add(module: nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            data = parameter.detach()
            used.append(data.permute(0, 1, 4, 3, 2) if data.dim() == 5 else data)

    for module in network.modules():
        module.register_forward_hook(add)
    with torch.no_grad():
        network(torch.zeros(1, 1, *shape))
    return used


def test_a_displaced_reference_fits_where_it_was_moved_from() -> None:
    reference = np.zeros((6, 7, 8), np.uint8)
    reference[2:4, 2:5, 3:6] = 1
    moves = score_moves(np.roll(reference, (1, 0, -1), (0, 1, 2)), reference, (1,))
    assert len(moves) == 27
    # Of 18 voxels 1 x 3 x 2 lie where they are, and all after the move back.
    assert moves[0, 0, 0] == pytest.approx(2 * 6 / 36)
    assert moves[-1, 0, 1] == 1


def test_what_leaves_an_image_comes_in_nowhere_else() -> None:
    prediction, reference = np.zeros((2, 4), np.uint8), np.zeros((2, 4), np.uint8)
    prediction[0, 0] = reference[0, -1] = 1
    assert set(score_moves(prediction, reference, (1,)).values()) == {0}
