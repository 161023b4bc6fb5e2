"""Many cases: finished ones are kept, bad ones reported, the others go on."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import threading
import weakref
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_files import write_series
from makers import write_nifti

import volseg
from volseg.atomic import explain_full_disk
from volseg.data.cases import Case
from volseg.errors import ConfigError, DataError, FullDiskError, MachineError
from volseg.images import image_stem, itk
from volseg.inference import Options, batch
from volseg.inference.batch import BatchResult, Outputs, digest_sources, predict_cases
from volseg.inference.inputs import find_inputs, select_shard


@pytest.fixture(scope="module")
def predictor(run: Path) -> volseg.Predictor:
    return volseg.Predictor.load(run, device="cpu")


@pytest.fixture
def images(balls: Path, tmp_path: Path) -> Path:
    """Three images of a folder of their own."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, path in enumerate(sorted((balls / "imagesTr").iterdir())[:3]):
        shutil.copy(path, folder / f"p{number}.nii.gz")
    return folder


def predict(
    predictor: volseg.Predictor, images: Path, output: Path, on_case=None, **what
) -> BatchResult:
    outputs = Outputs(output, **what)
    return predict_cases(predictor, find_inputs([images], ["MR0"]), outputs, on_case)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_case_gets_a_label_map_and_a_record(
    predictor: volseg.Predictor, images: Path, tmp_path: Path
) -> None:
    result = predict(predictor, images, tmp_path / "out", uncertainty=True, probabilities=True)
    assert list(result.written) == ["p0", "p1", "p2"]
    assert result.exit_code == 0
    files = ("", "_entropy", "_probabilities")
    expected = [f"p{n}{what}.nii.gz" for n in range(3) for what in files]
    assert names(tmp_path / "out") == sorted([*expected, "p0.json", "p1.json", "p2.json"])
    record = json.loads((tmp_path / "out" / "p0.json").read_text())
    labels = nib.load(tmp_path / "out" / "p0.nii.gz")
    voxel_ml = abs(np.linalg.det(labels.affine[:3, :3])) / 1000
    values = dict(zip(predictor.model.facts.classes.names, (0, 3, 7), strict=True))
    for name, volume in record["volumes_ml"].items():
        count = int((np.asarray(labels.dataobj) == values[name]).sum())
        assert volume == pytest.approx(count * voxel_ml)
    assert record["images"] == [str(images / "p0.nii.gz")]
    entropy = nib.load(tmp_path / "out" / "p0_entropy.nii.gz").get_fdata()
    assert entropy.shape == labels.shape
    assert 0 <= entropy.min() < entropy.max() <= 1


