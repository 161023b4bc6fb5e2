"""What is measured of a dataset, against values computed by nibabel and numpy alone."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from makers import make_dataset

from volseg.data.layouts import find_dataset
from volseg.errors import DataError
from volseg.planning import Fingerprint, compute_fingerprint


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
