"""The cache is never stale; sample i of step t depends only on (seed, t, i)."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from makers import STILL, keep, make_affine, make_dataset, make_plan, write_nifti
from torch.utils.data import DataLoader

from volseg.config import AugmentationConfig, DataConfig
from volseg.data.augmentation import Augmentation
from volseg.data.cache import CachedCase, build_cache, predict_bytes, remove_superseded
from volseg.data.cases import Case, Classes, Dataset
from volseg.data.layouts import find_dataset
from volseg.data.mapping import OPEN_FILES, SMALL_BYTES, PlaceInFile
from volseg.data.patches import Batches, PatchDataset, cut, make_loader
from volseg.data.spatial import resample
from volseg.errors import ConfigError, DataError, MachineError
from volseg.planning import Normalisation, Plan, compute_fingerprint
from volseg.planning.fingerprint import CaseFingerprint as FingerprintRow

CPU = torch.device("cpu")
CLASSES = Classes(names=("background", "a", "b"), values=(0, 1, 2))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return find_dataset(make_dataset(tmp_path / "d", "msd", num_cases=3, values=(1, 2)))


def cached(dataset: Dataset, folder: Path, plan: Plan | None = None) -> list[CachedCase]:
    return build_cache(dataset, dataset.cases, plan or make_plan(), folder)


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_entry_holds_normalised_image_label_and_foreground(
    dataset: Dataset, tmp_path: Path
) -> None:
    case = cached(dataset, tmp_path / "c")[0]
    raw = nib.load(dataset.cases[0].images[0]).get_fdata()
    label = np.asarray(nib.load(dataset.cases[0].label).dataobj)
    expected = (raw - raw.mean()) / raw.std()
    assert case.image[0] == pytest.approx(expected, abs=4e-3)
    assert np.array_equal(case.label, label)
    assert len(case.foreground_counts) == 2
    for index in (1, 2):
        voxels = case.positions(index)
        assert len(voxels) == (label == index).sum()
        assert (label[tuple(voxels.T)] == index).all()


def test_files_do_not_stay_open_beyond_a_number(tmp_path: Path) -> None:
    files = Path("/proc/self/fd")
    if not files.is_dir():
        pytest.skip("needs /proc")
    before = len(list(files.iterdir()))
    for number in range(OPEN_FILES + 50):
        array = np.arange(number, number + 5)
        np.save(tmp_path / f"{number}.npy", array)
        place = PlaceInFile(tmp_path / f"{number}.npy")
        assert place.map().tolist() == place.map().tolist() == array.tolist()
        assert not place.map().flags.writeable
    assert len(list(files.iterdir())) <= before + OPEN_FILES
    # Another file of the same name is another array.
    array = np.arange(5)[::-1]
    np.save(tmp_path / "0.npy", array)
    os.utime(tmp_path / "0.npy", ns=(1, 1))
    assert PlaceInFile(tmp_path / "0.npy").map().tolist() == array.tolist()
    large = np.zeros(SMALL_BYTES, np.uint8)
    np.save(tmp_path / "large.npy", large)
    between = len(list(files.iterdir()))
    assert not PlaceInFile(tmp_path / "large.npy").map().any()
    assert len(list(files.iterdir())) == between


def test_second_build_reuses_the_entries(dataset: Dataset, tmp_path: Path) -> None:
    cached(dataset, tmp_path / "c")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*.npy")}
    cached(dataset, tmp_path / "c")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "c").rglob("*.npy")} == before


def test_changed_file_or_plan_makes_a_new_entry_and_drops_the_old(
    dataset: Dataset, tmp_path: Path
) -> None:
    cached(dataset, tmp_path / "c")
    first = entries(tmp_path / "c")
    image = nib.load(dataset.cases[0].images[0])
    nib.save(nib.Nifti1Image(image.get_fdata() + 1, image.affine), dataset.cases[0].images[0])
    (tmp_path / "c" / "notes").mkdir()
    remove_superseded(tmp_path / "c", cached(dataset, tmp_path / "c"))
    second = entries(tmp_path / "c") - {"notes"}
    assert len(second - first) == 1
    assert len(second) == 3
    other = cached(dataset, tmp_path / "c", make_plan((2.0, 2.0, 2.0)))
    assert second < entries(tmp_path / "c")
    remove_superseded(tmp_path / "c", other)
    assert not entries(tmp_path / "c") & second
    assert "notes" in entries(tmp_path / "c")


def test_bad_case_leaves_no_half_entry(dataset: Dataset, tmp_path: Path) -> None:
    measured = compute_fingerprint(dataset).cases
    file = dataset.cases[1].images[0]
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(DataError, match=r"case_01\.nii\.gz"):
        build_cache(dataset, dataset.cases, make_plan(), tmp_path / "c", measured=measured)
    assert not any(name.startswith((".", "case_01")) for name in entries(tmp_path / "c"))
    assert any(name.startswith("case_00") for name in entries(tmp_path / "c"))


def make_patches(cases: list[CachedCase], seed: int = 0, foreground: float = 0.5) -> PatchDataset:
    return PatchDataset(
        cases,
        (8, 8, 8),
        batch_size=2,
        foreground=foreground,
        augment=Augmentation(AugmentationConfig(rotate=1, noise=1), (1, 1, 1), CLASSES),
        seed=seed,
    )


def test_sample_depends_on_seed_and_number_only(dataset: Dataset, tmp_path: Path) -> None:
    cases = cached(dataset, tmp_path / "c")

    def make(number: int, seed: int = 0) -> torch.Tensor:
        patches = make_patches(cases, seed)
        return patches.augment([patches[number]])[0]

    again = make_patches(cases)
    for _ in range(5):
        again[3]
    assert torch.equal(again.augment([again[11]])[0], make(11))
    assert not torch.equal(make(11), make(11, seed=1))
    assert not torch.equal(make(11), make(13))


@pytest.mark.parametrize("finish_in_loader", [True, False])
def test_batch_is_its_samples(dataset: Dataset, tmp_path: Path, finish_in_loader: bool) -> None:
    """On a GPU what was cut is changed behind the loader; the batches must be the same."""
    patches = make_patches(cached(dataset, tmp_path / "c"))
    if finish_in_loader:
        batches = make_loader(patches, 2, workers=0, device=CPU)
    else:
        loader = DataLoader(patches, batch_sampler=[[4, 5]], collate_fn=list)
        batches = Batches(loader, patches.augment)
    images, labels = batches.finish(next(iter(batches)))
    assert (images.shape, images.dtype) == ((2, 1, 8, 8, 8), torch.float32)
    assert (labels.shape, labels.dtype) == ((2, 8, 8, 8), torch.int64)
    for number, image, label in zip((4, 5), images, labels, strict=True):
        alone = patches.augment([patches[number]])
        assert torch.equal(alone[0][0], image)
        assert torch.equal(alone[1][0], label)


def test_turned_patch_shows_what_lies_beyond_its_corners(dataset: Dataset, tmp_path: Path) -> None:
    case = cached(dataset, tmp_path / "c")[0]
    patches = PatchDataset(
        [case],
        (5, 6, 4),
        batch_size=1,
        foreground=0.5,
        augment=Augmentation(STILL.model_copy(update={"rotate": 1.0}), (1, 1, 1), CLASSES),
        seed=0,
    )
    whole, labels = torch.from_numpy(case.image.astype(np.float32)), torch.tensor(case.label)
    still = PatchDataset([case], (5, 6, 4), batch_size=1, foreground=0.5, augment=keep, seed=0)
    for number in range(10):
        image, label = patches.augment([patches[number]])
        start = find_start(whole, still[number].image)
        middle = [s + (p - 1) / 2 for s, p in zip(start, (5, 6, 4), strict=True)]
        matrix = patches[number].changes.matrix
        expected = resample(whole, labels, matrix, middle, (5, 6, 4))
        torch.testing.assert_close(image[0], expected[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(label[0], expected[1].long())


def slices(start: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))


def find_start(whole: torch.Tensor, patch: torch.Tensor) -> tuple[int, ...]:
    corner = (whole[0] == patch[0, 0, 0, 0].float()).nonzero()
    (start,) = [
        tuple(place)
        for place in corner.tolist()
        if torch.equal(
            whole[(slice(None), *slices(place, patch.shape[1:]))],
            patch.float(),
        )
    ]
    return start


def test_workers_give_the_same_batches_as_none(dataset: Dataset, tmp_path: Path) -> None:
    cases = cached(dataset, tmp_path / "c")
    alone = iter(make_loader(make_patches(cases), 0, workers=0, device=CPU))
    shared = iter(make_loader(make_patches(cases), 0, workers=2, device=CPU))
    for _ in range(4):
        for a, b in zip(next(alone), next(shared), strict=True):
            assert torch.equal(a, b)


def test_loader_that_starts_later_goes_on_there(dataset: Dataset, tmp_path: Path) -> None:
    cases = cached(dataset, tmp_path / "c")
    whole = iter(make_loader(make_patches(cases), 0, workers=0, device=CPU))
    later = iter(make_loader(make_patches(cases), 3, workers=0, device=CPU))
    for _ in range(3):
        next(whole)
    assert torch.equal(next(whole)[0], next(later)[0])


def test_every_case_comes_once_per_round(dataset: Dataset, tmp_path: Path) -> None:
    patches = make_patches(cached(dataset, tmp_path / "c"))
    rounds = [[patches._case_index(3 * r + i) for i in range(3)] for r in range(20)]
    assert all(sorted(order) == [0, 1, 2] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1


def test_forced_patches_hold_foreground_of_every_class(dataset: Dataset, tmp_path: Path) -> None:
    patches = PatchDataset(
        cached(dataset, tmp_path / "c"),
        (4, 4, 4),
        batch_size=1,
        foreground=1.0,
        augment=keep,
        seed=0,
    )
    centres = [int(patches[number][1][2, 2, 2]) for number in range(60)]
    # Patches near a border are moved inside, so a few centres are off their class.
    assert min(centres.count(1), centres.count(2)) > 15


def test_share_of_centred_patches_is_exact_on_average(dataset: Dataset, tmp_path: Path) -> None:
    patches = make_patches(cached(dataset, tmp_path / "c"), foreground=0.75)
    # 1.5 of 2 samples: the first always, the second every other time.
    assert patches.num_centred == 1.5


def test_changed_voxels_of_a_detached_header_are_noticed(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", "folders", num_cases=2)
    for path in (folder / "images").iterdir():
        image = nib.load(path)
        pair = nib.Nifti1Pair(image.get_fdata(dtype=np.float32), image.affine)
        nib.save(pair, path.with_name(path.name.replace(".nii.gz", ".hdr")))
        path.unlink()
    found = find_dataset(folder)
    cached(found, tmp_path / "c")
    before = entries(tmp_path / "c")
    voxels = folder / "images" / "case_00.img"
    data = bytearray(voxels.read_bytes())
    data[100] ^= 1
    voxels.write_bytes(data)
    cached(found, tmp_path / "c")
    assert len(entries(tmp_path / "c") - before) == 1


def test_volume_smaller_than_the_patch_is_padded_around() -> None:
    array = np.ones((1, 3, 5), np.float32)
    patch = cut(array, (-1, 1), (5, 4))
    assert patch.shape == (1, 5, 4)
    assert patch[0].tolist() == [[0] * 4, [1] * 4, [1] * 4, [1] * 4, [0] * 4]


def test_training_without_cases_is_refused() -> None:
    with pytest.raises(ConfigError, match="no case to train on"):
        make_patches([])


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_predicted_bytes_by_hand() -> None:
    case = FingerprintRow(
        case_id="a",
        full_shape=(50, 50, 50),
        shape=(40, 30, 20),
        spacing_mm=(1.0, 2.0, 1.0),
        class_voxels=(20_000, 1_000, 3_000),
        class_radius_mm=(0, 1, 1),
    )
    dataset = Dataset(
        name="d",
        root=Path("d"),
        layout="folders",
        channels=("A", "B", "C"),
        classes=CLASSES,
        cases=(),
    )
    # 40 x 60 x 10 voxels of 3 channels of 2 bytes and a label; as many voxels as before: 4000
    # positions of 3 x 4 bytes.
    by_hand = 40 * 60 * 10 * 7 + 4_000 * 12
    plan = make_plan((1.0, 1.0, 2.0))
    listed = Case(case_id="a", images=(Path("a.nii"),), patient_id="a")
    assert predict_bytes(dataset, listed, plan, case) == pytest.approx(by_hand, abs=600)
    finer = make_plan((0.5, 1.0, 1.0))
    # Four times as many voxels, and so positions: 4000, and 12 000, of which 10 000 are kept.
    by_hand = 80 * 60 * 20 * 7 + (4 * 1_000 + 10_000) * 12
    assert predict_bytes(dataset, listed, finer, case) == pytest.approx(by_hand, abs=600)


def make_padded_dataset(folder: Path) -> Dataset:
    """Oblique cases of two channels and different sizes, padded with zeros and partly labelled."""
    rng = np.random.default_rng(0)
    for number, shape in enumerate([(60, 50, 40), (80, 60, 30), (48, 72, 50)]):
        image = np.zeros(shape, np.float32)
        image[5:-4, 3:-2, 2:-2] = rng.normal(5, 1, image[5:-4, 3:-2, 2:-2].shape)
        label = np.zeros(shape, np.uint8)
        label[6:40, 4:40, 3:16], label[6:18, 4:18, 18:26], label[-14:-4, 10:-2, 2:-2] = 1, 2, 9
        affine = make_affine((1.0, 0.9, 1.5 + number), oblique=True)
        for channel in range(2):
            file = folder / "images" / f"c{number}_{channel:04d}.nii.gz"
            write_nifti(file, image * (channel + 1), affine)
        write_nifti(folder / "labels" / f"c{number}.nii.gz", label, affine)
    return find_dataset(folder).with_labels(DataConfig(ignore_label=9))


def test_predicted_size_is_that_of_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = make_padded_dataset(tmp_path / "d")
    plan = make_plan((1.1, 1.0, 2.0)).model_copy(
        update={
            "normalisation": tuple(
                Normalisation(channel=name, scheme="zscore") for name in dataset.channels
            )
        }
    )
    measured = {row.case_id: row for row in compute_fingerprint(dataset).cases}
    build_cache(dataset, dataset.cases, plan, tmp_path / "c")
    for case in dataset.cases:
        (entry,) = (tmp_path / "c").glob(f"{case.case_id}-*")
        predicted = predict_bytes(dataset, case, plan, measured[case.case_id])
        assert predicted == pytest.approx(size_of(entry), rel=0.02)
        # Of a header alone: not less, since padding and classes are taken as large.
        assert predict_bytes(dataset, case, plan) > size_of(entry)
    with caplog.at_level(logging.INFO):
        cases = tuple(measured.values())
        build_cache(dataset, dataset.cases, plan, tmp_path / "e", measured=cases)
        (said,) = re.findall(r"cache: about ([\d.]+) MB for 3 cases -> (?:.*)/e", caplog.text)
        assert float(said) == pytest.approx(size_of(tmp_path / "e") / 1e6, abs=0.06)
        caplog.clear()
        build_cache(dataset, dataset.cases, plan, tmp_path / "e", measured=cases)
    assert "cache: about" not in caplog.text


def test_a_disk_without_room_is_refused_before_anything_is_written(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder = make_plan(), tmp_path / "run" / "cache"
    measured = compute_fingerprint(dataset).cases
    needed = sum(
        predict_bytes(dataset, case, plan, row)
        for case, row in zip(dataset.cases, measured, strict=True)
    )
    asked: list[Path] = []

    def limit(free: int) -> None:
        def disk_usage(path: Path) -> object:
            asked.append(Path(path))
            return shutil._ntuple_diskusage(10**12, 10**12 - free, free)  # type: ignore[attr-defined]

        monkeypatch.setattr(shutil, "disk_usage", disk_usage)

    limit(needed - 1)
    with pytest.raises(MachineError, match=r"0.0 MB free; expected 0.0 MB for the cache of 3") as e:
        build_cache(dataset, dataset.cases, plan, folder, measured=measured)
    assert "another disk (-o)" in str(e.value)
    assert e.value.exit_code == 4
    assert not folder.parent.exists()
    assert asked == [tmp_path]
    limit(needed)
    build_cache(dataset, dataset.cases[:2], plan, folder, measured=measured)
    # What is there already needs no room: a third of it is enough for the third case.
    limit(needed // 2)
    assert len(build_cache(dataset, dataset.cases, plan, folder, measured=measured)) == 3
    limit(0)
    assert len(build_cache(dataset, dataset.cases, plan, folder, measured=measured)) == 3
