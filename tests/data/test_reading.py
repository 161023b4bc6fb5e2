"""Files of one case lie on one grid, or are refused before anything is learned or predicted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from makers import make_dataset, write_nifti

import volseg
from volseg.data.reading import read_channels
from volseg.errors import DataError


def test_channels_on_two_grids_are_refused(tmp_path: Path) -> None:
    array = np.zeros((6, 5, 4), np.float32)
    write_nifti(tmp_path / "t1.nii.gz", array, np.eye(4))
    write_nifti(tmp_path / "t2.nii.gz", array, np.diag([1, 1, 2.0, 1]))
    write_nifti(tmp_path / "flair.nii.gz", array[:-1], np.eye(4))
    with pytest.raises(DataError, match=r"t2\.nii\.gz: its grid lies up to 3 mm away to .*t1"):
        read_channels([tmp_path / "t1.nii.gz", tmp_path / "t2.nii.gz"], ["t1", "t2"])
    with pytest.raises(DataError, match=r"flair\.nii\.gz: shape \(5, 5, 4\) differs .* Resample"):
        read_channels([tmp_path / "t1.nii.gz", tmp_path / "flair.nii.gz"], ["t1", "flair"])


def test_a_label_on_another_grid_ends_a_training_with_its_name(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", "msd", num_cases=5)
    label = folder / "labelsTr" / "case_02.nii.gz"
    write_nifti(label, np.zeros((2, 2, 2), np.uint8), np.eye(4))
    with pytest.raises(DataError, match=r"case_02\.nii\.gz: .*Resample the label onto the image"):
        volseg.train(folder, tmp_path / "run", epochs=1)
