"""One step of a training, whatever the memory and the arithmetic."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from ignite.engine import Events
from torch import nn

from volseg.config import Config
from volseg.data.patches import Batches
from volseg.errors import ConfigError, MachineError
from volseg.losses import DiceCrossEntropy, MultiLevelLoss, OwnLoss
from volseg.networks import build_network, list_networks
from volseg.networks.memory import recompute_
from volseg.training import engine
from volseg.training.budget import Budget
from volseg.training.engine import (
    Learner,
    compute_gradients,
    create_trainer,
    make_learner,
    run_to_end,
)
from volseg.training.muon import Muon
from volseg.training.optimizers import make_optimizer
from volseg.training.precision import CompiledNetwork, choose_precision

CPU = torch.device("cpu")
OPTIONS = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}


def make(name: str = "unet", **options: object) -> Learner:
    torch.manual_seed(0)
    network = build_network(name, **OPTIONS, channels=(4, 6, 8), **options)
    loss = MultiLevelLoss(DiceCrossEntropy())
    return make_learner(network, loss, CPU, Budget(10), Config().optimizer, seed=0)


def test_a_training_has_the_optimiser_that_suits_its_network() -> None:
    assert type(make().optimizer) is Muon
    assert type(make("laddernet").optimizer) is torch.optim.AdamW


def make_batch(size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.manual_seed(1)
    image = torch.randn(size, 1, 8, 8, 8, generator=generator)
    return image, torch.randint(0, 3, (size, 8, 8, 8), generator=generator)


def gradients(learner: Learner) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in learner.network.parameters()]


def assert_near(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_parts_of_a_batch_give_its_gradient(parts: int) -> None:
    whole, split = make(deep_supervision=True), make(deep_supervision=True)
    split.counters.parts = parts
    losses = [compute_gradients(learner, *make_batch()) for learner in (whole, split)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_near(gradients(split), gradients(whole))


class Hungry(nn.Module):
    """Runs out of memory above a number of samples."""

    def __init__(self, network: nn.Module, most: int, error: Exception) -> None:
        super().__init__()
        self.network, self.most, self.error = network, most, error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise self.error
        return self.network(x)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
)
def test_batch_is_halved_until_it_fits(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    usual, learner = make(), make()
    learner.forward = Hungry(learner.network, 1, error)
    compute_gradients(usual, *make_batch())
    with caplog.at_level(logging.WARNING):
        compute_gradients(learner, *make_batch())
    assert learner.counters.parts == 4
    assert "out of memory: batches are computed in 4 parts" in caplog.text
    assert_near(gradients(learner), gradients(usual))


class Wasteful(nn.Module):
    """Runs out of memory as long as feature maps are kept."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if count_kept(self.network, x) > 60_000:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.network(x)


def test_feature_maps_are_recomputed_where_single_samples_do_not_fit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    usual, learner = make(), make()
    learner.forward = Wasteful(learner.network)
    compute_gradients(usual, *make_batch(2))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            compute_gradients(learner, *make_batch(2))
    assert caplog.messages == [
        "out of memory: batches are computed in 2 parts",
        "out of memory: feature maps are computed twice instead of kept",
    ]
    assert (learner.counters.parts, learner.counters.is_recomputing) == (2, True)
    assert_near(gradients(learner), gradients(usual))


def test_patch_that_never_fits_ends_with_the_cure() -> None:
    learner = make()
    learner.forward = Hungry(learner.network, 0, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(MachineError, match=r"1 patches of \[8, 8, 8\] do not fit") as caught:
        compute_gradients(learner, *make_batch(2))
    # Batches are as small as they can be and feature maps recomputed already.
    assert str(caught.value).endswith("To go on, lower plan.patch or plan.width.")


def test_processes_do_not_save_memory_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "count_processes", lambda: 2)
    learner = make()
    learner.forward = Hungry(learner.network, 0, torch.OutOfMemoryError("CUDA out of memory."))
    cures = r"plan.width, or raise training\.parts, or set training\.recompute"
    with pytest.raises(MachineError, match=cures):
        compute_gradients(learner, *make_batch(2))


class Cusp(nn.Module):
    """A finite loss with a slope that is none."""

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (0 * logits).square().sum().sqrt()


def test_gradient_that_is_not_finite_leaves_the_weights_as_they_were() -> None:
    learner = make()
    learner.loss = Cusp()
    before = {name: tensor.clone() for name, tensor in learner.network.state_dict().items()}
    with pytest.raises(ConfigError, match=r"the gradient became nan at step 0; .* Lower .* --set"):
        create_trainer(learner).run([make_batch()])
    for name, tensor in learner.network.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert learner.optimizer.state == {}


