"""Strips of a volume: as few as fit, and the same labels."""

from __future__ import annotations

import weakref
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import volseg
from volseg.data.content import Box
from volseg.errors import ConfigError, MachineError
from volseg.inference import Options, memory, windows
from volseg.inference.memory import free_bytes, plan_strips, resident_bytes

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


def test_what_a_container_has_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    cpu = torch.device("cpu")
    host = free_bytes(cpu)
    assert host > 1e8
    (tmp_path / "memory.max").write_text("2000000\n")
    (tmp_path / "memory.current").write_text("1500000\n")
    (tmp_path / "memory.stat").write_text("anon 1200000\ninactive_file 300000\n")
    assert free_bytes(cpu) == 2000000 - 1500000 + 300000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(cpu) == pytest.approx(host, rel=0.2)
    (tmp_path / "memory.max").unlink()
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("900\n")
    (old / "memory.usage_in_bytes").write_text("500\n")
    (old / "memory.stat").write_text("total_inactive_file 100\n")
    assert free_bytes(cpu) == 500
