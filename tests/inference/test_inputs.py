"""Which cases are made of the files and folders that a user names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from makers import make_dataset

from volseg.data.cases import Case
from volseg.data.reading import read_channels
from volseg.errors import ConfigError, DataError
from volseg.inference.inputs import find_inputs

FOUR = ("FLAIR", "T1", "T1c", "T2")


def touch(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


def find(paths: list[Path], num_channels: int) -> list[Case]:
    return find_inputs(paths, [f"channel_{number}" for number in range(num_channels)])


def ids(paths: list[Path], num_channels: int) -> dict[str, int]:
    return {case.case_id: len(case.images) for case in find(paths, num_channels)}


def names(case: Case) -> list[str | None]:
    """Of the files by channel, with their folders."""
    return [path and f"{path.parent.name}/{path.name}" for path in case.images]


def test_files_are_grouped_by_channel_suffix(tmp_path: Path) -> None:
    touch(tmp_path / "a", "p_0000.nii.gz", "p_0001.nii.gz", "q.nii.gz", ".x.nii.gz", "n.txt")
    assert ids([tmp_path / "a"], 2) == {"p": 2, "q": 1}
    # A case that lacks a channel is one that fails.
    assert ids([tmp_path / "a"], 3) == {"p": 2, "q": 1}


def test_numbered_cases_of_one_channel_keep_their_names(tmp_path: Path) -> None:
    touch(tmp_path / "a", "p_0000.nii.gz", "p_0001.nii.gz")
    assert ids([tmp_path / "a"], 1) == {"p_0000": 1, "p_0001": 1}
    (single,) = touch(tmp_path / "b", "r_0000.nii.gz")
    assert ids([single], 1) == {"r": 1}
    (other,) = touch(tmp_path / "c", "r_0004.nii.gz")
    assert ids([other], 1) == {"r_0004": 1}


def test_wrong_inputs_of_a_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        find([tmp_path / "z.nii.gz"], 1)
    twice = [*touch(tmp_path / "b", "s.nii.gz"), *touch(tmp_path / "c", "s.nii")]
    with pytest.raises(DataError, match="would both be written as s"):
        find(twice, 1)


def test_channels_of_several_folders_are_placed_by_their_numbers(tmp_path: Path) -> None:
    first = touch(tmp_path / "t1", "p_0000.nii.gz")
    second = touch(tmp_path / "flair", "p_0001.nii.gz")
    for paths in ([*second, *first], [tmp_path / "flair", tmp_path / "t1"]):
        (case,) = find(paths, 2)
        assert names(case) == ["t1/p_0000.nii.gz", "flair/p_0001.nii.gz"]


@pytest.mark.parametrize(
    "places",
    [
        ("t1/p.nii.gz", "flair/p.nii.gz"),
        ("t1/p.nii.gz", "t1/p.nii"),
        ("t1/p_0000.nii.gz", "flair/p_0000.nii.gz"),
    ],
)
def test_files_that_no_number_tells_apart_are_no_channels(
    tmp_path: Path, places: tuple[str, str]
) -> None:
    files = [touch(tmp_path / Path(p).parent, Path(p).name)[0] for p in places]
    with pytest.raises(DataError, match="numbered as in CASE_0000, CASE_0001"):
        find(files, 2)


def test_a_file_without_number_is_no_channel_of_one_with(tmp_path: Path) -> None:
    touch(tmp_path / "a", "p.nii.gz", "p_0000.nii.gz")
    assert ids([tmp_path / "a"], 2) == {"p": 1, "p_0000": 1}


@pytest.mark.parametrize("numbers", [(0, 2), (1, 2), (2, 3)])
@pytest.mark.parametrize("optional", [(), (0,), (1,)])
def test_numbers_of_other_channels_are_not_closed_up(
    tmp_path: Path, numbers: tuple[int, int], optional: tuple[int, ...]
) -> None:
    source = make_dataset(tmp_path / "data", num_cases=1) / "images" / "case_00.nii.gz"
    (tmp_path / "a").mkdir()
    for number in numbers:
        shutil.copy(source, tmp_path / "a" / f"p_{number:04d}.nii.gz")
    (case,) = find_inputs([tmp_path / "a"], ["x", "y"], optional)
    with pytest.raises(DataError, match=r"expected 2 \(x, y\).* numbered from 0000 without a gap"):
        read_channels(case.images, ["x", "y"])


def brats(folder: Path) -> Path:
    """A BraTS case, whose channels come as T1, T1c, T2, FLAIR."""
    name = "BraTS2021_00001"
    source = make_dataset(folder / "source", num_cases=1) / "images" / "case_00.nii.gz"
    (folder / "brats" / name).mkdir(parents=True)
    for ending in ("t1", "t1ce", "t2", "flair"):
        shutil.copy(source, folder / "brats" / name / f"{name}_{ending}.nii.gz")
    return folder / "brats"


@pytest.mark.parametrize("channels", [FOUR, tuple(map(str.lower, FOUR))])
def test_channels_of_a_dataset_are_brought_into_the_model_s_order(
    tmp_path: Path, channels: tuple[str, ...]
) -> None:
    (case,) = find_inputs([brats(tmp_path)], channels)
    endings = [path.name.split("_")[-1] for path in case.images if path]
    assert endings == ["flair.nii.gz", "t1.nii.gz", "t1ce.nii.gz", "t2.nii.gz"]


def test_channels_that_nobody_named_keep_the_dataset_s_order(tmp_path: Path) -> None:
    (case,) = find([brats(tmp_path)], 4)
    endings = [path.name.split("_")[-1] for path in case.images if path]
    assert endings == ["t1.nii.gz", "t1ce.nii.gz", "t2.nii.gz", "flair.nii.gz"]


@pytest.mark.parametrize(
    "channels", [("FLAIR", "T1w", "t1gd", "T2w"), ("T1", "T2"), ("T1", "T1", "T2", "FLAIR")]
)
def test_other_channels_than_the_model_s_are_refused(
    tmp_path: Path, channels: tuple[str, ...]
) -> None:
    expected = rf"channels T1, T1c, T2, FLAIR; expected {', '.join(channels)}, those of the model"
    with pytest.raises(DataError, match=expected):
        find_inputs([brats(tmp_path)], channels)


def test_channels_in_one_file_are_not_brought_into_another_order(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data", "msd", num_cases=1, num_channels=2)
    (case,) = find_inputs([folder], ["MR0", "MR1"])
    assert len(case.images) == 1
    with pytest.raises(DataError, match="has the channels MR0, MR1; expected MR1, MR0"):
        find_inputs([folder], ["MR1", "MR0"])


def test_the_only_channel_under_another_name_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_dataset(tmp_path / "data", "msd", num_cases=1)
    assert len(find_inputs([folder], ["CT"])) == 1
    assert "has the channel MR0; the model was trained on CT" in caplog.text


@pytest.mark.parametrize("name", ["list.csv", "dataset.json"])
def test_a_list_names_the_cases(tmp_path: Path, name: str) -> None:
    folder = make_dataset(tmp_path / "data", "msd", num_cases=2)
    rows = (
        "image,label",
        *(f"imagesTr/case_0{n}.nii.gz,labelsTr/case_0{n}.nii.gz" for n in (0, 1)),
    )
    (folder / "list.csv").write_text("\n".join(rows))
    cases = find_inputs([folder / name], ["MR0"])
    assert [case.case_id for case in cases] == ["case_00", "case_01"]
    assert {case.label for case in cases} == {None}


def test_a_bad_file_of_a_model_with_optional_channels_is_left_to_its_case(tmp_path: Path) -> None:
    (bad,) = touch(tmp_path / "a", "p_0000.nii.gz")
    (case,) = find_inputs([bad], ["x", "y"], (1,))
    assert (case.case_id, case.images) == ("p", (bad,))


def test_folders_and_files_that_may_not_be_read_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path / "a", "p.nii.gz", "notes")
    locked = tmp_path / "a" / "lost+found"
    touch(locked, "slice.dcm")
    forbidden = {locked, tmp_path / "a" / "notes", tmp_path / "b"}
    real = os.access
    # A superuser, as in a container, may read everything.
    monkeypatch.setattr(os, "access", lambda path, mode: path not in forbidden and real(path, mode))
    assert ids([tmp_path / "a"], 1) == {"p": 1}
    assert f"{locked} may not be read; what is in it is left out" in caplog.text
    touch(tmp_path / "b", "q.nii.gz")
    with pytest.raises(ConfigError, match="may not be read"):
        find([tmp_path / "b"], 1)


def test_slices_that_may_not_be_read_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path / "a", "p.nii.gz")
    (locked,) = touch(tmp_path / "a" / "series", "1.dcm")
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked and real(path, mode))
    assert ids([tmp_path / "a"], 1) == {"p": 1}
    assert f"{locked} may not be read" in caplog.text
