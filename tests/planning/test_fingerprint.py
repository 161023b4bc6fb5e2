"""What is measured of a dataset, against values computed by nibabel and numpy alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from makers import make_dataset

from volseg.data.layouts import find_dataset
from volseg.errors import DataError
from volseg.planning import Fingerprint, compute_fingerprint
from volseg.planning.fingerprint import CaseFingerprint, measure_radii, measuring_bytes
from volseg.planning.machine import count_holders


def test_fingerprint_of_generated_cases(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", "msd", num_cases=2, spacing_mm=(1, 1.5, 3), values=(1, 2))
    fingerprint = compute_fingerprint(find_dataset(folder))
    labels = [nib.load(p).get_fdata() for p in sorted((folder / "labelsTr").iterdir())]
    images = [nib.load(p).get_fdata() for p in sorted((folder / "imagesTr").iterdir())]
    voxels = np.concatenate([i[lab > 0] for i, lab in zip(images, labels, strict=True)])
    channel = fingerprint.channels[0]
    assert fingerprint.median_spacing_mm == pytest.approx((1, 1.5, 3))
    assert [case.class_voxels for case in fingerprint.cases] == [
        tuple(int((lab == v).sum()) for v in (0, 1, 2)) for lab in labels
    ]
    assert channel.mean == pytest.approx(voxels.mean(), rel=1e-5)
    assert channel.std == pytest.approx(voxels.std(), rel=1e-5)
    assert channel.percentile_99_5 == pytest.approx(np.percentile(voxels, 99.5), rel=1e-5)


def test_shape_is_canonical_and_cropped_to_content(tmp_path: Path) -> None:
    image = np.zeros((10, 12, 14), np.float32)
    image[2:5, 3:12, 1:9] = 7
    # File axes: inferior, right, anterior; content 3 x 9 x 8 becomes R 9, A 8, S 3.
    affine = np.array([[0, 2, 0, 0], [0, 0, 3, 0], [-1, 0, 0, 0], [0, 0, 0, 1.0]])
    for part, array in (("images", image), ("labels", (image > 0).astype(np.uint8))):
        (tmp_path / part).mkdir()
        nib.save(nib.Nifti1Image(array, affine), tmp_path / part / "a.nii.gz")
    case = compute_fingerprint(find_dataset(tmp_path)).cases[0]
    assert case.full_shape == (12, 14, 10)
    assert case.shape == (9, 8, 3)
    assert case.spacing_mm == (2, 3, 1)


def test_bad_case_is_named_and_counted(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", "msd", num_cases=3)
    for name in ("case_00", "case_02"):
        file = folder / "imagesTr" / f"{name}.nii.gz"
        file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"case_00\.nii\.gz.*\(1 more bad case.*volseg check"):
        compute_fingerprint(find_dataset(folder))


def test_hippocampus_fingerprint(shared_data: Path, tmp_path: Path) -> None:
    fingerprint = compute_fingerprint(find_dataset(shared_data / "hippocampus"))
    assert len(fingerprint.cases) == 200
    assert fingerprint.median_spacing_mm == (1, 1, 1)
    assert np.median([case.shape for case in fingerprint.cases], axis=0) == pytest.approx(
        (35, 50, 36), abs=1
    )
    fingerprint.write_json(tmp_path / "f.json")
    assert Fingerprint.read_json(tmp_path / "f.json") == fingerprint


def test_radius_of_a_box_by_hand() -> None:
    label = np.zeros((10, 12, 9), np.uint8)
    label[2:6, 3:8, 1:4] = 2  # 4 x 5 x 3 voxels of 1 x 2 x 3 mm: 4 x 10 x 9 mm
    surface = 2 * (4 * 10 + 4 * 9 + 10 * 9)
    expected = 3 * 1.5 * (4 * 10 * 9) / surface
    assert measure_radii(label, (1, 2, 3), 3) == (0, 0, pytest.approx(expected, abs=1e-3))


def test_radius_of_a_disc_and_of_a_ball() -> None:
    x, y, z = np.meshgrid(*(np.arange(-n, n + 1) for n in (20, 15, 12)), indexing="ij")
    ball = (x**2 + (1.5 * y) ** 2 + (2 * z) ** 2 < 15**2).astype(np.uint8)
    assert measure_radii(ball, (1, 1.5, 2), 2)[1] == pytest.approx(15, rel=0.03)
    assert measure_radii(ball[:, :, 12], (1, 1.5), 2)[1] == pytest.approx(15, rel=0.03)


def test_many_small_parts_count_more_than_a_large_one() -> None:
    label = np.zeros((40, 40), np.uint8)
    label[2:22, 2:22] = 1
    large = measure_radii(label, (1, 1), 2)[1]
    assert large == pytest.approx(2 * 4 / np.pi * 400 / 80, rel=1e-3)
    label[26:28, 2:4] = label[26:28, 8:10] = 1
    assert measure_radii(label, (1, 1), 2)[1] == pytest.approx(2 * 4 / np.pi * 4 / 8, rel=1e-3)
    # Specks of less than two voxels per axis have no shape.
    label[26:, :] = 0
    label[30, ::4] = 1
    assert measure_radii(label, (1, 1), 2)[1] == large
    # Metres instead of millimetres: a radius stays above zero.
    assert measure_radii(label, (1e-6, 1e-6), 2)[1] == pytest.approx(large * 1e-6)


def test_voxels_of_unknown_class_have_no_radius() -> None:
    label = np.array([[0, 1, 3], [0, 1, 3], [0, 0, 3]], np.uint8)
    # Two voxels with 5 inner faces; dims * 4 / pi * volume / surface. No other part has a shape.
    assert measure_radii(label, (1, 1), 2)[1] == pytest.approx(2 * 4 / np.pi * 2 / 5, abs=1e-3)


def test_radius_of_the_thinnest_class_counts() -> None:
    rows = [(0, 9.0, 4.0), (0, 9.0, 0.0), (0, 9.0, 6.0)]
    cases = [
        CaseFingerprint(
            case_id=str(i),
            full_shape=(9, 9),
            shape=(9, 9),
            spacing_mm=(1, 1),
            class_voxels=(1, 1, 1),
            class_radius_mm=row,
        )
        for i, row in enumerate(rows)
    ]
    fingerprint = Fingerprint(dataset="d", spatial_dims=2, cases=cases, channels=())
    # A tenth of the way from 4 to 6, the two cases that have the class.
    assert fingerprint.radius_mm == pytest.approx(4.2)


def test_large_cases_are_measured_by_fewer_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 20 x 18 x 14 voxels of two channels: 24 bytes per voxel, and 12 for each channel.
    folder = make_dataset(tmp_path / "d", "nnunet", shape=(20, 18, 14), num_channels=2)
    dataset = find_dataset(folder)
    needed = 20 * 18 * 14 * (24 + 2 * 12)
    assert measuring_bytes(2, dataset.cases[0]) == needed
    row = compute_fingerprint(dataset).cases[0]
    assert measuring_bytes(2, dataset.cases[0].model_copy(update={"images": ()}), row) == needed
    monkeypatch.setattr("volseg.planning.machine.memory_gb", lambda: 5 * needed / 1e9)
    assert count_holders(needed) == 2  # In half of the memory.
    assert count_holders(5 * needed) == 1
    asked: list[float] = []
    monkeypatch.setattr("volseg.planning.fingerprint.count_readers", lambda: 9)
    monkeypatch.setattr(
        "volseg.planning.fingerprint.ThreadPoolExecutor",
        lambda threads: asked.append(threads) or ThreadPoolExecutor(threads),
    )
    compute_fingerprint(dataset)
    assert asked == [9, 2]  # Headers by all, volumes by two.
