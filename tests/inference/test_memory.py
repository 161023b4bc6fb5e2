"""Strips of a volume: as few as fit, and the same labels."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from makers import make_plan, write_tree

import volseg
from volseg.data import resampling
from volseg.data.content import Box
from volseg.errors import ConfigError, MachineError
from volseg.geometry import Geometry
from volseg.inference import Locator, Options, windows
from volseg.inference import predictor as predictor_module
from volseg.inference.batch import Outputs, predict_cases
from volseg.inference.inputs import find_inputs
from volseg.inference.memory import count_reading, free_bytes, plan_strips, resident_bytes
from volseg.planning import Plan

SHAPE, WINDOW = (200, 120, 90), (32, 32, 32)
WHOLE = Box((0, 0, 0), SHAPE)


def test_what_fits_is_one_strip() -> None:
    strips = plan_strips(WHOLE, SHAPE, WINDOW, 4)
    assert strips.regions == (WHOLE,)
    assert strips.axis == 0
    # A window's extent along the axis, and the sum of the weights beside the scores.
    assert strips.blend_bytes == 4 * 5 * 32 * 120 * 90


@pytest.mark.parametrize("share", [0.9, 0.7, 0.6, 0.4])
def test_strips_cover_all_and_share_a_voxel(share: float) -> None:
    whole_bytes = plan_strips(WHOLE, SHAPE, WINDOW, 4).blend_bytes
    strips = plan_strips(WHOLE, SHAPE, WINDOW, 4, share * whole_bytes)
    assert len(strips.regions) > 1
    assert strips.blend_bytes <= share * whole_bytes
    # Results lie between the centres of neighbours: every cell of them is within a strip.
    cells = np.zeros(np.subtract(SHAPE, 1), int)
    for region in strips.regions:
        ends = np.add(region.start, region.shape) - 1
        cells[tuple(slice(a, b) for a, b in zip(region.start, ends, strict=True))] += 1
    assert (cells == 1).all()


def test_the_cuts_that_compute_the_fewest_windows_come_first() -> None:
    whole_bytes = plan_strips(WHOLE, SHAPE, WINDOW, 4).blend_bytes

    def count_places(share: float) -> tuple[int, int]:
        regions = plan_strips(WHOLE, SHAPE, WINDOW, 4, share * whole_bytes + 1).regions
        return len({region.start[1] for region in regions}), len({r.start[2] for r in regions})

    # Windows across 120 and 90 voxels, relative to each other: 3.75 x 2.81 for no cut, and one
    # more along an axis for each cut of it. A strip has its share of the voxels and one more.
    # 4.75 x 2.81 = 13.4 and 3.75 x 3.81 = 14.3
    assert count_places(61 / 120) == (2, 1)
    # 5.75 x 2.81 = 16.2, and 4.75 x 3.81 = 18.1 with a smaller share
    assert count_places(41 / 120) == (3, 1)
    # 18.1, and 6.75 x 2.81 = 19.0 with a smaller share, 31 of 120
    assert count_places((61 * 46) / (120 * 90)) == (2, 2)


def test_strips_lie_within_a_region() -> None:
    region = Box((10, 20, 5), (150, 80, 60))
    whole_bytes = plan_strips(region, SHAPE, WINDOW, 4).blend_bytes
    strips = plan_strips(region, SHAPE, WINDOW, 4, 0.8 * whole_bytes)
    assert strips.regions[0].start == (10, 20, 5)
    assert strips.regions[-1].start[1] + strips.regions[-1].shape[1] == 100


def test_what_never_fits_is_refused() -> None:
    with pytest.raises(MachineError, match=r"200 x 120 x 90 voxels .* 0\.0001 GB are left"):
        plan_strips(WHOLE, SHAPE, WINDOW, 4, 1e5)


@pytest.mark.parametrize(("cross_section", "number"), [(18 * 32, 3), (26 * 17, 4)])
def test_labels_do_not_depend_on_the_strips(
    cross_section: int, number: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 50 x 32 voxels: three strips along an axis, or two along each."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(50, 100, 40)).astype(np.float32), np.diag([1, 0.9, 1.3, 1])
    predictor = volseg.Predictor.load(run, device="cpu")
    expected = predictor(image, probabilities=True, uncertainty=True)
    seen = []

    def room(self: volseg.Predictor, map_bytes: int) -> float:
        seen.append(map_bytes)
        return 4 * 4 * 16 * cross_section

    blends = []
    blend = windows._Blend.__init__

    def count(self: windows._Blend, *arguments: object) -> None:
        blends.append(arguments)
        blend(self, *arguments)

    monkeypatch.setattr(volseg.Predictor, "_room", room)
    monkeypatch.setattr(windows._Blend, "__init__", count)
    found = predictor(image, probabilities=True, uncertainty=True)
    assert len(blends) == number
    # Three probabilities of four bytes and an entropy of two per voxel.
    assert seen == [14 * 50 * 100 * 40]
    assert np.array_equal(found.labels, expected.labels)
    assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
    entropies = (part.uncertainty["entropy"] for part in (found, expected))
    assert next(entropies) == pytest.approx(next(entropies), abs=1e-3)


def test_a_ceiling_below_what_the_process_has_is_refused(run: Path, balls: Path) -> None:
    image = sorted((balls / "imagesTr").iterdir())[0]
    predictor = volseg.Predictor.load(run, device="cpu", options=Options(memory_gb=0.001))
    assert not predictor.works_ahead
    with pytest.raises(MachineError, match="Allow more with --memory"):
        predictor(image)
    with pytest.raises(ConfigError, match="expected more than 0"):
        Options(memory_gb=0)


def test_the_process_knows_its_memory() -> None:
    before = resident_bytes()
    block = torch.ones(50_000_000, dtype=torch.uint8)
    assert resident_bytes() - before > 0.8 * len(block)
    assert free_bytes(torch.device("cpu")) > 1e8


def test_strips_are_freed_one_after_the_other(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = volseg.Predictor.load(run, device="cpu")
    alive: list[weakref.ref[torch.Tensor]] = []
    counts = []
    blend = windows._Blend.__init__

    def watch(self: windows._Blend, *arguments: object) -> None:
        counts.append(sum(ref() is not None for ref in alive))
        blend(self, *arguments)
        alive.append(weakref.ref(self))

    monkeypatch.setattr(windows._Blend, "__init__", watch)
    monkeypatch.setattr(volseg.Predictor, "_room", lambda *_: 4 * 4 * 16 * 41 * 32)
    rng = np.random.default_rng(0)
    predictor((rng.normal(size=(50, 100, 40)).astype(np.float32), np.diag([1, 0.9, 1.3, 1])))
    assert len(counts) > 1
    assert set(counts) == {0}


def test_a_file_above_the_ceiling_is_not_read(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "large.nii"
    nib.save(nib.Nifti1Image(np.zeros((400, 400, 200), np.int8), np.eye(4)), path)
    ceiling_gb = 1e-9 * resident_bytes() + 0.3
    predictor = volseg.Predictor.load(run, device="cpu", options=Options(memory_gb=ceiling_gb))
    before = resident_bytes()
    # 32 million voxels of 4 bytes, three times.
    with pytest.raises(MachineError, match=r"large\.nii: reading it takes this process to"):
        predictor(path)
    # Of channels the first may be missing.
    with pytest.raises(MachineError, match=r"large\.nii: reading it takes this process to"):
        predictor([None, path])
    assert resident_bytes() - before < 2e7


def test_what_reading_takes_follows_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    # Slabs of these small images are small, too.
    monkeypatch.setattr(resampling, "SLAB_VOXELS", 10)
    # The axes of the file are those of the body from the last to the first, 4 mm apart along z.
    affine = np.array([[0, 0, -1.0, 0], [0, 1, 0, 0], [4, 0, 0, 0], [0, 0, 0, 1]])
    grid, plan = Geometry((30, 20, 10), affine), make_plan((1.0, 1.0, 2.0))
    source, result, coarse = 6000, 2 * 6000, 6000 // 4
    # The image in 64 bits, the result twice and a mask of it.
    assert count_reading(grid, 1, [plan]) == 4 * (2 * source + 2.25 * result)
    assert count_reading(grid, 2, [plan]) == 8 * (2 * source + 2.25 * result)
    other = make_plan((2.0, 2.0, 4.0))
    assert count_reading(grid, 1, [plan, other]) == 4 * (2 * source + 2.25 * result)
    # 64 bits, twice.
    assert count_reading(grid, 1, [other]) == 4 * 4 * source
    same = make_plan((1.0, 1.0, 4.0))
    assert count_reading(grid, 1, [same, other]) == 4 * (2 * source + 2.25 * source)
    assert count_reading(grid, 1, [same, same]) == 4 * (2 * source + 3.25 * source)
    assert count_reading(grid, 1, [other, plan]) == 4 * (coarse + 2 * source + 2.25 * result)
    # A slab, and three arrays that are made of it, of as many voxels as are wanted at a time.
    monkeypatch.setattr(resampling, "SLAB_VOXELS", 5000)
    assert count_reading(grid, 2, [plan]) == 8 * (2 * source + result + 4 * 5000)
    # None is larger than what there is.
    monkeypatch.setattr(resampling, "SLAB_VOXELS", 10**6)
    assert count_reading(grid, 2, [plan]) == 8 * (2 * source + result + 4 * result)
    # A picture is refused once it is read.
    assert count_reading(Geometry((30, 20), np.eye(4)), 1, [plan]) == 4 * 4 * 600


def test_a_file_is_refused_for_what_becomes_of_it(run: Path, tmp_path: Path) -> None:
    """Slices that are 20 mm thick have 12 times as many voxels for the network."""
    path = tmp_path / "thick.nii"
    nib.save(nib.Nifti1Image(np.zeros((200, 200, 50), np.int8), np.diag([1, 1.2, 20, 1])), path)
    ceiling_gb = 1e-9 * resident_bytes() + 0.15
    predictor = volseg.Predictor.load(run, device="cpu", options=Options(memory_gb=ceiling_gb))
    with pytest.raises(MachineError, match=r"thick\.nii: reading it takes this process to"):
        predictor(path)


def test_what_a_locator_sees_is_counted_too(
    run: Path, balls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def count(grid: Geometry, num_channels: int, plans: list[Plan]) -> float:
        seen.append((grid.shape, num_channels, plans))
        return 1e15

    monkeypatch.setattr(predictor_module, "count_reading", count)
    coarse = volseg.Predictor.load(run, device="cpu")
    plan = coarse.model.facts.plan
    other = coarse.model.facts.model_copy(update={"plan": make_plan((3.0, 3.0, 3.0))})
    coarse.model = replace(coarse.model, facts=other)
    options, locator = Options(memory_gb=64), Locator(coarse)
    predictor = volseg.Predictor.load(run, device="cpu", options=options, locator=locator)
    with pytest.raises(MachineError, match="reading it takes this process to"):
        predictor(sorted((balls / "imagesTr").iterdir())[0])
    assert seen == [((20, 18, 14), 1, [plan, other.plan])]


def is_free(turn: threading.RLock) -> bool:
    """Whether another thread could have its turn."""

    def take() -> bool:
        if taken := turn.acquire(blocking=False):
            turn.release()
        return taken

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(take).result()


def test_under_a_ceiling_images_go_one_by_one(
    run: Path, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = sorted((balls / "imagesTr").iterdir())[0]
    predictor = volseg.Predictor.load(run, device="cpu", options=Options(memory_gb=64))
    seen = []

    def watch(owner: type, name: str) -> None:
        plain = getattr(owner, name)

        def call(*arguments: object, **options: object) -> object:
            seen.append((name, is_free(predictor.turn)))
            return plain(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    watch(volseg.Predictor, "read")
    watch(volseg.Predictor, "segment")
    watch(volseg.Segmentation, "save")
    predictor(image)
    assert seen == [("read", False), ("segment", False)]
    seen.clear()
    predict_cases(predictor, find_inputs([image], ["MR0"]), Outputs(tmp_path))
    assert seen == [("read", False), ("segment", False), ("save", False)]
    assert is_free(predictor.turn)


def test_other_images_have_their_share_of_what_is_free(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor_module, "free_bytes", lambda device: 1e12)
    monkeypatch.setattr(predictor_module, "resident_bytes", lambda: 1e9)
    plain, under_ceiling = (
        volseg.Predictor.load(run, device="cpu", options=Options(memory_gb=most))
        for most in (None, 3)
    )
    assert plain._room(5) == pytest.approx(0.7e12 - 5 - plain._window_bytes)
    assert under_ceiling._room(5) == pytest.approx(2e9 - 5 - plain._window_bytes)


PREDICT_ALONE = """
import math, sys
from pathlib import Path
import torch
from makers import make_plan
from volseg import Predictor
from volseg.data.cases import Classes
from volseg.inference import Model, Options
from volseg.inference.memory import resident_bytes
from volseg.inference.model import ModelFacts

