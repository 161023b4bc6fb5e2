"""Spacing, topology, normalisation, and the choice of width and patch for machine and time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from volseg.config import Config, load_config, with_length
from volseg.data.cases import Classes
from volseg.errors import ConfigError
from volseg.networks import list_networks
from volseg.planning import (
    Fingerprint,
    Machine,
    NetworkPlan,
    Plan,
    find_contradiction,
    make_plan,
)
from volseg.planning.cost import compute_cost
from volseg.planning.fingerprint import CaseFingerprint, ChannelFingerprint
from volseg.planning.planner import COARSER, MEMORY_SHARE, choose_spacing, is_ct, plan_levels
from volseg.training.checks import check_training

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))

LAPTOP = Machine(
    device="cpu",
    name="laptop",
    memory_gb=16,
    seconds_per_gflop=0.01,
    seconds_per_mvoxel=0.01,
    is_measured=True,
)


def make_channel(name: str = "MRI", minimum: float = 0.0) -> ChannelFingerprint:
    return ChannelFingerprint(
        name=name,
        mean=40,
        std=20,
        median=41,
        percentile_0_5=-90,
        percentile_99_5=150,
        image_minimum=minimum,
    )


def make_fingerprint(
    shape: tuple[int, ...] = (35, 50, 36),
    spacings: tuple[tuple[float, ...], ...] = ((1.0, 1.0, 1.0),),
    channel: ChannelFingerprint | None = None,
    full_shape: tuple[int, ...] | None = None,
    radius_mm: float = 5.0,
) -> Fingerprint:
    cases = tuple(
        CaseFingerprint(
            case_id=str(i),
            full_shape=full_shape or shape,
            shape=shape,
            spacing_mm=spacing,
            class_voxels=(100, 10),
            class_radius_mm=(0, radius_mm),
        )
        for i, spacing in enumerate(spacings * 4)
    )
    return Fingerprint(
        dataset="test",
        spatial_dims=len(shape),
        cases=cases,
        channels=(channel or make_channel(),),
    )


def plan_for(
    fingerprint: Fingerprint, minutes: float, *overrides: str, machine: Machine = LAPTOP
) -> Plan:
    config = with_length(load_config(None, overrides), minutes, None)
    return make_plan(fingerprint, machine, config, num_classes=3).plan


def test_spacing_is_the_median_per_axis() -> None:
    spacings = ((1.0, 1.0, 2.0), (1.2, 1.0, 2.5), (0.8, 1.0, 2.0))
    assert choose_spacing(make_fingerprint(spacings=spacings)) == (1.0, 1.0, 2.0)


def test_coarse_axis_takes_its_tenth_percentile() -> None:
    # Third axis: 5 mm against 1 mm, and 60 slices against 300 voxels: 60 * 3 < 300.
    spacings = ((1.0, 1.0, 4.0), (1.0, 1.0, 5.0), (1.0, 1.0, 5.0), (1.0, 1.0, 6.0))
    fingerprint = make_fingerprint((300, 300, 60), spacings)
    expected = np.percentile([4.0, 5.0, 5.0, 6.0] * 4, 10)
    assert choose_spacing(fingerprint) == (1.0, 1.0, expected)


def test_levels_of_a_cube_are_halved_until_four_voxels() -> None:
    strides, kernels = plan_levels((40, 56, 40), (1, 1, 1))
    # 40 -> 20 -> 10 -> 5; the next would be 3 < 4, while 56 -> 7 could not go on either.
    assert strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    assert kernels == ((3, 3, 3),) * 4


def test_coarse_axis_waits_until_the_others_caught_up() -> None:
    strides, kernels = plan_levels((96, 96, 24), (1, 1, 3.27))
    # 1 -> 2 mm in plane before 3.27 mm is below twice the finest, so kernel 1 and stride 1 first.
    assert strides[:3] == ((1, 1, 1), (2, 2, 1), (2, 2, 2))
    assert kernels[:2] == ((3, 3, 1), (3, 3, 3))


def test_a_kernel_that_is_three_stays_so() -> None:
    strides, kernels = plan_levels((320, 320, 20), (0.625, 0.625, 3.6))
    # In plane 0.625 -> 1.25 -> 2.5 mm, where 3.6 mm are within twice; then 5 and 7.2, 10 and 14.4.
    # The third axis has 5 voxels there, and the others go on to 20 and 40 mm: more than twice 14.4.
    both = ((2, 2, 2),) * 2
    assert strides == ((1, 1, 1), (2, 2, 1), (2, 2, 1), *both, (2, 2, 1), (2, 2, 1))
    assert kernels == ((3, 3, 1), (3, 3, 1), *((3, 3, 3),) * 5)
    assert set(plan_levels((512, 512, 1), (1, 1, 1))[1]) == {(3, 3, 3)}
    assert set(plan_levels((1024, 256), (1, 1))[1]) == {(3, 3)}


def test_kernels_of_the_last_level_are_three() -> None:
    assert plan_levels((64, 64, 16), (1, 1, 8), 2)[1] == ((3, 3, 1), (3, 3, 3))


@pytest.mark.parametrize(
    ("name", "minimum", "expected"),
    [
        ("CT", 0, True),
        ("ct", 0, True),
        ("channel_0", -1000, True),
        ("channel_0", -3024, True),
        ("channel_0", 0, False),
        ("T1", -1000, False),
    ],
)
def test_ct_is_known_by_name_or_by_air(name: str, minimum: float, expected: bool) -> None:
    assert is_ct(make_channel(name, minimum)) is expected


def test_ct_is_clipped_to_the_foreground() -> None:
    normalisation = plan_for(make_fingerprint(channel=make_channel("CT")), 15).normalisation[0]
    assert normalisation.scheme == "ct"
    assert (normalisation.clip_low, normalisation.clip_high) == (-90, 150)
    assert (normalisation.mean, normalisation.std) == (40, 20)


def test_padded_images_are_normalised_inside() -> None:
    padded = make_fingerprint(full_shape=(70, 100, 72))
    assert plan_for(padded, 15).normalisation[0].nonzero_only
    assert not plan_for(make_fingerprint(), 15).normalisation[0].nonzero_only


def test_small_volume_is_covered_whole() -> None:
    plan = plan_for(make_fingerprint(), 15)
    assert plan.patch == (40, 56, 40)
    assert plan.network.divisor == (8, 8, 8)


def test_less_time_means_less_work_per_step() -> None:
    fingerprint = make_fingerprint((200, 180, 160))

    def step_seconds(minutes: float) -> float:
        plan = plan_for(fingerprint, minutes)
        return compute_cost(plan.network, plan.patch, 1, 3).step_seconds(LAPTOP, plan.batch_size)

    seconds = [step_seconds(minutes) for minutes in (2, 20, 200, 2000)]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[-1] / 10


def test_ample_time_buys_the_widest_network() -> None:
    workstation = LAPTOP.model_copy(update={"memory_gb": 64})
    plan = plan_for(make_fingerprint((200, 180, 160)), 100_000, machine=workstation)
    assert plan.network.channels[0] == 32
    # A cube of 128^3 voxels in mm, rounded up to what the network divides.
    assert math.prod(plan.patch) == pytest.approx(128**3, rel=0.1)


def test_spare_time_buys_a_larger_batch() -> None:
    fast = LAPTOP.model_copy(
        update={"memory_gb": 80, "seconds_per_gflop": 1e-5, "seconds_per_mvoxel": 1e-5}
    )
    cases = ((1.0, 1.0, 1.0),) * 50
    plan = plan_for(make_fingerprint(spacings=cases), 10, machine=fast)
    # 200 volumes that one patch covers: a twentieth of their voxels is ten patches; 2, 4, 8.
    assert plan.batch_size == 8
    assert plan_for(make_fingerprint(spacings=cases), 10).batch_size == 2


def test_tiny_volume_gets_two_levels() -> None:
    plan = plan_for(make_fingerprint((6, 5, 4)), 10)
    assert plan.network.strides == ((1, 1, 1), (2, 2, 2))
    assert plan.patch == (6, 6, 4)


def test_patch_of_another_number_of_axes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"plan\.patch \(8, 8\); expected 3 values"):
        plan_for(make_fingerprint(), 15, "plan.patch=[8, 8]")


def test_fixed_values_are_kept() -> None:
    plan = plan_for(
        make_fingerprint((100, 100, 100)),
        15,
        "plan.patch=[32, 48, 64]",
        "plan.width=12",
        "plan.batch_size=3",
        "plan.spacing_mm=[2, 2, 2]",
        "plan.num_levels=3",
        "plan.normalisation=ct",
    )
    assert (plan.patch, plan.batch_size, plan.spacing_mm) == ((32, 48, 64), 3, (2, 2, 2))
    assert plan.network.channels == (12, 24, 48)
    assert plan.normalisation[0].scheme == "ct"


def test_fixed_patch_must_be_divisible() -> None:
    with pytest.raises(ConfigError, match=r"patch \(32, 50, 64\) is not divisible.*axis 1; use 48"):
        plan_for(make_fingerprint((100, 100, 100)), 15, "plan.patch=[32, 50, 64]")


def test_too_little_memory_is_said() -> None:
    tiny = LAPTOP.model_copy(update={"memory_gb": 0.001})
    with pytest.raises(ConfigError, match=r"no patch and width fit into 0\.0 GB"):
        make_plan(make_fingerprint(), tiny, Config(), num_classes=2)


def test_pictures_get_a_2d_plan() -> None:
    plan = plan_for(make_fingerprint((300, 200), ((1.0, 1.0),)), 15)
    assert plan.spatial_dims == 2
    assert all(len(stride) == 2 for stride in plan.network.strides)


def test_plan_file_is_readable_and_survives_a_round_trip(tmp_path: Path) -> None:
    planned = make_plan(make_fingerprint(), LAPTOP, with_length(Config(), 15, None), 3)
    path = tmp_path / "plan.yaml"
    planned.plan.write_yaml(path, planned.reasons)
    assert Plan.read_yaml(path) == planned.plan
    assert "# Time: 15 minutes, about" in path.read_text()


def test_edited_plan_with_a_wrong_patch_names_file_and_cure(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    plan_for(make_fingerprint(), 15).write_yaml(path)
    path.write_text(path.read_text().replace("patch: [40, 56, 40]", "patch: [40, 50, 40]"))
    with pytest.raises(ConfigError, match=r"plan\.yaml: patch .* on axis 1; use 48 or 56"):
        Plan.read_yaml(path)


def test_cost_of_a_two_level_network_by_hand() -> None:
    network = NetworkPlan(
        name="unet",
        channels=(2, 4),
        strides=((1, 1), (2, 2)),
        kernel_sizes=((3, 3), (3, 3)),
        deep_supervision=False,
    )
    cost = compute_cost(network, (4, 4), in_channels=1, num_classes=3)
    # Level 0, 16 pixels: 9*1*2 + 9*2*2; transposed 4*2; 9*4*2 + 9*2*2; head 2*3. Level 1, 4
    # pixels: 9*2*4 + 9*4*4.
    products = 16 * (18 + 36 + 8 + 72 + 36 + 6) + 4 * (72 + 144)
    assert cost.gflop == pytest.approx(2 * products / 1e9)
    # Level 0: 2 convs, transposed conv, 2 convs of 2 channels, head of 3; level 1: 2 convs of 4.
    assert cost.feature_mvoxels == pytest.approx((16 * (5 * 2 + 3) + 4 * 2 * 4) / 1e6)


@pytest.mark.parametrize("name", list_networks())
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_fit_every_network(path: Path, name: str) -> None:
    config = load_config(path, [f"network.name={name}"])
    plan = make_plan(make_fingerprint(), LAPTOP, config, num_classes=3).plan
    assert plan.network.name == name
    check_training(plan, config, Classes(names=("background", "a", "b"), values=(0, 1, 2)))


def test_pocket_network_has_one_width() -> None:
    config = load_config(None, ["plan.pocket=true", "plan.width=24"])
    plan = make_plan(make_fingerprint(), LAPTOP, config, num_classes=3).plan
    assert set(plan.network.channels) == {24}
    assert len(plan.network.channels) > 2
    assert find_contradiction(plan, config) is None
    assert find_contradiction(plan, load_config(None, ["plan.pocket=false"])) == "pocket"


def test_large_structures_are_seen_at_a_coarser_spacing_where_time_is_short() -> None:
    fingerprint = make_fingerprint((300, 300, 100), ((0.8, 0.8, 2.0),), radius_mm=20)
    plan = plan_for(fingerprint, 10)
    # The finest axes alone, by whole steps, and never beyond 0.08 x 20 mm.
    steps = math.log(plan.spacing_mm[0] / 0.8) / math.log(COARSER)
    assert steps == pytest.approx(round(steps), abs=1e-3)
    assert plan.spacing_mm == pytest.approx((plan.spacing_mm[0], plan.spacing_mm[0], 2.0))
    assert 0.8 < plan.spacing_mm[0] <= 1.6
    reasons = make_plan(fingerprint, LAPTOP, with_length(Config(), 10, None), num_classes=3).reasons
    assert any("coarser than the volumes' 0.8 mm" in line for line in reasons)
    small = make_fingerprint((300, 300, 100), ((0.8, 0.8, 2.0),), radius_mm=9)
    assert plan_for(small, 10).spacing_mm == (0.8, 0.8, 2.0)
    fixed = plan_for(fingerprint, 10, "plan.spacing_mm=[0.8,0.8,2.0]")
    assert fixed.spacing_mm == (0.8, 0.8, 2.0)


def test_volume_that_a_patch_covers_keeps_its_spacing() -> None:
    plan = plan_for(make_fingerprint(radius_mm=100), 15)
    assert plan.spacing_mm == (1.0, 1.0, 1.0)


FAST = LAPTOP.model_copy(update={"seconds_per_gflop": 1e-6, "seconds_per_mvoxel": 1e-6})
HEART = make_fingerprint((192, 150, 10), ((1.4, 1.4, 8.0),))


def plan_slices(fingerprint: Fingerprint, *overrides: str) -> Plan:
    config = with_length(load_config(None, ["plan.slices=true", *overrides]), None, 10)
    return make_plan(fingerprint, FAST, config, num_classes=3).plan


def test_slices_are_planned_as_pictures() -> None:
    plan = plan_slices(HEART)
    # 192 and 150 pixels are halved while both have 8 or more: to 6 and 5, five times.
    assert plan.network.slice_axis == 2
    assert plan.network.strides == ((1, 1, 1), *((2, 2, 1),) * 5)
    assert plan.network.kernel_sizes == ((3, 3, 1),) * 6
    assert plan.network.channels == (32, 64, 128, 256, 512, 512)
    assert plan.patch == (192, 160, 1)
    assert plan.batch_size == 12
    assert plan.spacing_mm == (1.4, 1.4, 8.0)
    assert plan.network_dims == 2
    assert (
        "axis 2"
        in make_plan(
            HEART, FAST, with_length(load_config(None, ["plan.slices=true"]), None, 10), 3
        ).reasons[-1]
    )


def test_slices_change_nothing_unless_asked_for() -> None:
    config = with_length(Config(), None, 10)
    plan = make_plan(HEART, FAST, config, num_classes=3).plan
    assert plan.network.slice_axis is None
    assert plan.network_dims == 3
    assert plan.patch[2] > 1
    assert "slice_axis" not in plan.preparation


@pytest.mark.parametrize(
    ("spacing", "axis"),
    [
        ((8.0, 1.4, 1.4), 0),
        ((1.4, 8.0, 1.4), 1),
        ((1.0, 1.0, 1.0), 2),
        ((3.0, 3.0, 1.0), 1),
        ((1.00001, 1.0, 1.0), 2),
    ],
)
def test_slices_lie_along_the_coarsest_axis(spacing: tuple[float, ...], axis: int) -> None:
    plan = plan_slices(make_fingerprint((40, 40, 40), (spacing,)))
    assert plan.network.slice_axis == axis
    assert [n == 1 for n in plan.patch] == [index == axis for index in range(3)]


def test_slices_of_mixed_thickness_keep_it() -> None:
    plan = plan_slices(make_fingerprint((64, 64, 10), ((2.0, 1.0, 8.0), (1.0, 1.0, 10.0))))
    assert plan.spacing_mm == (1.5, 1.0, 9.0)
    assert plan.target_spacing((2.0, 2.0, 8.0)) == (1.5, 1.0, 8.0)
    assert plan.preparation["slice_axis"] == 2


@pytest.mark.parametrize(
    ("fingerprint", "override", "problem"),
    [
        (make_fingerprint((64, 64), ((1.0, 1.0),)), "plan.width=8", "plan.slices with 2D images"),
        (HEART, "plan.patch=[64, 64, 4]", "expected a single slice. Set axis 2 to 1"),
        (HEART, "plan.patch=[64, 64]", "expected 3 values"),
        (HEART, "plan.spacing_mm=[1, 1, 5]", "Set axis 2 to 8"),
    ],
)
def test_what_contradicts_slices_is_refused(
    fingerprint: Fingerprint, override: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        plan_slices(fingerprint, override)


def test_a_plan_on_slices_is_read_back_and_compared(tmp_path: Path) -> None:
    plan = plan_slices(HEART, "plan.patch=[64, 32, 1]", "plan.spacing_mm=[1, 1, 8]")
    plan.write_yaml(tmp_path / "plan.yaml")
    assert Plan.read_yaml(tmp_path / "plan.yaml") == plan
    assert find_contradiction(plan, load_config(None, ["plan.slices=true"])) is None
    assert find_contradiction(plan, load_config(None, ["plan.slices=false"])) == "slices"
    data = plan.model_dump(mode="json")
    for changed in ({**data, "patch": [64, 32, 2]}, {**data, "patch": [64, 32]}):
        with pytest.raises(ConfigError):
            Plan.parse(changed, "plan.yaml")
    data["network"]["strides"][1] = [2, 2, 2]
    with pytest.raises(ConfigError, match="a 1 on the slice axis 2"):
        Plan.parse(data, "plan.yaml")


@pytest.mark.parametrize(
    "setting",
    [
        "plan.spacing_mm=[0.7421875, 0.7421875, 1.5]",
        "plan.num_levels=6",
        "plan.width=320",
        "plan.patch=[32, 48, 64]",
    ],
)
def test_plan_does_not_contradict_what_it_was_made_of(setting: str) -> None:
    workstation = LAPTOP.model_copy(update={"memory_gb": 1000})
    config = load_config(None, [setting])
    plan = make_plan(make_fingerprint(), workstation, config, num_classes=3).plan
    assert find_contradiction(plan, config) is None


def test_fewer_levels_than_planned_are_a_contradiction() -> None:
    plan = plan_for(make_fingerprint(), 15)
    fewer = load_config(None, [f"plan.num_levels={len(plan.network.channels) - 1}"])
    assert find_contradiction(plan, fewer) == "num_levels"


@pytest.mark.parametrize(("settings", "most"), [((), 320), (("plan.slices=true",), 512)])
def test_wider_than_any_is_refused(settings: tuple[str, ...], most: int) -> None:
    fingerprint = make_fingerprint(spacings=((1.0, 1.0, 5.0),))
    with pytest.raises(ConfigError, match=f"plan.width {most + 1}; expected {most} at most"):
        plan_for(fingerprint, 15, f"plan.width={most + 1}", *settings)


def test_a_batch_in_parts_takes_the_memory_of_a_part() -> None:
    settings = ("plan.patch=[128, 128, 128]", "plan.width=32", "plan.batch_size=4")
    whole = plan_for(make_fingerprint((200, 180, 160)), 15, *settings, machine=_with_gb(1000))
    needed = compute_cost(whole.network, whole.patch, 1, 3).training_gb(1)
    # A sample and a bit, of which a share is for the training.
    machine = _with_gb(1.1 * needed / MEMORY_SHARE)
    with pytest.raises(ConfigError, match=r"or raise training\.parts"):
        plan_for(make_fingerprint((200, 180, 160)), 15, *settings, machine=machine)
    parted = plan_for(
        make_fingerprint((200, 180, 160)), 15, *settings, "training.parts=4", machine=machine
    )
    assert parted == whole


def _with_gb(memory_gb: float) -> Machine:
    return LAPTOP.model_copy(update={"memory_gb": memory_gb})


def test_very_fine_spacing_is_kept() -> None:
    # Of electron microscopy, in mm.
    spacings = ((1e-5, 1e-5, 3.14159265e-5),)
    plan = plan_for(make_fingerprint(spacings=spacings), 15)
    assert plan.spacing_mm == (1e-5, 1e-5, 3.14159e-5)
    # Coarser until a patch shows enough, in steps that six digits can tell.
    coarser = plan_for(make_fingerprint((400, 400, 400), spacings=spacings), 15).spacing_mm
    assert coarser[0] > 2e-5