def test_image_that_a_dataset_lists_and_has_not_fails_alone(
    predictor: volseg.Predictor, balls: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(balls, folder)
    (first, *others) = sorted((folder / "imagesTr").iterdir())
    predict(predictor, first, tmp_path / "again")
    before = (tmp_path / "again" / first.name).read_bytes()
    first.unlink()
    for output in (tmp_path / "out", tmp_path / "again"):
        result = predict(predictor, folder, output)
        assert {case: str(error) for case, error in result.failed.items()} == {
            image_stem(first): f"{first} does not exist. Look at the file and its folder."
        }
        assert len(result.written) == len(others) > 0
        assert result.exit_code == 3
    assert (tmp_path / "again" / first.name).read_bytes() == before


def test_what_is_finished_is_kept(
    predictor: volseg.Predictor, images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    predict(predictor, images, output)
    # What a killed call leaves: a record without its label map.
    (output / "p1.nii.gz").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    seen = []
    result = predict(predictor, images, output, on_case=lambda done, total: seen.append(done))
    assert (list(result.written), list(result.kept)) == (["p1"], ["p0", "p2"])
    assert seen == [3]
    assert (output / "p0.nii.gz").stat().st_mtime_ns == before["p0.nii.gz"]
    # With maps that are not there, or a newer image, it is not finished.
    result = predict(predictor, images, output, overwrite=True, uncertainty=True)
    assert len(result.written) == 3
    future = (output / "p2.nii.gz").stat().st_mtime + 10
    os.utime(images / "p2.nii.gz", (future, future))
    with pytest.raises(ConfigError, match=r"p2\.nii\.gz exists and was made from other images"):
        predict(predictor, images, output)


def test_what_another_process_finishes_meanwhile_is_no_conflict(
    predictor: volseg.Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(predictor, images, tmp_path / "theirs")
    is_done = batch.Job.is_done

    def look(self: batch.Job, *arguments: object) -> bool:
        # At the moment between both looks at the files of the second case.
        if self.case.case_id == "p1" and not (tmp_path / "out").exists():
            shutil.copytree(tmp_path / "theirs", tmp_path / "out")
        return is_done(self, *arguments)

    monkeypatch.setattr(batch.Job, "is_done", look)
    result = predict(predictor, images, tmp_path / "out")
    assert (list(result.written), list(result.kept)) == (["p0"], ["p1", "p2"])


def test_results_of_other_weights_or_options_are_not_kept(
    predictor: volseg.Predictor, run: Path, images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    predict(predictor, images, output)
    for other in (
        volseg.Predictor.load(run, device="cpu", options=Options(mirror=True)),
        volseg.Predictor.load(run, device="cpu", checkpoint="best"),
        volseg.Predictor.load(run, device="cpu", options=Options(largest=("all",))),
    ):
        with pytest.raises(ConfigError, match="other images, weights or options; nothing was"):
            predict(other, images, output)
    (output / "p0.json").unlink()
    with pytest.raises(ConfigError, match=r"p0\.nii\.gz exists"):
        predict(predictor, images, output)


def test_an_image_of_the_same_name_is_another(
    predictor: volseg.Predictor, images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    predict(predictor, images, output)
    other = shutil.copytree(images, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"p0\.nii\.gz exists and was made from other images"):
        predict(predictor, other, output)
    # Changed in place, with the time of before.
    stat = (images / "p1.nii.gz").stat()
    shutil.copy(images / "p0.nii.gz", images / "p1.nii.gz")
    os.utime(images / "p1.nii.gz", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ConfigError, match=r"p1\.nii\.gz exists and was made from other images"):
        predict(predictor, images, output)


@pytest.mark.parametrize(
    ("header", "voxels"),
    [
        ("p.hdr", "p.img"),
        ("p.img", "p.hdr"),
        ("p.mhd", "p.raw"),
        ("p.mhd", "p.zraw"),
        ("p.nhdr", "p.raw.gz"),
    ],
)
def test_other_voxels_under_the_same_header_are_another_image(
    tmp_path: Path, header: str, voxels: str
) -> None:
    for name in (header, voxels, "p.txt"):
        (tmp_path / name).write_text("first")
    case = Case(case_id="p", images=(tmp_path / header,), patient_id="p")
    before = digest_sources(case)
    (tmp_path / "p.txt").write_text("what is no voxel")
    assert digest_sources(case) == before
    (tmp_path / voxels).write_text("second one")
    assert digest_sources(case) != before


def test_names_that_are_no_utf_8(predictor: volseg.Predictor, images: Path, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/Sch\xe4del"))
    shutil.copytree(images, folder)
    (folder / "p2.nii.gz").rename(Path(os.fsdecode(os.fsencode(folder) + b"/p\xfc.nii.gz")))
    result = predict(predictor, folder, tmp_path / "out")
    assert (len(result.written), result.exit_code) == (3, 0)
    record = json.loads((tmp_path / "out" / "p0.json").read_text())
    assert record["images"] == [str(tmp_path / "Sch\\xe4del" / "p0.nii.gz")]
    assert len(predict(predictor, folder, tmp_path / "out").kept) == 3
    # As a kill leaves it: a record without label map.
    for path in result.written.values():
        path.unlink()
    assert len(predict(predictor, folder, tmp_path / "out").written) == 3


def test_a_record_speaks_of_the_files_that_it_names_alone(
    predictor: volseg.Predictor, run: Path, images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    mirrored = volseg.Predictor.load(run, device="cpu", options=Options(mirror=True))
    predict(predictor, images, output, probabilities=True)
    # The record of another format's label map is none of this one's.
    predict(mirrored, images, output, suffix=".nrrd")
    with pytest.raises(ConfigError, match=r"p0\.nii\.gz exists and was made"):
        predict(mirrored, images, output)
    # Nor are probabilities of before those of now.
    predict(mirrored, images, output, overwrite=True)
    with pytest.raises(ConfigError, match=r"p0\.nii\.gz exists and was made"):
        predict(mirrored, images, output, probabilities=True)


def test_files_that_are_no_results_are_not_replaced(
    predictor: volseg.Predictor, images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    # As BIDS has it beside every image, and another program's map.
    for name, content in (("p0.json", '{"EchoTime": 0.03}'), ("p1_probabilities.nii.gz", "x")):
        (output / name).write_text(content)
        with pytest.raises(ConfigError, match=rf"{name} exists and is no result of volseg"):
            predict(predictor, images, output, probabilities=True)
        assert names(output) == [name]
        assert (output / name).read_text() == content
        (output / name).unlink()
    # What a kill leaves of a case is made anew.
    predict(predictor, images, output, probabilities=True)
    (output / "p2.nii.gz").unlink()
    (output / "p1.nii.gz").unlink()
    (output / "p1_probabilities.nii.gz").unlink()
    again = predict(predictor, images, output, probabilities=True)
    assert (list(again.kept), list(again.written)) == (["p0"], ["p1", "p2"])
    (output / "p0.json").write_text("{}")
    (output / "p0.nii.gz").unlink()
    predict(predictor, images, output, probabilities=True, overwrite=True)
    assert json.loads((output / "p0.json").read_text())["files"]


def test_a_kill_while_a_result_is_replaced_leaves_none(
    predictor: volseg.Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    predict(predictor, images, output)

    def kill(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(batch.Segmentation, "save", kill)
    with pytest.raises(KeyboardInterrupt):
        predict(predictor, images, output, overwrite=True)
    monkeypatch.undo()
    assert not (output / "p0.nii.gz").exists()
    result = predict(predictor, images, output)
    assert list(result.written) == ["p0"]
    assert list(result.kept) == ["p1", "p2"]


def test_a_bad_case_is_reported_and_the_others_go_on(
    predictor: volseg.Predictor, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = images / "p1.nii.gz"
    path.write_bytes(path.read_bytes()[:-50])
    result = predict(predictor, images, tmp_path / "out")
    assert list(result.written) == ["p0", "p2"]
    assert "truncated" in str(result.failed["p1"])
    assert result.exit_code == 3
    assert names(tmp_path / "out") == ["p0.json", "p0.nii.gz", "p2.json", "p2.nii.gz"]
    assert "p1: " in caplog.text


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(ZeroDivisionError("x"), 1), (MachineError("too large"), 4), (DataError("bad"), 3)],
)
@pytest.mark.parametrize("stage", ["read", "segment"])
def test_a_stage_that_dies_takes_one_case_along(
    stage: str, error, exit_code, predictor, images: Path, tmp_path: Path, monkeypatch
) -> None:
    plain, calls = getattr(volseg.Predictor, stage), []

    def fail(self, *arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        return plain(self, *arguments, **options)

    monkeypatch.setattr(volseg.Predictor, stage, fail)
    result = predict(predictor, images, tmp_path / "out")
    assert list(result.written) == ["p0", "p2"]
    assert result.failed == {"p1": error}
    assert result.exit_code == exit_code


@pytest.mark.parametrize(
    ("error", "message", "exit_code"),
    [
        (MemoryError(), "memory was short. Set --memory lower", 4),
        (RuntimeError("CUDA out of memory. Tried"), "GPU's memory was short. Use --device cpu", 4),
        (RuntimeError("can't allocate memory: you"), "memory was short. Set --memory lower", 4),
        (MachineError("ITK failed"), "ITK failed", 4),
        (PermissionError(13, "Permission denied", "a"), "Permission denied: 'a'. Look at", 3),
        (ValueError("x"), "x", 1),
    ],
)
def test_what_goes_wrong_while_writing_is_the_cases_own(
    error, message: str, exit_code: int, predictor, images: Path, tmp_path: Path, monkeypatch
) -> None:
    save, kept = batch.Segmentation.save, []

    def fail(self, path):
        if path.name == "p1.nii.gz":
            kept.append(weakref.ref(self.labels))
            raise error
        save(self, path)

    monkeypatch.setattr(batch.Segmentation, "save", fail)
    result = predict(predictor, images, tmp_path / "out", uncertainty=True)
    assert list(result.written) == ["p0", "p2"]
    assert message in str(result.failed["p1"])
    assert result.exit_code == exit_code
    # Nothing of it is left, neither record nor map.
    expected = [f"p{n}{what}" for n in (0, 2) for what in (".json", ".nii.gz", "_entropy.nii.gz")]
    assert names(tmp_path / "out") == expected
    # Its arrays are gone, though the error is kept.
    monkeypatch.undo()
    gc.collect()
    assert kept[0]() is None


def test_a_full_disk_ends_the_call(
    predictor: volseg.Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        with explain_full_disk(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(batch.Segmentation, "save", fail)
    with pytest.raises(FullDiskError, match="no space left"):
        predict(predictor, images, tmp_path / "out", probabilities=True)
    assert names(tmp_path / "out") == []


def test_itk_and_a_full_disk(
    predictor: volseg.Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ITK says the same of a full disk as of anything else."""
    sync, called = os.fsync, []

    def fail(image: object, path: str, **options: object) -> None:
        called.append(path)
        Path(path).write_bytes(b"a part")
        raise RuntimeError("ITK ERROR: cannot write")

    monkeypatch.setattr(itk.sitk, "WriteImage", fail)
    result = predict(predictor, images, tmp_path / "out", suffix=".nrrd")
    assert [type(error) for error in result.failed.values()] == 3 * [MachineError]
    called.clear()

    def no_room(descriptor: int) -> None:
        if called:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(FullDiskError, match=r"no space left while writing .*nrrd"):
        predict(predictor, images, tmp_path / "out", suffix=".nrrd")
    assert names(tmp_path / "out") == []


def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(
    predictor: volseg.Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volseg.Predictor, "read", None)
    file = tmp_path / "file"
    file.touch()
    for output in (file, file / "a" / "b"):
        with pytest.raises(ConfigError, match=rf"{file} is no folder; expected .* Change -o"):
            predict(predictor, images, output)
    # The tests may be run by one who may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ConfigError, match=rf"{tmp_path} cannot be written to; .* Change -o"):
        predict(predictor, images, tmp_path / "a" / "b")


def test_the_next_case_is_read_while_one_is_segmented(
    predictor: volseg.Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_read = [threading.Event() for _ in range(3)]
    read, segment = volseg.Predictor.read, volseg.Predictor.segment
    order: list[str] = []

    def mark_read(self, files):
        prepared = read(self, files)
        is_read[int(Path(files[0]).name[1])].set()
        return prepared

    def wait_for_next(self, prepared, **options):
        number = len(order)
        order.append("segmented")
        assert number == 2 or is_read[number + 1].wait(60)
        return segment(self, prepared, **options)

    monkeypatch.setattr(volseg.Predictor, "read", mark_read)
    monkeypatch.setattr(volseg.Predictor, "segment", wait_for_next)
    assert len(predict(predictor, images, tmp_path / "out").written) == 3


def test_inputs_are_never_replaced(
    predictor: volseg.Predictor, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is an input image"):
        predict(predictor, images, images, overwrite=True)
    series = write_series(tmp_path / "I0000", np.zeros((8, 8, 8), np.int16), np.eye(4))
    slices = {path.name: path.read_bytes() for path in series.iterdir()}
    with pytest.raises(ConfigError, match="lies among the slices of one"):
        predict(predictor, series, series, overwrite=True, suffix=".dcm")
    assert {path.name: path.read_bytes() for path in series.iterdir()} == slices


def test_no_two_cases_write_the_same_file(
    predictor: volseg.Predictor, images: Path, tmp_path: Path
) -> None:
    (images / "p1.nii.gz").rename(images / "p0_probabilities.nii.gz")
    assert len(predict(predictor, images, tmp_path / "a").written) == 3
    with pytest.raises(ConfigError, match="would be written for p0_probabilities and for p0"):
        predict(predictor, images, tmp_path / "b", probabilities=True)
    (images / "p2.nii.gz").rename(images / "folds.nii.gz")
    with pytest.raises(ConfigError, match=r"folds\.json would be written for folds and for the fo"):
        predict(predictor, images, tmp_path / "c")


def test_dicom_segmentations_of_a_batch(
    run: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    predictor, nothing = (
        volseg.Predictor.load(run, device="cpu", options=Options(least_ml=least))
        for least in ({}, {"all": 1e6})
    )
    shape = (24, 22, 20)
    write_series(images / "ct" / "a", np.zeros(shape, np.int16), np.eye(4))
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 900, shape).astype(np.int16)
    write_series(images / "ct" / "b", stored, np.eye(4))
    output = tmp_path / "out"
    result = predict(predictor, images, output, suffix=".dcm", probabilities=True)
    assert list(result.written) == ["ct_a", "ct_b"]
    assert "no DICOM series, to which" in str(result.failed["p0"])
    files = (".dcm", ".json", "_probabilities.nii.gz")
    assert names(output) == [f"ct_{case}{what}" for case in "ab" for what in files]
    again = predict(predictor, images, output, suffix=".dcm", probabilities=True)
    assert list(again.kept) == ["ct_a", "ct_b"]
    # Nothing is a result, too.
    for _ in range(2):
        empty = predict(nothing, images / "ct", tmp_path / "empty", suffix=".dcm")
        assert not empty.failed
    assert list(empty.kept) == ["a", "b"]
    found = pydicom.dcmread(tmp_path / "empty" / "a.dcm")
    assert [part.SegmentLabel for part in found.SegmentSequence] == ["organ_3", "organ_7"]
    assert not found.pixel_array.any()
    predict(predictor, images / "ct" / "b", output, suffix=".seg.nrrd", probabilities=True)
    assert names(output)[:3] == ["b.json", "b.seg.nrrd", "b_probabilities.nrrd"]
    with pytest.raises(ConfigError, match=r"cannot write labels\.jpg"):
        predict(predictor, images, tmp_path / "none", suffix=".jpg")
    with pytest.raises(ConfigError, match=r"cannot write volumes as \.png; expected \.nii\.gz"):
        predict(predictor, images, tmp_path / "none", suffix=".png")
    assert not (tmp_path / "none").exists()


def test_shards_share_the_cases_by_size(tmp_path: Path) -> None:
    cases = []
    for number, size in enumerate([3, 1, 4, 2, 6, 5]):
        path = write_nifti(tmp_path / f"p{number}.nii", np.zeros((size, 8, 8), np.float32))
        cases.append(Case(case_id=f"p{number}", images=(path,), patient_id="p"))
    shards = [[case.case_id for case in select_shard(cases, f"{n}/4")] for n in range(1, 5)]
    # Sizes 6 and 2, 5 and 1, 4, 3.
    assert shards == [["p4", "p3"], ["p5", "p1"], ["p2"], ["p0"]]
    assert select_shard(cases, None) is cases
    for wrong in ("0/4", "5/4", "1", "a/b", "1/0"):
        with pytest.raises(ConfigError, match="expected a number and how many"):
            select_shard(cases, wrong)


def test_exit_codes_name_the_worst() -> None:
    data, machine, bug = DataError("a"), MachineError("b"), ValueError("c")
    assert BatchResult(failed={"a": data}).exit_code == 3
    assert BatchResult(failed={"a": data, "b": machine}).exit_code == 4
    assert BatchResult(failed={"a": bug, "b": machine}).exit_code == 1


def test_a_structure_set_that_comes_later_makes_no_other_image(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", np.zeros((5, 4, 3), np.int16), np.eye(4))
    case = Case(case_id="s", images=(folder,), patient_id="s")
    before = batch.digest_sources(case)
    structures = b"\x02\x00\x02\x00UI\x1e\x001.2.840.10008.5.1.4.1.1.481.3\x00"
    (folder / "RS.dcm").write_bytes(bytes(128) + b"DICM" + structures)
    assert batch.digest_sources(case) == before
    shutil.copy(folder / "I0000.dcm", folder / "I0009.dcm")
    assert batch.digest_sources(case) != before
