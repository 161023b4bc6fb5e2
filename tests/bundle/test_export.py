"""An exported bundle runs in MONAI, and gives what volseg gives."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import TINY
from monai.bundle import ConfigParser, ConfigWorkflow
from numpy.typing import NDArray

import volseg
from volseg.bundle import export_bundle
from volseg.bundle.workflow import make_inference_config
from volseg.config import load_config
from volseg.errors import ConfigError
from volseg.inference import Options
from volseg.inference.model import build_planned_network, load_model, read_facts
from volseg.networks import list_networks
from volseg.networks.weights import save_weights
from volseg.planning import Fingerprint, Normalisation, describe_cpu, make_plan


@pytest.fixture(scope="module")
def bundle(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(run, tmp_path_factory.mktemp("bundles") / "balls")


@pytest.fixture(scope="module")
def image(balls: Path) -> Path:
    return sorted((balls / "imagesTr").iterdir())[1]


def test_bundle_has_the_files_of_the_specification(bundle: Path) -> None:
    files = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert {
        "LICENSE",
        "configs/metadata.json",
        "configs/inference.json",
        "configs/volseg.json",
        "models/model.pt",
        "docs/README.md",
    } <= files
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert {"version", "monai_version", "pytorch_version", "numpy_version", "task"} <= set(metadata)
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"]["1"] == "organ_3"


def test_monai_finds_the_required_properties(bundle: Path) -> None:
    workflow = ConfigWorkflow(
        config_file=str(bundle / "configs" / "inference.json"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        workflow_type="infer",
        bundle_root=str(bundle),
        logging_file=False,
    )
    workflow.initialize()
    assert workflow.check_properties() == []


def test_predictor_reads_the_bundle_as_data(run: Path, bundle: Path, image: Path) -> None:
    (bundle / "configs" / "inference.json").rename(bundle / "configs" / "hidden.json")
    try:
        from_bundle = predict(bundle, image)
    finally:
        (bundle / "configs" / "hidden.json").rename(bundle / "configs" / "inference.json")
    assert np.array_equal(from_bundle, predict(run, image))


def predict(model: Path, image: Path) -> NDArray[np.integer]:
    """volseg's labels, in float32 as MONAI's on a CPU."""
    options = Options(precision="float32")
    return volseg.Predictor.load(model, options=options)(image).labels


def run_bundle(bundle: Path, image: Path, output: Path) -> nib.Nifti1Image:
    command = [sys.executable, "-m", "monai.bundle", "run"]
    command += ["--config_file", str(bundle / "configs" / "inference.json")]
    command += ["--bundle_root", str(bundle), "--image", str(image), "--output_dir", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return nib.load(output / image.name)


def test_monai_gives_the_labels_of_volseg(
    run: Path, bundle: Path, image: Path, tmp_path: Path
) -> None:
    by_monai = run_bundle(bundle, image, tmp_path / "out")
    by_volseg = predict(run, image)
    assert by_volseg.any()
    assert by_monai.affine == pytest.approx(nib.load(image).affine, abs=1e-5)
    assert (np.asarray(by_monai.dataobj) == by_volseg).mean() >= 0.999


def test_monai_agrees_when_the_plan_resamples_a_ct(
    balls: Path, tmp_path: Path, image: Path
) -> None:
    overrides = [*TINY, "plan.spacing_mm=[1.3, 1.3, 1.3]", "plan.normalisation=ct"]
    config = load_config(None, overrides)
    run = volseg.train(balls, tmp_path / "run", config=config, epochs=8)
    bundle = export_bundle(run, tmp_path / "bundle")
    by_monai = run_bundle(bundle, image, tmp_path / "out")
    by_volseg = predict(run, image)
    assert (by_volseg > 0).mean() > 0.01
    assert (np.asarray(by_monai.dataobj) == by_volseg).mean() >= 0.999


@pytest.mark.slow
def test_hippocampus_run_gives_the_same_in_monai(shared_data: Path, tmp_path: Path) -> None:
    config = load_config(None, ["plan.width=8", "training.steps_per_epoch=40"])
    run = volseg.train(shared_data / "hippocampus", tmp_path / "run", config=config, epochs=2)
    bundle = export_bundle(run, tmp_path / "bundle")
    image = shared_data / "hippocampus" / "imagesTr" / "hippocampus_001.nii.gz"
    by_monai = np.asarray(run_bundle(bundle, image, tmp_path / "out").dataobj)
    by_volseg = predict(run, image)
    assert set(np.unique(by_volseg)) == {0, 1, 2}
    assert (by_monai == by_volseg).mean() >= 0.999


def test_network_can_be_named_in_a_bundle() -> None:
    example = Path(__file__).resolve().parents[2] / "configs" / "bundle" / "network.json"
    network = ConfigParser(json.loads(example.read_text())).get_parsed_content("network_def").eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 1, 32, 32, 32)).shape == (1, 3, 32, 32, 32)


def make_run(run: Path, name: str, folder: Path) -> torch.nn.Module:
    """What a training on the data of `run` would leave that another network predicts with."""
    config = load_config(None, [*TINY, f"network.name={name}"])
    fingerprint = Fingerprint.read_json(run / "fingerprint.json")
    plan = make_plan(fingerprint, describe_cpu(), config, num_classes=3).plan
    network = build_planned_network(plan, num_outputs=3)
    network.train()(torch.randn(2, 1, *plan.patch))  # Running statistics are part of the weights.
    folder.mkdir()
    shutil.copy(run / "dataset.json", folder)
    plan.write_yaml(folder / "plan.yaml")
    state = {"network": network.state_dict(), "plan": plan.model_dump(mode="json")}
    save_weights(folder / "fold_0" / "checkpoint_last.pt", state)
    return network.eval()


@pytest.mark.parametrize("name", list_networks())
def test_every_network_comes_back_from_run_and_bundle(name: str, run: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = make_run(run, name, tmp_path / "run")
    bundle = export_bundle(tmp_path / "run", tmp_path / "bundle")
    config = json.loads((bundle / "configs" / "inference.json").read_text())
    by_monai = ConfigParser(config).get_parsed_content("network_def").eval()
    by_monai.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    loaded = [load_model(folder, "cpu").networks[0] for folder in (tmp_path / "run", bundle)]
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        expected = network(image)
        for other in (*loaded, by_monai):
            torch.testing.assert_close(other(image), expected)
    assert [type(other) for other in (*loaded, by_monai)] == [type(network)] * 3
    options = read_facts(tmp_path / "run").plan.network.keywords()
    assert read_facts(bundle).plan.network.keywords() == options
    assert options.items() <= config["network_def"].items()


def test_what_cannot_be_exported_is_refused(run: Path, bundle: Path) -> None:
    with pytest.raises(ConfigError, match="is not empty; nothing was written"):
        export_bundle(run, bundle)
    facts = read_facts(run)
    ct = Normalisation(channel="CT", scheme="ct", clip_low=0, clip_high=1, mean=0, std=1)
    mixed = facts.plan.model_copy(update={"normalisation": (*facts.plan.normalisation, ct)})
    with pytest.raises(ConfigError, match="some channels as CT and others by z-score"):
        make_inference_config(facts.model_copy(update={"plan": mixed}))


def test_slices_give_the_same_in_monai(balls: Path, tmp_path: Path, image: Path) -> None:
    overrides = [*TINY, "plan.slices=true", "plan.patch=[16, 16, 1]", "plan.spacing_mm=[1, 1, 1.6]"]
    config = load_config(None, overrides)
    run = volseg.train(balls, tmp_path / "run", config=config, epochs=8, device="cpu")
    bundle = export_bundle(run, tmp_path / "bundle")
    by_monai = run_bundle(bundle, image, tmp_path / "out")
    by_volseg = predict(run, image)
    assert (by_volseg > 0).mean() > 0.01
    assert (np.asarray(by_monai.dataobj) == by_volseg).mean() >= 0.999
    assert np.array_equal(predict(bundle, image), by_volseg)
