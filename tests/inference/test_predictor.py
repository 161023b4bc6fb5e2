"""Predictions lie on the source's grid whatever the input, and the model folder is only data."""

from __future__ import annotations

import gc
import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from dicom_files import write_series

import volseg
from volseg.data.cases import Classes
from volseg.data.content import Box
from volseg.data.mirroring import plan_mirroring
from volseg.errors import ConfigError, DataError, MachineError
from volseg.geometry import Geometry
from volseg.inference import Locator, Options, backends, load_model
from volseg.inference import predictor as predictor_module
from volseg.inference.inputs import find_inputs
from volseg.inference.members import Members, list_mirrorings
from volseg.inference.memory import plan_strips
from volseg.inference.model import Model, choose_device
from volseg.inference.precision import choose_fastest
from volseg.networks.weights import load_weights, save_weights


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


def test_weights_are_held_once(run: Path, image: Path) -> None:
    options = Options(backend="openvino", precision="float32")
    other = volseg.Predictor.load(run, device="cpu", options=options)
    assert {w.device.type for w in other.model.networks[0].parameters()} == {"meta"}
    expected = volseg.Predictor.load(
        run, device="cpu", options=Options(backend="torch", precision="float32")
    )
    assert {w.device.type for w in expected.model.networks[0].parameters()} == {"cpu"}
    assert (other(image).labels != expected(image).labels).mean() < 1e-4


