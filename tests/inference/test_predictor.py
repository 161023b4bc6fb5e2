"""Predictions lie on the source's grid whatever the input, and the model folder is only data."""

from __future__ import annotations

import itertools
import shutil
from contextlib import nullcontext
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

import volseg
from volseg.data.cases import Classes
from volseg.data.mirroring import plan_mirroring
from volseg.errors import ConfigError, DataError, MachineError
from volseg.inference import windows
from volseg.inference.inputs import find_inputs
from volseg.inference.windows import list_mirrorings, predict_scores


@pytest.fixture(scope="module")
def predictor(run: Path) -> volseg.Predictor:
    return volseg.Predictor.load(run, device="cpu")


@pytest.fixture(scope="module")
def image(balls: Path) -> Path:
    return sorted((balls / "imagesTr").iterdir())[0]


def test_saved_labels_have_the_sources_grid_bit_for_bit(
    predictor: volseg.Predictor, image: Path, tmp_path: Path
) -> None:
    predictor(image).save(tmp_path / "a.nii.gz")
    source, saved = nib.load(image), nib.load(tmp_path / "a.nii.gz")
    assert saved.shape == source.shape
    assert saved.affine.tobytes() == source.affine.tobytes()
    assert saved.get_data_dtype() == np.uint8
    assert set(np.unique(np.asarray(saved.dataobj))) <= {0, 3, 7}


def test_path_nibabel_and_array_give_the_same(predictor: volseg.Predictor, image: Path) -> None:
    loaded = nib.load(image)
    expected = predictor(image).labels
    assert expected.any()
    for form in (str(image), [image], loaded, (loaded.get_fdata(), loaded.affine)):
        assert np.array_equal(predictor(form).labels, expected)


def test_prediction_does_not_depend_on_the_files_axis_order(
    predictor: volseg.Predictor, image: Path
) -> None:
    loaded = nib.load(image)
    expected = predictor(image).labels
    for order, flips in itertools.product([(1, 2, 0), (2, 1, 0)], [(1, 1, -1), (-1, -1, 1)]):
        turn = np.column_stack([order, flips])
        array = nib.orientations.apply_orientation(loaded.get_fdata(), turn)
        affine = loaded.affine @ nib.orientations.inv_ornt_aff(turn, loaded.shape)
        turned = nib.orientations.apply_orientation(expected, turn)
        assert np.array_equal(predictor((array, affine)).labels, turned)


def test_probabilities_sum_to_one_and_agree_with_labels(
    predictor: volseg.Predictor, image: Path, tmp_path: Path
) -> None:
    segmentation = predictor(image, probabilities=True)
    assert segmentation.probabilities is not None
    assert segmentation.probabilities.shape == (3, *segmentation.labels.shape)
    assert segmentation.probabilities.sum(0) == pytest.approx(1, abs=1e-5)
    segmentation.save_probabilities(tmp_path / "p.nii.gz")
    assert nib.load(tmp_path / "p.nii.gz").shape == (*segmentation.labels.shape, 3)
    with pytest.raises(ValueError, match="no probabilities were kept"):
        predictor(image).save_probabilities(tmp_path / "q.nii.gz")


def test_wrong_inputs_are_refused(predictor: volseg.Predictor, image: Path) -> None:
    array = nib.load(image).get_fdata()
    with pytest.raises(DataError, match="expected a path"):
        predictor(5)
    with pytest.raises(DataError, match="holds NaN"):
        predictor((np.full(array.shape, np.nan), np.eye(4)))
    with pytest.raises(DataError, match="2 channels; expected 1"):
        predictor((np.stack([array, array]), np.eye(4)))
    with pytest.raises(DataError, match="2 channels; expected 1"):
        predictor([image, image])
    with pytest.raises(DataError, match="a 2D image; expected 3D"):
        predictor((array[0], np.eye(4)))


class _Identity(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, -x], 1)


def test_windows_of_an_identity_give_the_image_back() -> None:
    image = torch.randn(1, 21, 9, 14, generator=torch.Generator().manual_seed(0))
    cpu = torch.device("cpu")
    scores = predict_scores([_Identity()], image, (8, 8, 8), cpu)
    assert torch.allclose(scores, torch.cat([image, -image]), atol=1e-5)
    padded = predict_scores([_Identity()], image, (32, 16, 16), cpu)
    assert torch.allclose(padded, scores, atol=1e-5)


def test_windows_equal_monais_inferer(predictor: volseg.Predictor) -> None:
    network = predictor.model.networks[0]
    image = torch.randn(1, 40, 24, 20, generator=torch.Generator().manual_seed(0))
    inferer = SlidingWindowInferer((16, 16, 16), overlap=0.5, mode="gaussian")
    with torch.no_grad():
        expected = inferer(image[None], network)
    scores = predict_scores([network], image, (16, 16, 16), torch.device("cpu"))
    assert torch.allclose(scores, expected[0], atol=1e-4)


@pytest.mark.parametrize(
    ("has_bfloat16", "precision"), [(True, torch.bfloat16), (False, torch.float16)]
)
def test_windows_on_a_gpu_have_the_range_of_float32_where_it_can(
    has_bfloat16: bool, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def autocast(device_type: str, dtype: torch.dtype, enabled: bool) -> nullcontext[None]:
        seen.append((device_type, dtype, enabled))
        return nullcontext()

    def run_on_cpu(image: torch.Tensor, *, predictor: nn.Module, **_: object) -> torch.Tensor:
        return predictor(image)

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(windows, "sliding_window_inference", run_on_cpu)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: has_bfloat16 or including_emulation,
    )
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    image = torch.zeros(1, 4, 4, 4)
    for device in ("cuda", "cpu"):
        predict_scores([nn.Identity()], image, (4, 4, 4), torch.device(device))
    assert seen == [("cuda", precision, True), ("cpu", torch.float32, False)]


