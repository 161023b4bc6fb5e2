from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from volseg.demo import simulate
from volseg.demo.simulate import simulate_dataset
from volseg.errors import ConfigError
from volseg.images import read_image, read_labels


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("nilearn")
    return simulate_dataset(tmp_path_factory.mktemp("demo") / "brains", num_train=3, num_test=1)


def test_dataset_json_lists_the_training_pairs_and_hides_the_test_labels(dataset):
    described = json.loads((dataset / "dataset.json").read_text())
    assert described["labels"] == {
        "0": "background",
        "1": "CSF",
        "2": "grey matter",
        "3": "white matter",
    }
    assert described["training"][2] == {
        "image": "./imagesTr/brain_003.nii.gz",
        "label": "./labelsTr/brain_003.nii.gz",
    }
    assert described["test"] == ["./imagesTs/brain_004.nii.gz"]
    assert (dataset / "labelsTs" / "brain_004.nii.gz").is_file()


def test_readme_says_simulated_and_carries_the_notice(dataset):
    text = (dataset / "README.md").read_text()
    assert "**simulated**" in text
    assert "Copyright (C) 1993-2009 Louis Collins" in text


def test_image_and_labels_share_a_grid_of_moderate_size(dataset):
    image = read_image(dataset / "imagesTr" / "brain_001.nii.gz")
    labels = read_labels(dataset / "labelsTr" / "brain_001.nii.gz")
    assert labels.geometry.is_same_grid(image.geometry)
    assert all(50 <= size <= 115 for size in image.geometry.shape)
    assert all(1.79 <= size <= 3.01 for size in image.geometry.spacing_mm)


def test_subjects_differ_in_voxel_size_and_axis_order(dataset):
    grids = [read_labels(path).geometry for path in sorted((dataset / "labelsTr").iterdir())]
    assert len({grid.orientation for grid in grids}) > 1
    assert len({grid.spacing_mm for grid in grids}) == 3


def test_tissue_volumes_are_those_of_a_brain(dataset):
    """An adult has about 0.9 to 1.5 l of brain tissue and CSF, with more grey matter than white."""
    labels = read_labels(dataset / "labelsTr" / "brain_002.nii.gz")
    voxel_ml = np.prod(labels.geometry.spacing_mm) / 1000
    csf, grey, white = np.bincount(labels.array.ravel(), minlength=4)[1:] * voxel_ml
    assert 50 < csf < white < grey
    assert 1300 < csf + grey + white < 2500


def test_tissues_are_ordered_as_in_a_t1_weighted_image(dataset):
    image = read_image(dataset / "imagesTr" / "brain_001.nii.gz").array
    labels = read_labels(dataset / "labelsTr" / "brain_001.nii.gz").array
    background, csf, grey, white = (image[labels == value].mean() for value in range(4))
    assert background == 0 < csf < 0.75 * grey < grey < 0.9 * white


def test_no_subject_is_cut_by_its_field_of_view(dataset):
    for path in sorted((dataset / "labelsTr").iterdir()):
        labels = read_labels(path).array[0]
        inner = labels[1:-1, 1:-1, 1:-1]
        assert np.count_nonzero(inner) == np.count_nonzero(labels)


def test_a_subject_depends_on_the_seed_and_its_number_alone(dataset, tmp_path):
    again = simulate_dataset(tmp_path / "again", num_train=1, num_test=1)
    other = simulate_dataset(tmp_path / "other", num_train=1, num_test=0, seed=1)
    first, same, different = (
        read_image(folder / "imagesTr" / "brain_001.nii.gz") for folder in (dataset, again, other)
    )
    assert np.array_equal(first.array, same.array)
    assert np.array_equal(first.geometry.affine, same.geometry.affine)
    assert not first.geometry.is_same_grid(different.geometry)


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty; expected a new folder"):
        simulate_dataset(tmp_path)


def test_no_training_subject_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="0 training and 4 test subjects"):
        simulate_dataset(tmp_path / "brains", num_train=0)


def test_without_nilearn_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(simulate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "volseg\[demo\]"'):
        simulate_dataset(tmp_path / "brains")
