"""16-bit formats are used only where the hardware has them, whatever a configuration says."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from torch import Tensor, nn

import volseg
from volseg.cli import main
from volseg.config import Config, load_config
from volseg.errors import ConfigError, MachineError
from volseg.inference import Options
from volseg.inference.precision import has_fast_bfloat16
from volseg.losses import DiceCrossEntropy, MultiLevelLoss
from volseg.training.budget import Budget
from volseg.training.engine import Learner, make_learner
from volseg.training.precision import choose_precision

CPU = torch.device("cpu")


def set_instructions(patch: pytest.MonkeyPatch, amx: bool = False, avx512: bool = False) -> None:
    patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)


@pytest.mark.parametrize(("amx", "avx512"), [(True, False), (False, True), (True, True)])
def test_bfloat16_where_the_cpu_has_it(
    amx: bool, avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_instructions(monkeypatch, amx, avx512)
    assert choose_precision("bfloat16", CPU) == torch.bfloat16


def test_bfloat16_on_another_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_instructions(monkeypatch)
    with pytest.raises(MachineError) as refused:
        choose_precision("bfloat16", CPU)
    assert str(refused.value) == (
        "training.precision bfloat16 on a CPU without instructions for it, which is many times "
        "slower than float32; expected AMX or the bfloat16 instructions of AVX-512. Set it to "
        "auto, or to resume what began on another machine, in the config*.yaml of the fold."
    )
    assert choose_precision("auto", CPU) == torch.float32


def test_float16_without_cuda_is_refused() -> None:
    for device, said in (("cpu", "a CPU"), ("mps", "mps")):
        with pytest.raises(MachineError, match=rf"float16 on {said}; expected a CUDA GPU\. Set it"):
            choose_precision("float16", torch.device(device))


def test_training_that_is_refused_writes_nothing(
    balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_instructions(monkeypatch)
    for precision in ("bfloat16", "float16"):
        config = load_config(None, [*TINY, f"training.precision={precision}"])
        with pytest.raises(MachineError, match=f"training.precision {precision} on a CPU"):
            volseg.train(balls, tmp_path / "run", config=config, epochs=1, device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def half_run(balls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained in bfloat16, as on a machine that has it."""
    config = load_config(None, [*TINY, "training.precision=bfloat16"])
    folder = tmp_path_factory.mktemp("runs") / "half"
    with pytest.MonkeyPatch.context() as patch:
        set_instructions(patch, avx512=True)
        return volseg.train(balls, folder, config=config, epochs=1, device="cpu")


def test_training_of_another_machine_goes_on_when_its_file_says_so(
    half_run: Path, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_instructions(monkeypatch)
    run = shutil.copytree(half_run, tmp_path / "run")
    with pytest.raises(MachineError, match=r"to resume .* in the config\*\.yaml of the fold"):
        volseg.train(balls, run, epochs=1, resume=True, device="cpu")
    kept = run / "fold_0" / "config.yaml"
    assert "precision: bfloat16" in kept.read_text()
    kept.write_text(kept.read_text().replace("precision: bfloat16", "precision: auto"))
    volseg.train(balls, run, epochs=1, resume=True, device="cpu")
    assert len((run / "fold_0" / "history.jsonl").read_text().splitlines()) == 2


def test_model_that_was_trained_in_16_bits_predicts_in_32_elsewhere(
    half_run: Path, balls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_instructions(monkeypatch)
    image = sorted((balls / "imagesTr").iterdir())[0]
    predictor = volseg.Predictor.load(half_run, device="cpu")
    assert predictor._members.precision == torch.float32
    expected = volseg.Predictor.load(half_run, device="cpu", options=Options(precision="float32"))
    assert (predictor(image).labels == expected(image).labels).all()


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_prediction_takes_no_16_bit_format_by_name(
    name: str, half_run: Path, balls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=f"precision '{name}'; expected one of auto, float32"):
        Options(precision=name)  # type: ignore[arg-type]
    output = ["-o", str(tmp_path / "p"), "--precision", name]
    assert main(["predict", str(half_run), "-i", str(balls / "imagesTr"), *output]) == 2
    said = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert f"'{name}' is not one of 'auto', 'float32'" in said
    assert not (tmp_path / "p").exists()


def make_bfloat16_learner(network: nn.Module) -> Learner:
    loss = MultiLevelLoss(DiceCrossEntropy(), "same")
    return make_learner(network, loss, CPU, Budget(1), Config().optimizer, 0, torch.bfloat16)


def compute_weight_gradient(conv: nn.Module, image: Tensor, precision: torch.dtype) -> Tensor:
    """Of the sum of squares, with garbage in the memory that was freed before."""
    garbage = [torch.full((number,), 3e38) for number in (1_000, 20_000, 100_000, 300_000)]
    del garbage
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        loss = conv(image).float().square().sum()
    return torch.autograd.grad(loss, conv.weight)[0]


LAYERS = {
    "3": nn.Conv3d(16, 16, 3, padding=1),
    "5": nn.Conv3d(16, 16, 5, padding=2),
    "7": nn.Conv3d(16, 16, 7, padding=3),
    "7, stride 2": nn.Conv3d(16, 16, 7, stride=2, padding=3),
    "1 x 5 x 5": nn.Conv3d(16, 16, (1, 5, 5), padding=(0, 2, 2)),
    "3, stride 2": nn.Conv3d(16, 16, 3, stride=2, padding=1),
    "3, transposed": nn.ConvTranspose3d(16, 16, 3, padding=1),
    "5, transposed": nn.ConvTranspose3d(16, 16, 5, padding=2),
}


@pytest.mark.skipif(not has_fast_bfloat16(), reason="the CPU has no instructions for bfloat16")
@pytest.mark.parametrize("second", [1, 2, 3, 8])
@pytest.mark.parametrize("first", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_in_bfloat16_are_right_however_thin_a_map(
    layer: str, first: int, second: int
) -> None:
    torch.manual_seed(0)
    conv = copy.deepcopy(LAYERS[layer])
    image = torch.randn(2, 16, first, second, 8)
    expected = compute_weight_gradient(conv, image, torch.float32)
    make_bfloat16_learner(conv)
    found, *others = (compute_weight_gradient(conv, image, torch.bfloat16) for _ in range(6))
    # bfloat16 has 8 bits.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    assert all(torch.equal(other, found) for other in others)


def test_maps_that_are_not_thin_stay_in_bfloat16() -> None:
    network = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1))
    average = make_bfloat16_learner(network).average.module
    with torch.autocast("cpu", torch.bfloat16):
        thicknesses = {n: network(torch.zeros(1, 4, n, 4, 4)).dtype for n in (1, 2, 3)}
    assert thicknesses == {1: torch.bfloat16, 2: torch.float32, 3: torch.bfloat16}
    # The average computes with weights of its own.
    nn.init.zeros_(average[0].weight)
    nn.init.ones_(average[0].bias)
    assert average(torch.ones(1, 4, 2, 4, 4)).unique() == 1
