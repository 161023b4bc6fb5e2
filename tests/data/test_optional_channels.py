"""Channels that a case may lack: found in every layout, measured and prepared without them."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from makers import STILL, make_case, make_dataset, write_nifti
from torch import Tensor

from volseg.cli import main
from volseg.config import Config, with_length
from volseg.data.augmentation import Augmentation, Cut
from volseg.data.cache import build_cache
from volseg.data.cases import Classes
from volseg.data.layouts import find_dataset
from volseg.data.reading import read_channels
from volseg.errors import ConfigError, DataError
from volseg.planning import Machine, compute_fingerprint, describe_cpu, make_plan


def names_of(folder: Path, case: str, optional: tuple[str, ...]) -> list[str | None]:
    dataset = find_dataset(folder, optional)
    (found,) = (c for c in (*dataset.cases, *dataset.unlabelled) if c.case_id == case)
    assert dataset.optional_channels == optional
    assert found.files == tuple(path for path in found.images if path)
    return [None if path is None else path.name for path in found.images]


def test_nnunet_case_may_lack_an_optional_channel(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_dataset(tmp_path / "d", "nnunet", num_channels=3)
    (folder / "imagesTr" / "case_01_0001.nii.gz").unlink()
    with pytest.raises(DataError, match=r'--set "data.optional_channels=\[MR1\]"'):
        find_dataset(folder)
    with pytest.raises(DataError, match=r"no image of channel 1 \(MR1\)"):
        find_dataset(folder, ("MR0", "MR2"))
    with caplog.at_level(logging.INFO):
        names = names_of(folder, "case_01", ("MR1",))
    assert names == ["case_01_0000.nii.gz", None, "case_01_0002.nii.gz"]
    assert "channel MR1: 1 of 4 cases have none" in caplog.text


def test_channels_of_all_files_follow_each_other(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = rng.integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
    pair = rng.normal(size=(4, 5, 6, 2)).astype(np.float32)
    paths = [
        write_nifti(tmp_path / "whole.nii.gz", whole),
        None,
        write_nifti(tmp_path / "pair.nii.gz", pair),
    ]
    image = read_channels(paths, ("A", "B", "C", "D"))
    assert image.array.dtype == np.float32
    expected = [whole, np.zeros_like(whole), pair[..., 0], pair[..., 1]]
    np.testing.assert_array_equal(image.array, np.stack(expected))
    assert image.absent == (1,)
    alone = read_channels(paths[2:], ("A", "B"))
    np.testing.assert_array_equal(alone.array, np.moveaxis(pair, -1, 0))
    with pytest.raises(DataError, match="4 channels; expected 3"):
        read_channels(paths, ("A", "B", "C"))


def test_a_case_without_any_image_is_an_error(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", "nnunet", num_channels=2)
    for path in (folder / "imagesTr").glob("case_01_*"):
        path.unlink()
    with pytest.raises(DataError, match="case 'case_01' has no image of channel 0"):
        find_dataset(folder, ("MR0", "MR1"))


def test_pair_of_folders_may_lack_an_optional_channel(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", "folders", num_channels=2)
    (folder / "images" / "case_00_0000.nii.gz").unlink()
    with pytest.raises(DataError, match=r"data.optional_channels=\[channel_0\]"):
        find_dataset(folder)
    assert names_of(folder, "case_00", ("channel_0",)) == [None, "case_00_0001.nii.gz"]


def test_brats_case_may_lack_an_optional_channel(tmp_path: Path) -> None:
    suffixes = ("t1", "t1ce", "t2", "flair")
    for name in ("BraTS2021_00000", "BraTS2021_00001"):
        folder = tmp_path / name
        files = [folder / f"{name}_{suffix}.nii.gz" for suffix in suffixes]
        make_case(files, folder / f"{name}_seg.nii.gz", values=(1, 2, 4))
    (tmp_path / "BraTS2021_00001" / "BraTS2021_00001_flair.nii.gz").unlink()
    with pytest.raises(DataError, match=r"no FLAIR image.*data.optional_channels=\[FLAIR\]"):
        find_dataset(tmp_path)
    names = names_of(tmp_path, "BraTS2021_00001", ("FLAIR",))
    assert names == [f"BraTS2021_00001_{s}.nii.gz" for s in suffixes[:3]] + [None]


def write_list(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def list_cases(folder: Path, number: int = 3) -> list[dict[str, str]]:
    return [
        {
            "image_T1": f"images/case_{i:02d}_0000.nii.gz",
            "image_FLAIR": f"images/case_{i:02d}_0001.nii.gz",
            "label": f"labels/case_{i:02d}.nii.gz",
        }
        for i in range(number)
    ]


def test_an_empty_cell_of_a_datalist_is_a_channel_that_is_not_there(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path, "folders", num_channels=2)
    rows = list_cases(folder)
    rows[1]["image_FLAIR"] = ""
    dataset = find_dataset(write_list(folder / "list.csv", rows))
    assert dataset.optional_channels == ("FLAIR",)
    assert [case.images[1] is None for case in dataset.cases] == [False, True, False]
    rows[1]["image_T1"] = ""
    with pytest.raises(DataError, match=r"line 3: every column image_T1, image_FLAIR is empty"):
        find_dataset(write_list(folder / "list.csv", rows))


def test_null_in_a_json_list_is_a_channel_that_is_not_there(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path, "folders", num_channels=2)
    entries = [
        {"image": [row["image_T1"], row["image_FLAIR"]], "label": row["label"]}
        for row in list_cases(folder)
    ]
    entries[2]["image"][0] = None  # type: ignore[call-overload]
    path = folder / "list.json"
    path.write_text(json.dumps({"training": entries, "modality": ["T1", "FLAIR"]}))
    dataset = find_dataset(path)
    assert dataset.optional_channels == ("T1",)
    assert dataset.cases[2].case_id == "case_02_0001"
    entries[2]["image"] = [None, None]  # type: ignore[assignment]
    path.write_text(json.dumps(entries))
    with pytest.raises(DataError, match=r"training\[2\]: no image"):
        find_dataset(path)


@pytest.mark.parametrize(
    ("channels", "optional", "problem"),
    [(2, "MR7", "data.optional_channels 'MR7'; expected one of MR0, MR1"), (1, "MR0", "alone")],
)
def test_wrong_optional_channels_are_refused(
    tmp_path: Path, channels: int, optional: str, problem: str
) -> None:
    folder = make_dataset(tmp_path / "d", "nnunet", num_channels=channels)
    with pytest.raises(ConfigError, match=problem):
        find_dataset(folder, (optional,))


def test_check_takes_the_option_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_dataset(tmp_path / "d", "nnunet", num_channels=2)
    (folder / "imagesTr" / "case_01_0000.nii.gz").unlink()
    assert main(["check", str(folder)]) == 3
    assert "data.optional_channels=[MR0]" in capsys.readouterr().err
    assert main(["check", str(folder), "--set", "data.optional_channels=[MR0]"]) == 0


def test_statistics_are_of_the_cases_that_have_the_channel(tmp_path: Path) -> None:
    for number, value in enumerate((10, 20, 60)):
        label = np.zeros((6, 6, 6), np.uint8)
        label[2:4, 2:4, 2:4] = 1
        image = np.where(label, value, number - 5).astype(np.float32)
        write_nifti(tmp_path / "imagesTr" / f"c{number}_0000.nii.gz", image)
        if number != 1:
            write_nifti(tmp_path / "imagesTr" / f"c{number}_0001.nii.gz", image * 2)
        write_nifti(tmp_path / "labelsTr" / f"c{number}.nii.gz", label)
    description = {"channel_names": {"0": "A", "1": "B"}, "labels": {"background": 0, "x": 1}}
    description |= {"numTraining": 3, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    first, second = compute_fingerprint(find_dataset(tmp_path, ("B",))).channels
    # Means of 10, 20, 60 and of 20, 120; medians of the minima -5, -4, -3 and of -10, -6.
    assert (first.mean, first.image_minimum, first.optional) == (30, -4, False)
    assert (second.mean, second.image_minimum, second.optional) == (70, -8, True)


def test_a_channel_that_no_case_has_is_refused(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", "nnunet", num_channels=2)
    for path in (folder / "imagesTr").glob("*_0001.nii.gz"):
        path.unlink()
    with pytest.raises(DataError, match="no labelled case has channel MR1"):
        compute_fingerprint(find_dataset(folder, ("MR1",)))


def machine() -> Machine:
    return describe_cpu()


def test_an_absent_channel_is_prepared_as_zeros(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", "nnunet", num_channels=2)
    (folder / "imagesTr" / "case_01_0001.nii.gz").unlink()
    dataset = find_dataset(folder, ("MR1",))
    config = with_length(Config.parse({"plan": {"normalisation": "ct"}}, "test"), None, 1)
    plan = make_plan(compute_fingerprint(dataset), machine(), config, 3).plan
    assert plan.optional_channels == (1,)
    cached = build_cache(dataset, dataset.cases, plan, tmp_path / "cache")
    # Zero HU would not be zero: the mean of the foreground is far from it.
    assert plan.normalisation[1].mean != pytest.approx(0, abs=1)
    assert [bool(np.any(case.image[1])) for case in cached] == [True, False, True, True]
    assert all(np.any(case.image[0]) for case in cached)
    strict = plan.model_copy(
        update={
            "normalisation": tuple(
                n.model_copy(update={"optional": False}) for n in plan.normalisation
            )
        }
    )
    assert strict.preparation == plan.preparation
    with pytest.raises(DataError, match=r"no image of channel MR1.*optional_channels=\[MR1\]"):
        build_cache(dataset, dataset.cases, strict, tmp_path / "other")


def test_which_channel_is_there_decides_about_the_cache(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", "nnunet", num_channels=2)
    image = (folder / "imagesTr" / "case_01_0000.nii.gz").read_bytes()
    second = folder / "imagesTr" / "case_01_0001.nii.gz"
    second.write_bytes(image)
    dataset = find_dataset(folder, ("MR0", "MR1"))
    config = with_length(Config(), None, 1)
    plan = make_plan(compute_fingerprint(dataset), machine(), config, 3).plan
    entries = set()
    for absent in (None, 0, 1):
        case = dataset.cases[1]
        images = [None if i == absent else path for i, path in enumerate(case.images)]
        case = case.model_copy(update={"images": tuple(images)})
        (cached,) = build_cache(dataset, [case], plan, tmp_path / "cache")
        assert cached.absent == (() if absent is None else (absent,))
        entries.add(cached.folder)
        is_there = [bool(np.any(channel)) for channel in cached.image]
        assert is_there == [i != absent for i in range(2)]
    assert len(entries) == 3


def change(
    image: Tensor, optional: Sequence[int], seed: int, absent: Sequence[int] = (), **how: Any
) -> Tensor:
    """A patch by an augmentation that drops channels, and does nothing else unless told."""
    config = STILL.model_copy(update=how)
    augment = Augmentation(config, (1.0, 1.0, 1.0), CLASSES, optional)
    label = torch.zeros(image.shape[1:], dtype=torch.int64)
    changes = augment.draw(np.random.default_rng(seed), len(image))
    return augment([Cut(image, label, (0.5, 0.5, 0.5), (2, 2, 2), changes, "a", absent)])[0][0]


PATCH = torch.ones(3, 2, 2, 2)
CLASSES = Classes(names=("background", "a"), values=(0, 1))


def test_optional_channels_are_dropped_with_their_probability() -> None:
    there = np.array(
        [
            [bool(channel.any()) for channel in change(PATCH, (1, 2), seed, drop_channel=0.25)]
            for seed in range(2000)
        ]
    )
    assert there[:, 0].all()
    # Standard deviation of a share of 2000: 0.01.
    assert there[:, 1:].mean(axis=0) == pytest.approx([0.75, 0.75], abs=0.04)
    assert (there[:, 1] & there[:, 2]).mean() == pytest.approx(0.75**2, abs=0.045)
    assert PATCH.all()


def test_the_same_seed_drops_the_same() -> None:
    for seed in range(20):
        first, again = (change(PATCH, (0, 1, 2), seed, drop_channel=0.5) for _ in range(2))
        assert torch.equal(first, again)


def test_one_channel_is_always_left() -> None:
    changed = [change(PATCH, (0, 1, 2), seed, drop_channel=1.0) for seed in range(50)]
    left = {tuple(bool(channel.any()) for channel in image) for image in changed}
    assert left == {(True, False, False), (False, True, False), (False, False, True)}
    lacking = PATCH.clone()
    lacking[:2] = 0
    assert change(lacking, (0, 1, 2), 5, (0, 1), drop_channel=1.0)[2].all()


def test_what_is_not_there_stays_zero_under_noise() -> None:
    lacking = PATCH.clone()
    lacking[1] = 0
    how: dict[str, Any] = {"drop_channel": 0.0, "noise": 1, "noise_deviation": (0.1, 0.1)}
    for absent, expected in (((1,), [True, False, True]), ((), [True, True, True])):
        # Without the case's word, a patch that is zero is a patch as any other.
        image = change(lacking, (1, 2), 1, absent, **how)
        changed = [bool((new != old).any()) for new, old in zip(image, lacking, strict=True)]
        assert changed == expected