class Overflow(nn.Module):
    """Infinite, as what exceeds float16, for the given number of calls; then a mean."""

    def __init__(self, times: float) -> None:
        super().__init__()
        self.times = times

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.times -= 1
        return logits.float().square().mean() * (math.inf if self.times >= 0 else 1)


def make_half(times: float) -> Learner:
    learner = make()
    network, config = learner.network, Config().optimizer
    return make_learner(
        network, Overflow(times), CPU, Budget(10), config, seed=0, precision=torch.float16
    )


def test_step_that_exceeds_float16_is_left_out_and_the_next_is_not() -> None:
    learner = make_half(times=1)
    trainer = create_trainer(learner)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: learner.end_step(engine.state.output)
    )
    before = [parameter.detach().clone() for parameter in learner.network.parameters()]
    trainer.run([make_batch()])
    assert learner.scaler.get_scale() == 2**15
    assert all(map(torch.equal, learner.network.parameters(), before))
    trainer.run([make_batch()])
    assert not all(map(torch.equal, learner.network.parameters(), before))
    # Two steps were made, of which the second one's loss alone is known.
    assert (learner.counters.step, learner.counters.round_steps) == (2, 1)
    assert math.isfinite(learner.counters.round_loss)


def test_statistics_of_a_batch_that_exceeds_float16_are_left_out() -> None:
    network = build_network("unet", **OPTIONS, channels=(4, 6, 8), norm="batch")
    loss, config = MultiLevelLoss(DiceCrossEntropy()), Config().optimizer
    learner = make_learner(network, loss, CPU, Budget(10), config, seed=0, precision=torch.float16)
    before = [buffer.clone() for buffer in network.buffers()]
    assert before
    image, target = make_batch()
    create_trainer(learner).run([(image * math.inf, target)])
    for found in (network.buffers(), learner.average.module.buffers()):
        assert all(map(torch.equal, found, before))
    create_trainer(learner).run([(image, target)])
    assert not all(map(torch.equal, network.buffers(), before))


def test_training_that_never_fits_into_float16_is_refused() -> None:
    learner = make_half(times=math.inf)
    with pytest.raises(ConfigError, match=r"up to step 0; .* Set training\.precision to float32"):
        create_trainer(learner).run([make_batch()] * 40)
    assert learner.scaler.get_scale() == 2**-11


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    learner = make()
    learner.forward = Hungry(learner.network, 0, RuntimeError("sizes differ"))
    with pytest.raises(RuntimeError, match="sizes differ"):
        compute_gradients(learner, *make_batch(2))