def test_weights_that_are_rounded_once_give_what_autocast_gives(
    run: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On any CPU, and though the weights of a short training might not bear 16 bits.
    monkeypatch.setattr(backends, "choose_fastest", lambda _: torch.bfloat16)
    monkeypatch.setattr(backends, "SAME_LABELS", 0.0)
    options = Options(backend="torch")
    rounded = volseg.Predictor.load(run, device="cpu", options=options)
    kinds = [
        {weight.dtype for name, weight in rounded.model.networks[0].named_parameters() if f in name}
        for f in ("conv.", "norm.")
    ]
    assert kinds == [{torch.bfloat16}, {torch.float32}]
    with pytest.raises(ValueError, match="use load_model"):
        volseg.Predictor(rounded.model, options)
    by_autocast = volseg.Predictor(load_model(run, "cpu"), options)
    ours, theirs = (each(image, probabilities=True) for each in (rounded, by_autocast))
    assert np.array_equal(ours.probabilities, theirs.probabilities)


def test_what_coarse_levels_leave_is_given_back_before_large_feature_maps(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(predictor_module, "give_back_freed_memory", lambda: calls.append(1))
    options = Options(backend="torch", precision="float32")
    model = volseg.Predictor.load(run, device="cpu", options=options).model
    calls.clear()
    window = torch.zeros(1, 1, *model.facts.plan.patch)
    model.networks[0](window)
    assert not calls
    monkeypatch.setattr(predictor_module, "_FINE_BYTES", 0)
    model.networks[0](window)
    # Once for each level that is upsampled.
    assert len(calls) == len(model.facts.plan.network.channels) - 1


def test_networks_of_unknown_code_are_left_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object) -> Model:
        model = load_model(run, "cpu")
        model.networks[0].register_forward_hook(lambda *_: None)
        return model

    monkeypatch.setattr(backends, "choose_fastest", lambda _: torch.bfloat16)
    monkeypatch.setattr(backends, "SAME_LABELS", 0.0)
    monkeypatch.setattr(predictor_module, "load_model", load)
    other = volseg.Predictor.load(run, device="cpu", options=Options(backend="torch"))
    network = other.model.networks[0]
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    assert not any(module._forward_pre_hooks for module in network.modules())


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
    # Labels follow from interpolated logits, so that they may differ where two classes are close.
    second, first = np.sort(segmentation.probabilities, axis=0)[-2:]
    is_clear = first - second > 0.5
    values = np.array(segmentation.classes.values)[segmentation.probabilities.argmax(0)]
    assert np.array_equal(segmentation.labels[is_clear], values[is_clear])
    assert set(np.unique(values[is_clear])) == {0, 3, 7}
    segmentation.save_probabilities(tmp_path / "p.nii.gz")
    assert nib.load(tmp_path / "p.nii.gz").shape == (*segmentation.labels.shape, 3)
    with pytest.raises(ValueError, match="no probabilities were kept"):
        predictor(image).save_probabilities(tmp_path / "q.nii.gz")


def test_the_cpu_blends_the_scores_for_a_gpu_without_room(
    run: Path,
    predictor: volseg.Predictor,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected, devices, needed = predictor(image).labels, [], []
    stream, cpu = predictor_module.stream_scores, torch.device("cpu")
    # The network stays where it is, and so do its scores.
    other = volseg.Predictor(load_model(run, "cpu"))
    other.model = replace(other.model, device=torch.device("cuda"))

    def run_out(*arguments: object, device: torch.device, **options: object):
        devices.append(device.type)
        for part in stream(*arguments, device=cpu, **options):
            yield part
            if device.type == "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(predictor_module, "stream_scores", run_out)
    monkeypatch.setattr(predictor_module, "stays_on", lambda _, n: needed.append(n) or True)
    assert np.array_equal(other(image).labels, expected)
    assert devices == ["cuda", "cpu"]
    assert "memory of cuda is short; the CPU blends" in caplog.text
    # What is blended, as much to decide on it, and what the network takes.
    shape = predictor.read(image).placement.shape
    whole = plan_strips(Box((0, 0, 0), shape), shape, other.model.facts.plan.patch, 3)
    assert needed == [2 * whole.blend_bytes + other._window_bytes]


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
    with pytest.raises(DataError, match=r"^a 2D image; expected 3D"):
        predictor((array[0], np.eye(4)))
    with pytest.raises(ConfigError, match="backend 'OpenVINO'; expected one of auto, torch"):
        Options(backend="OpenVINO")


@pytest.mark.parametrize(
    ("spatial_dims", "shape", "expected"),
    [
        (2, (4, 5), (1, 4, 5)),
        (2, (1, 4, 5), (1, 4, 5)),
        (2, (3, 4, 5), (3, 4, 5)),
        (3, (3, 4, 5), (1, 3, 4, 5)),
        (3, (3, 4, 5, 6), (3, 4, 5, 6)),
    ],
)
def test_a_further_axis_of_an_array_is_its_channels(
    predictor: volseg.Predictor,
    spatial_dims: int,
    shape: tuple[int, ...],
    expected: tuple[int, ...],
) -> None:
    plan = predictor.model.facts.plan.model_copy(update={"spatial_dims": spatial_dims})
    image = predictor_module._from_array(np.zeros(shape), np.eye(4), plan)
    assert (image.array.shape, image.geometry.shape) == (expected, expected[1:])


@pytest.mark.parametrize(
    ("has_bfloat16", "precision"), [(True, torch.bfloat16), (False, torch.float16)]
)
def test_windows_on_a_gpu_have_the_range_of_float32_where_it_can(
    has_bfloat16: bool, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: has_bfloat16 or including_emulation,
    )
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert choose_fastest(torch.device("cuda")) == precision


@pytest.mark.parametrize(
    ("has_bfloat16", "precision"), [(True, torch.bfloat16), (False, torch.float32)]
)
def test_windows_on_a_cpu_have_16_bits_only_where_it_has_instructions(
    has_bfloat16: bool,
    precision: torch.dtype,
    run: Path,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("volseg.inference.precision.has_fast_bfloat16", lambda: has_bfloat16)
    monkeypatch.setattr("volseg.inference.backends.remember", lambda key, measure: measure())
    assert choose_fastest(torch.device("cpu")) == precision
    assert choose_fastest(torch.device("mps")) == torch.float32
    seen = set()

    class Watching(torch.nn.Module):
        def forward(self, windows: torch.Tensor) -> torch.Tensor:
            logits = torch.nn.functional.conv3d(windows, torch.ones(3, 1, 1, 1, 1))
            seen.add(logits.dtype)
            return logits

    model = replace(load_model(run, "cpu"), networks=(Watching(),))
    for name, expected in (("auto", precision), ("float32", torch.float32)):
        other = volseg.Predictor(model, Options(precision=name))
        seen.clear()
        other(image)
        assert seen == {expected}


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gpu", "cuda:", "cpu:0", "CUDA"):
        with pytest.raises(ConfigError, match="expected auto, cpu, cuda, cuda:N or mps"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(MachineError, match="cuda:2 is not there; this machine has 2"):
        choose_device("cuda:2")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(MachineError, match="device mps is not there"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == torch.device("mps")


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
    members = Members([_Ramps(ramps)], torch.device("cpu"), mirroring=mirroring)
    torch.testing.assert_close(members(image[None])[0], torch.stack(expected).mean(0))


def test_of_mirror_images_only_the_sum_is_held() -> None:
    shape, held = (1, 2, 7, 5, 3), []

    def network(windows: torch.Tensor) -> torch.Tensor:
        tensors = (each for each in gc.get_objects() if type(each) is torch.Tensor)
        held.append(sum(each.shape == shape for each in tensors))
        return torch.ones(shape)

    mirroring = plan_mirroring(Classes(names=("background", "a"), values=(0, 1)), 3)
    members = Members([network], torch.device("cpu"), mirroring=mirroring)
    assert members(torch.rand(1, 1, 7, 5, 3)).shape == shape
    assert held == [0, *[1] * 7]


def test_slices_are_not_mirrored_through() -> None:
    mirroring = plan_mirroring(Classes(names=("background", "a"), values=(0, 1)), 3)
    assert list_mirrorings(mirroring, (8, 1, 8)) == [(), (0,), (2,), (0, 2)]


def test_mirrored_predictor_is_another(run: Path, balls: Path) -> None:
    image = sorted((balls / "imagesTr").iterdir())[0]
    plain, mirrored = (
        volseg.Predictor.load(run, options=Options(mirror=mirror))(
            image, probabilities=True
        ).probabilities
        for mirror in (False, True)
    )
    assert plain is not None
    assert mirrored is not None
    assert 1e-4 < np.abs(plain - mirrored).max() < 1


def test_simpleitk_images_give_the_same(predictor: volseg.Predictor, image: Path) -> None:
    import SimpleITK as sitk

    found = predictor(sitk.ReadImage(str(image)))
    expected = predictor(image)
    assert np.array_equal(found.labels, expected.labels)
    assert found.geometry.affine == pytest.approx(expected.geometry.affine, abs=1e-5)


def test_a_dicom_series_gives_what_its_nifti_gives(run: Path, tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 2000, (20, 18, 14))
    affine = np.diag([-0.9, -1.1, 1.5, 1])
    folder = write_series(tmp_path / "case_7", stored, affine)
    predictor = volseg.Predictor.load(run, device="cpu")
    found = predictor(folder)
    # Noise shows in which order the axes are interpolated: the fastest in memory first.
    expected = predictor((np.asfortranarray(stored - 1024, np.float32), affine))
    assert np.array_equal(found.labels, expected.labels)
    assert found.geometry.affine == pytest.approx(affine, abs=1e-6)
    for path in (folder, tmp_path):
        assert [case.case_id for case in find_inputs([path], ["CT"])] == ["case_7"]
    found.save(tmp_path / "seg.dcm")
    assert (tmp_path / "seg.dcm").stat().st_size > 1000


def test_volumes_are_in_millilitres(predictor: volseg.Predictor, image: Path) -> None:
    segmentation = predictor(image)
    sheared = np.array([[2.0, 1, 0, 0], [0, 3, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1]])
    geometry = Geometry(segmentation.labels.shape, sheared)
    count = int((segmentation.labels == 3).sum())
    volumes = replace(segmentation, geometry=geometry).volumes_ml
    assert volumes[segmentation.classes.names[1]] == pytest.approx(count * 30 / 1000)


def test_a_locator_says_where_to_look(run: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    array = rng.normal(size=(60, 50, 44)).astype(np.float32)
    affine = np.diag([-1, 1.2, 1.6, 1])
    plain = volseg.Predictor.load(run, device="cpu")
    coarse = volseg.Predictor.load(run, device="cpu")
    mask = np.zeros(array.shape, np.uint8)
    mask[40:44, 20:24, 10:12] = 3

    def segment(self: volseg.Predictor, prepared: object, **options: object):
        return replace(plain.segment(prepared), labels=mask)

    coarse.segment = segment.__get__(coarse)
    predictor = volseg.Predictor.load(run, device="cpu", locator=Locator(coarse, margin_mm=6.0))
    found, everywhere = predictor((array, affine)).labels, plain((array, affine)).labels
    # Six voxels of 1 mm, five of 1.2 mm and 3.75 of 1.6 mm on each side.
    inside = (slice(34, 50), slice(15, 29), slice(7, 15))
    assert found[inside].any()
    assert np.array_equal(found[inside], everywhere[inside])
    outside = np.ones(found.shape, bool)
    outside[33:51, 14:30, 5:17] = False
    assert not found[outside].any()
    assert everywhere[outside].any()
    mask[:] = 0
    assert np.array_equal(predictor((array, affine)).labels, everywhere)


def with_channels(predictor: volseg.Predictor, *names: str) -> volseg.Predictor:
    facts = predictor.model.facts
    normalisation = tuple(
        facts.plan.normalisation[0].model_copy(update={"channel": name}) for name in names
    )
    plan = facts.plan.model_copy(update={"normalisation": normalisation})
    predictor.model = replace(predictor.model, facts=facts.model_copy(update={"plan": plan}))
    return predictor


def test_a_locator_of_other_images_is_refused(run: Path) -> None:
    coarse, fine = (volseg.Predictor.load(run, device="cpu") for _ in range(2))
    with_channels(coarse, "T1", "T2")
    with pytest.raises(ConfigError, match="takes 3D images of 2 channels; expected 3D and 1"):
        volseg.Predictor(fine.model, locator=Locator(coarse))
    with_channels(fine, "T2", "T1")
    with pytest.raises(ConfigError, match="takes T1, T2; expected T2, T1, in this order"):
        volseg.Predictor(fine.model, locator=Locator(coarse))


def test_several_models_are_averaged(
    run: Path, image: Path, tmp_path: Path, predictor: volseg.Predictor
) -> None:
    best = volseg.Predictor.load(run, device="cpu", checkpoint="best")
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    state = load_weights(run / "fold_0" / "checkpoint_best.pt")
    save_weights(copy / "fold_0" / "checkpoint_last.pt", state)
    both = volseg.Predictor.load(run, copy, device="cpu")
    assert len(both.model.networks) == 2
    assert both.uncertainty_maps == ("entropy", "disagreement")
    parts = [p(image, probabilities=True).probabilities for p in (predictor, best)]
    found = both(image, probabilities=True).probabilities
    # Averaged in each window, before windows are blended.
    assert found == pytest.approx(np.mean(parts, axis=0), abs=0.02)
    plan = copy / "plan.yaml"
    plan.write_text(plan.read_text().replace("1.2", "1.3"))
    with pytest.raises(ConfigError, match=r"has spacing_mm .*expected the same, since both see"):
        volseg.Predictor.load(run, copy, device="cpu")


def test_threads_may_share_a_predictor(run: Path, balls: Path) -> None:
    images = sorted((balls / "imagesTr").iterdir())
    for options in (Options(), Options(memory_gb=64), Options(backend="openvino")):
        predictor = volseg.Predictor.load(run, device="cpu", options=options)
        expected = [predictor(path).labels for path in images]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(predictor, 3 * images))
        for segmentation, labels in zip(found, 3 * expected, strict=True):
            assert np.array_equal(segmentation.labels, labels)