class Slopes(torch.nn.Module):
    def forward(self, image):
        tops = torch.linspace(-2, 2, 80).view(1, -1, 1, 1, 1)
        return torch.addcmul(-tops.square(), 2 * tops, image)

path, gb = Path(sys.argv[1]), float(sys.argv[2])
names = ("background", *(f"c{number}" for number in range(1, 80)))
plan = make_plan().model_copy(update={"patch": (48, 48, 48)})
facts = ModelFacts(plan=plan, classes=Classes(names=names, values=tuple(range(80))))
model = Model((Slopes(),), facts, torch.device("cpu"), digest="slopes")
torch.set_num_threads(1)
ceiling_gb = 1e-9 * resident_bytes() + gb
most_gb = ceiling_gb if sys.argv[3] == "ceiling" else None
predictor = Predictor(model, Options(memory_gb=most_gb, precision="float32"))
predictor(path).save(path.with_name("labels.nii.gz"))
lines = Path("/proc/self/status").read_text().splitlines()
peak_kb = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
print(1.024e-6 * peak_kb / ceiling_gb)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no peak")
def test_a_prediction_stays_below_its_ceiling(tmp_path: Path) -> None:
    """Thick slices become three times as many; 80 classes need strips."""
    path = tmp_path / "thick.nii.gz"
    rng = np.random.default_rng(0)
    nib.save(
        nib.Nifti1Image(rng.normal(size=(192, 192, 60)).astype(np.float32), np.diag([1, 1, 3, 1])),
        path,
    )
    paths = [str(Path(volseg.__file__).parents[1]), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

    def measure(word: str) -> float:
        command = [sys.executable, "-c", PREDICT_ALONE, str(path), "0.5", word]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert measure("none") > 1.05
    assert measure("ceiling") <= 1


MEMINFO = {"proc/meminfo": "MemTotal: 99999999 kB\nMemAvailable: 8000 kB"}
HERE, JOB = "sys/fs/cgroup/", "sys/fs/cgroup/a.slice/job/"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/", {}, 8192000),
        (
            "0::/",
            {
                f"{HERE}memory.max": "2000000",
                f"{HERE}memory.current": "1500000",
                f"{HERE}memory.stat": "anon 1200000\ninactive_file 300000",
            },
            800000,
        ),
        (
            "0::/",
            {
                f"{HERE}memory.max": "max",
                f"{HERE}memory.current": "1500000",
                f"{HERE}memory.stat": "",
            },
            8192000,
        ),
        # That of a job and of what is around it.
        (
            "0::/a.slice/job",
            {
                f"{JOB}memory.max": "900",
                f"{JOB}memory.current": "500",
                f"{JOB}memory.stat": "inactive_file 100",
                f"{HERE}a.slice/memory.max": "800",
                f"{HERE}a.slice/memory.current": "700",
                f"{HERE}a.slice/memory.stat": "inactive_file 0",
                f"{HERE}b.slice/memory.max": "10",
                f"{HERE}b.slice/memory.current": "0",
                f"{HERE}b.slice/memory.stat": "",
            },
            100,
        ),
        # Version 1, in a container whose group has a name outside.
        (
            "5:cpu:/large\n4:memory:/docker/1f",
            {
                f"{HERE}memory/memory.limit_in_bytes": "900",
                f"{HERE}memory/memory.usage_in_bytes": "500",
                f"{HERE}memory/memory.stat": "inactive_file 7\ntotal_inactive_file 100",
                f"{HERE}memory/large/memory.limit_in_bytes": "10",
                f"{HERE}memory/large/memory.usage_in_bytes": "0",
                f"{HERE}memory/large/memory.stat": "",
            },
            500,
        ),
    ],
)
def test_what_a_container_or_job_has_left(
    own: str, files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    root = write_tree(tmp_path, own, {**MEMINFO, **files})
    assert free_bytes(torch.device("cpu"), root) == expected


def test_who_tells_nothing_sets_no_limit(tmp_path: Path) -> None:
    assert free_bytes(torch.device("cpu"), tmp_path) == math.inf