def test_network_that_cannot_be_compiled_trains_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(image: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no compiler found\nand more")

    monkeypatch.setattr(torch, "compile", lambda network: fail)
    check_fall_back("no compiler found", caplog)


class FailingBackward(torch.autograd.Function):
    """What torch compiles when it is first needed."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, slope: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no backward pass")


def test_network_whose_backward_pass_cannot_be_compiled_trains_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        torch, "compile", lambda network: lambda image: FailingBackward.apply(network(image))
    )
    check_fall_back("no backward pass", caplog)


def check_fall_back(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    usual, learner = make(), make()
    learner.forward = CompiledNetwork(learner.network)
    compute_gradients(usual, *make_batch())
    with caplog.at_level(logging.WARNING):
        compute_gradients(learner, *make_batch())
        compute_gradients(learner, *make_batch())
    assert caplog.text.count(f"torch.compile failed ({reason})") == 1
    assert_near(gradients(learner), gradients(usual))


def test_one_of_several_processes_does_not_go_on_without_the_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(image: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(torch, "compile", lambda network: fail)
    monkeypatch.setattr("volseg.training.precision.count_processes", lambda: 2)
    learner = make()
    learner.forward = CompiledNetwork(learner.network)
    with pytest.raises(MachineError, match=r"one of several processes .*compile=false"):
        compute_gradients(learner, *make_batch())


def test_error_of_the_network_itself_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network: lambda image: network(image))
    learner = make()
    learner.forward = CompiledNetwork(learner.network)
    _, target = make_batch()
    with pytest.raises(ValueError, match="input has 2 channels; expected 1"):
        compute_gradients(learner, torch.zeros(4, 2, 8, 8, 8), target)


DEAD = "DataLoader worker (pid 12) is killed by signal: Killed. "
"""As torch says it, anywhere in the main thread."""


def test_dead_loader_process_is_no_failure_of_the_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def die(image: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(DEAD)

    monkeypatch.setattr(torch, "compile", lambda network: die)
    learner = make()
    learner.forward = CompiledNetwork(learner.network)
    with pytest.raises(RuntimeError, match="is killed by signal"):
        compute_gradients(learner, *make_batch())


def test_error_that_speaks_of_a_worker_is_no_dead_process() -> None:
    def give(error: Exception) -> Iterator[object]:
        raise error
        yield

    with pytest.raises(RuntimeError, match=r"^Caught it"):
        next(iter(Batches(give(RuntimeError("Caught it in DataLoader worker process 0.")), tuple)))
    with pytest.raises(MachineError, match=r"^a loader process ended \(DataLoader worker \(p"):
        next(iter(Batches(give(RuntimeError(DEAD)), tuple)))


def test_dead_loader_process_is_told_from_any_handler() -> None:
    def fail() -> None:
        raise RuntimeError(DEAD)

    trainer = create_trainer(make())
    trainer.add_event_handler(Events.ITERATION_COMPLETED, fail)
    with pytest.raises(MachineError, match=r"training\.workers=0"):
        run_to_end(trainer, [make_batch()])


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_gpu_that_would_emulate_bfloat16_takes_float16(
    has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return has_bfloat16 or including_emulation

    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(asked.append(device)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Turing")
    gpu = torch.device("cuda:1")
    if has_bfloat16:
        assert choose_precision("auto", gpu) == torch.bfloat16
        assert choose_precision("bfloat16", gpu) == torch.bfloat16
    else:
        assert choose_precision("auto", gpu) == torch.float16
        with pytest.raises(MachineError, match="Turing has no bfloat16"):
            choose_precision("bfloat16", gpu)
    # Not whatever GPU is the current one.
    assert set(asked) == {gpu}


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("avx512", [False, True])
def test_sixteen_bits_only_where_they_pay(
    amx: bool, avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    expected = torch.bfloat16 if amx or avx512 else torch.float32
    assert choose_precision("auto", CPU) == expected
    assert choose_precision("float32", CPU) == torch.float32
    with pytest.raises(MachineError, match="float16 on a CPU"):
        choose_precision("float16", CPU)


def test_bfloat16_gives_nearly_the_same_gradient() -> None:
    usual, learner = make(), make()
    learner.precision = torch.bfloat16
    losses = [compute_gradients(each, *make_batch()) for each in (usual, learner)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    ours, theirs = (torch.cat([g.flatten() for g in gradients(e)]) for e in (learner, usual))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.98


def count_kept(network: nn.Module, image: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(image)
    return sum(kept.values())


@pytest.mark.parametrize("name", list_networks())
def test_recomputed_feature_maps_give_the_same_gradient(name: str) -> None:
    options = {"norm": "instance"}
    if name == "resnet_unet":
        options |= {"stem": "k3s1", "decoder_norm": "instance"}
    usual, learner = make(name, **options), make(name, **options)
    recompute_(learner.network)
    for each in (usual, learner):
        compute_gradients(each, *make_batch())
    assert_near(gradients(learner), gradients(usual))
    assert learner.network.state_dict().keys() == usual.network.state_dict().keys()
    image, _ = make_batch()
    assert count_kept(learner.network, image) < count_kept(usual.network, image)


def test_steepest_descent_with_nesterov_momentum() -> None:
    config = Config().optimizer.model_copy(
        update={"name": "sgd", "momentum": 0.9, "weight_decay": 0.1, "learning_rate": 0.01}
    )
    weight = nn.Parameter(torch.tensor([2.0]))
    network = nn.ParameterList([weight])
    optimizer = make_optimizer(network, config)
    velocity, expected = 0.0, 2.0
    for gradient in (1.0, -0.5):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        slope = gradient + 0.1 * expected
        velocity = 0.9 * velocity + slope
        expected -= 0.01 * (slope + 0.9 * velocity)
    assert weight.item() == pytest.approx(expected)


def test_loss_goes_where_the_network_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, places = MultiLevelLoss(DiceCrossEntropy()), []
    monkeypatch.setattr(loss, "to", places.append)
    network = build_network("unet", **OPTIONS, channels=(4, 6))
    make_learner(network, loss, CPU, Budget(10), Config().optimizer, seed=0)
    assert places == [CPU]


def test_own_loss_that_fails_is_no_failure_of_the_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(nn.Module):
        def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("devices differ")

    monkeypatch.setattr(torch, "compile", lambda network: lambda image: network(image))
    learner = make()
    learner.loss = MultiLevelLoss(OwnLoss(Failing()))
    learner.forward = CompiledNetwork(learner.network)
    with pytest.raises(ConfigError, match=r"Failing fails with logits .*devices differ"):
        compute_gradients(learner, *make_batch())
    assert "torch.compile failed" not in caplog.text


def test_step_finishes_what_the_loader_gives() -> None:
    usual, learner = make(), make()
    learner.finish = lambda size: make_batch(size)
    create_trainer(learner).run([4], max_epochs=1)
    create_trainer(usual).run([make_batch(4)], max_epochs=1)
    assert_near([*learner.network.parameters()], [*usual.network.parameters()])