def test_edited_plan_is_noticed(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    plan = copy / "plan.yaml"
    plan.write_text(plan.read_text().replace("channels: [4, 8, 16]", "channels: [4, 8, 12]"))
    with pytest.raises(ConfigError, match="was trained with network"):
        volseg.Predictor.load(copy)
    plan.write_text((run / "plan.yaml").read_text().replace("1.2", "1.3"))
    with pytest.raises(ConfigError, match="was trained with spacing_mm"):
        volseg.Predictor.load(copy)


def test_damaged_weights_are_noticed(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    weights = copy / "fold_0" / "checkpoint_last.pt"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DataError, match=r"checkpoint_last\.pt"):
        volseg.Predictor.load(copy)


def test_what_is_no_model_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no model; expected a run folder"):
        volseg.Predictor.load(tmp_path)
    with pytest.raises(ConfigError, match="that fold has not been trained"):
        volseg.Predictor.load(run, folds=(3,))
    with pytest.raises(MachineError, match="device cuda:99 is not there"):
        volseg.Predictor.load(run, device="cuda:99")


def touch(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


def ids(paths: list[Path], num_channels: int) -> dict[str, int]:
    return {case.case_id: len(case.images) for case in find_inputs(paths, num_channels)}


def test_files_are_grouped_by_channel_suffix(tmp_path: Path) -> None:
    touch(tmp_path / "a", "p_0000.nii.gz", "p_0001.nii.gz", "q.nii.gz", ".x.nii.gz", "n.txt")
    assert ids([tmp_path / "a"], 2) == {"p": 2, "q": 1}


def test_numbered_cases_of_one_channel_keep_their_names(tmp_path: Path) -> None:
    touch(tmp_path / "a", "p_0000.nii.gz", "p_0001.nii.gz")
    assert ids([tmp_path / "a"], 1) == {"p_0000": 1, "p_0001": 1}
    (single,) = touch(tmp_path / "b", "r_0000.nii.gz")
    assert ids([single], 1) == {"r": 1}
    (other,) = touch(tmp_path / "c", "r_0004.nii.gz")
    assert ids([other], 1) == {"r_0004": 1}


def test_wrong_inputs_of_a_batch_are_refused(tmp_path: Path) -> None:
    files = touch(tmp_path / "a", "p_0000.nii.gz", "p_0001.nii.gz")
    with pytest.raises(DataError, match=r"case p: 2 files .*; expected 3"):
        find_inputs(files, 3)
    with pytest.raises(ConfigError, match="does not exist"):
        find_inputs([tmp_path / "z.nii.gz"], 1)
    twice = [*touch(tmp_path / "b", "s.nii.gz"), *touch(tmp_path / "c", "s.nii")]
    with pytest.raises(DataError, match="would both be written as s"):
        find_inputs(twice, 1)


class _Ramps(torch.nn.Module):
    """Logits that know where in the window they are, a channel for each class."""

    def __init__(self, ramps: torch.Tensor) -> None:
        super().__init__()
        self.ramps = ramps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.ramps


@pytest.mark.parametrize(
    ("names", "regions", "axes", "outputs"),
    [
        (("left a", "right a", "b"), (), (0, 1, 2), [0, 2, 1, 3]),
        (("left a", "b", "c"), (), (1, 2), [0, 1, 2, 3]),
        (
            ("left a", "right a", "b"),
            [
                {"name": "right", "values": (2,)},
                {"name": "left", "values": (1,)},
                {"name": "all", "values": (1, 2, 3)},
            ],
            (0, 1, 2),
            [1, 0, 2],
        ),
    ],
)
def test_scores_are_averaged_over_mirror_images(names, regions, axes, outputs) -> None:
    classes = Classes(names=("background", *names), values=(0, 1, 2, 3), regions=regions)
    mirroring = plan_mirroring(classes, 3)
    window, generator = (4, 5, 6), torch.Generator().manual_seed(0)
    image = torch.rand(1, *window, generator=generator)
    ramps = torch.rand(len(outputs), *window, generator=generator)
    expected = []
    for number in range(4 if axes == (1, 2) else 8):
        chosen = [axis for place, axis in enumerate(axes) if number >> place & 1]
        dims = [axis + 1 for axis in chosen]
        logits = (image.flip(dims) * ramps).flip(dims)
        if 0 in chosen:
            logits = torch.stack([logits[outputs[k]] for k in range(len(outputs))])
        expected.append(logits)
    cpu = torch.device("cpu")
    scores = predict_scores([_Ramps(ramps)], image, window, cpu, mirroring=mirroring)
    torch.testing.assert_close(scores, torch.stack(expected).mean(0))


def test_slices_are_not_mirrored_through() -> None:
    mirroring = plan_mirroring(Classes(names=("background", "a"), values=(0, 1)), 3)
    assert list_mirrorings(mirroring, (8, 1, 8)) == [(), (0,), (2,), (0, 2)]


def test_mirrored_predictor_is_another(run: Path, balls: Path) -> None:
    image = sorted((balls / "imagesTr").iterdir())[0]
    plain, mirrored = (
        volseg.Predictor.load(run, mirror=mirror)(image, probabilities=True).probabilities
        for mirror in (False, True)
    )
    assert plain is not None
    assert mirrored is not None
    assert 1e-4 < np.abs(plain - mirrored).max() < 1
