"""The ignite engine of a training and what is attached to it, one function each."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from ignite.engine import Engine, EventEnum, Events
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from volseg.config import OptimizerConfig
from volseg.data.patches import Batches, refuse_dead_worker
from volseg.errors import ConfigError, MachineError, is_out_of_memory
from volseg.losses import MultiLevelLoss
from volseg.networks.memory import can_recompute, recompute_
from volseg.training.budget import Budget
from volseg.training.checkpoints import Checkpoints, Counters
from volseg.training.optimizers import choose_optimizer, learning_rate, make_optimizer
from volseg.training.parallel import add_up, count_processes, get_rank, is_first
from volseg.training.precision import CompiledNetwork, spare_thin_maps_

logger = logging.getLogger(__name__)

Weights = tuple[Tensor, ...] | list[Tensor]

CHECKPOINT_EVERY_S = 300
"""A kill loses at most this much of a training."""
CHECKPOINT_SHARE = 0.05
"""Largest share of the time that checkpoints of rounds may take."""
SMALLEST_SCALE = 2.0**-10
"""Of the loss in float16, which begins at 2 to the 16th and is halved by each step left out."""


_CURE = (
    "A new training takes it with --set; one that has a checkpoint goes on with --resume after "
    "an edit of the fold's config.yaml."
)


class TrainingEvents(EventEnum):  # type: ignore[misc]  # ignite is not typed for us
    """Fired besides ignite's own events."""

    ROUND_COMPLETED = "round_completed"
    """A fixed share of the training is done: time for a row of history."""
    LENGTH_CORRECTED = "length_corrected"
    """The number of steps has changed, which a resumed training must know."""


@dataclass(eq=False)
class Learner:
    """What one optimisation step works on.

    `average` holds the exponential moving average of the weights in ``average.module``.
    """

    network: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loss: MultiLevelLoss
    device: torch.device
    budget: Budget
    config: OptimizerConfig
    seed: int
    precision: torch.dtype = torch.float32
    forward: Callable[[Tensor], Any] = field(init=False)
    """The network, perhaps compiled, perhaps one of several processes."""
    finish: Callable[[Any], tuple[Tensor, Tensor]] = tuple
    """Makes image (B, C, *P) and target (B, *P) of what the loader gives."""
    wants_stop: bool = False
    """Whether this process was asked to stop."""
    is_stopping: bool = False
    """Whether any of them was, as all know since the end of the last step."""
    counters: Counters = field(default_factory=Counters)
    _looked_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Compute with the network as it is until it is compiled."""
        self.forward = self.network

    @property
    def is_complete(self) -> bool:
        """Whether all steps are done."""
        return self.counters.step >= self.budget.end

    def start_clock(self) -> None:
        """Leave out the time since the last look."""
        self._looked_s = time.monotonic()

    def look_at_clock(self) -> float:
        """Seconds since the last look, of the first process in all; they count from now on."""
        (seconds,) = self._count_time()
        return seconds

    def end_step(self, loss: float) -> float:
        """As `look_at_clock`; and count a step, its mean loss, and any process's wish to stop."""
        number = count_processes()
        seconds, mean_loss, stops = self._count_time(loss / number, float(self.wants_stop))
        self.is_stopping = stops > 0
        self.counters.step += 1
        # In float16 it may be infinite: the scaler leaves the step out, and the mean does, too.
        if math.isfinite(mean_loss):
            self.counters.round_steps += 1
            self.counters.round_loss += mean_loss
        return seconds

    def agree_to_stop(self) -> bool:
        """Whether any process was asked to stop, if only after the last step."""
        stops = add_up(torch.tensor(float(self.wants_stop)))
        self.is_stopping = bool(stops > 0)
        return self.is_stopping

    def _count_time(self, *others: float) -> list[float]:
        """The first process's seconds since the last look, and sums over the processes."""
        now = time.monotonic()
        said = [now - self._looked_s if is_first() else 0.0, *others]
        self._looked_s = now
        summed: list[float] = add_up(torch.tensor(said, dtype=torch.float64)).tolist()
        self.counters.elapsed_s += summed[0]
        return summed


def make_learner(
    network: nn.Module,
    loss: MultiLevelLoss,
    device: torch.device,
    budget: Budget,
    config: OptimizerConfig,
    seed: int,
    precision: torch.dtype = torch.float32,
) -> Learner:
    """Optimiser, loss scaling of float16, and a moving average over a growing horizon.

    The modules of `network` stay in the modes in which they are: what is frozen is in eval mode.
    `config` becomes what `choose_optimizer` makes of it.
    """
    network.to(device)
    loss.to(device)
    if device.type == "cpu" and precision == torch.bfloat16:
        spare_thin_maps_(network)
    config = choose_optimizer(config, network)
    average = AveragedModel(network, multi_avg_fn=_average_function(config.ema, budget))
    optimizer = make_optimizer(network, config)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    return Learner(
        network, average, optimizer, scaler, loss, device, budget, config, seed, precision
    )


def _average_function(
    share: float, budget: Budget
) -> Callable[[Weights, Weights, Tensor | int], None]:
    """Exponential average over `share` of the training; over all steps so far while fewer."""

    @torch.no_grad()
    def update(averages: Weights, weights: Weights, num_averaged: Tensor | int) -> None:
        horizon = min(max(1.0, share * budget.num_steps), 1 + int(num_averaged) / 9)
        torch._foreach_lerp_(averages, weights, 1 / horizon)

    return update


def create_trainer(learner: Learner) -> Engine:
    """An engine whose step trains on one batch, finished by `Learner.finish`."""

    def step(engine: Engine, batch: Any) -> float:
        image, target = (part.to(learner.device) for part in learner.finish(batch))
        progress = learner.budget.progress(learner.counters.step)
        for group in learner.optimizer.param_groups:
            group["lr"] = learning_rate(learner.config, progress)
        learner.loss.progress = progress
        is_scaled = learner.scaler.is_enabled()
        buffers = [buffer.clone() for buffer in learner.network.buffers()] if is_scaled else []
        loss = compute_gradients(learner, image, target)
        if not is_scaled:
            _check_finite("loss", loss, learner)
        elif not math.isfinite(loss):
            # The scaler knows of gradients alone: statistics of batches would stay spoilt.
            for buffer, before in zip(learner.network.buffers(), buffers, strict=True):
                buffer.copy_(before)
        learner.scaler.unscale_(learner.optimizer)
        norm = nn.utils.clip_grad_norm_(learner.network.parameters(), learner.config.gradient_clip)
        if not is_scaled:
            _check_finite("gradient", norm.item(), learner)
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        if is_scaled:
            _check_scale(learner)
        learner.average.update_parameters(learner.network)
        return loss

    trainer = Engine(step)
    # The error itself reaches the user; ignite would announce it twice before.
    trainer.logger.setLevel(logging.CRITICAL)
    trainer.register_events(*TrainingEvents)
    return trainer


def _check_finite(what: str, value: float, learner: Learner) -> None:
    """Refuse a step before it spoils the weights.

    Raises:
        ConfigError: `value` is not finite.
    """
    if not math.isfinite(value):
        raise ConfigError(
            f"the {what} became {value} at step {learner.counters.step}; expected a finite "
            f"number. Lower optimizer.learning_rate. {_CURE}"
        )


def _check_scale(learner: Learner) -> None:
    """Refuse a training in float16 that has left out one step after the other.

    Now and then a loss or gradient exceeds float16; the scaler leaves the step out and halves.

    Raises:
        ConfigError: however small the loss was made, they were not finite.
    """
    if learner.scaler.get_scale() < SMALLEST_SCALE:
        raise ConfigError(
            f"loss or gradient were not finite in float16, again and again up to step "
            f"{learner.counters.step}; expected finite numbers. Set training.precision to "
            f"float32, or lower optimizer.learning_rate. {_CURE}"
        )


def run_to_end(trainer: Engine, batches: Batches) -> None:
    """Run until the budget is used up.

    Raises:
        MachineError: a loader process died, wherever the training was when torch heard of it.
    """
    try:
        # The budget ends the training; ignite only needs a length that is never reached.
        trainer.run(batches, max_epochs=1, epoch_length=2**62)
    except RuntimeError as error:
        refuse_dead_worker(error)
        raise


def compute_gradients(learner: Learner, image: Tensor, target: Tensor) -> float:
    """Forward and backward pass of a batch in ``counters.parts`` parts; returns the mean loss.

    Where memory runs out the batch is computed again in twice as many parts, and at last with
    feature maps that are computed twice; where the compiler fails, without it.

    Raises:
        MachineError: one sample alone does not fit into memory.
    """
    while True:
        # The step's number seeds dropout, so that a resumed training draws the same.
        torch.manual_seed(learner.seed * 1_000_003 + learner.counters.step + 7919 * get_rank())
        learner.optimizer.zero_grad(set_to_none=True)
        try:
            return _accumulate(learner, image, target)
        except Exception as error:
            if not is_out_of_memory(error):
                forward = learner.forward
                if isinstance(forward, CompiledNetwork) and forward.gives_up(error):
                    continue
                raise
            if not _can_save_memory(learner, len(image)):
                raise MachineError(_describe_lack(learner, image)) from error
        # Behind the handler, whose error keeps the feature maps alive.
        _save_memory(learner, len(image))


def _can_save_memory(learner: Learner, batch_size: int) -> bool:
    # Processes that compute in different ways would wait for each other for ever.
    if count_processes() > 1:
        return False
    return learner.counters.parts < batch_size or _can_recompute(learner)


def _can_recompute(learner: Learner) -> bool:
    return not learner.counters.is_recomputing and can_recompute(learner.network)


def _save_memory(learner: Learner, batch_size: int) -> None:
    counters = learner.counters
    if counters.parts < batch_size:
        counters.parts *= 2
        logger.warning("out of memory: batches are computed in %d parts", counters.parts)
    else:
        recompute_(learner.network)
        counters.is_recomputing = True
        if isinstance(learner.forward, CompiledNetwork):
            learner.forward.compile_again()
        logger.warning("out of memory: feature maps are computed twice instead of kept")
    if learner.device.type == "cuda":
        torch.cuda.empty_cache()


def _describe_lack(learner: Learner, image: Tensor) -> str:
    parts, cures = min(learner.counters.parts, len(image)), ["lower plan.patch or plan.width"]
    if parts < len(image):
        cures.append("raise training.parts")
    if _can_recompute(learner):
        cures.append("set training.recompute")
    return (
        f"{math.ceil(len(image) / parts)} patches of {list(image.shape[2:])} do not fit into the "
        f"memory of {learner.device} at once. To go on, {', or '.join(cures)}."
    )


def _accumulate(learner: Learner, image: Tensor, target: Tensor) -> float:
    total = 0.0
    parts = min(learner.counters.parts, len(image))
    for some, wanted in zip(image.tensor_split(parts), target.tensor_split(parts), strict=True):
        is_reduced = learner.precision != torch.float32
        with torch.autocast(learner.device.type, learner.precision, enabled=is_reduced):
            logits = learner.forward(some)
        loss = learner.loss(logits, wanted) * (len(some) / len(image))
        torch.autograd.backward(learner.scaler.scale(loss))
        total += loss.item()
    return total


def attach_counting(trainer: Engine, learner: Learner, num_rounds: int) -> None:
    """After each step: count it, correct the budget, fire rounds, stop at the end."""
    counters, budget = learner.counters, learner.budget

    def count(engine: Engine) -> None:
        progress = budget.progress(counters.step)
        seconds = learner.end_step(engine.state.output)
        if engine.state.iteration == 1:
            # What is compiled, tuned and started in it takes no time in any other.
            budget.leave_out_step(seconds)
        else:
            budget.add_step(seconds)
        if learner.is_stopping:
            engine.interrupt()
        # A rounding error below a millionth of a round must not delay it by a step.
        rounds = [
            math.floor(done * num_rounds + 1e-6)
            for done in (progress, budget.progress(counters.step))
        ]
        # Progress that follows a guess may fall back.
        is_round = rounds[0] < rounds[1] and not budget.is_guess
        is_corrected = budget.correct(counters.step, counters.elapsed_s)
        if learner.is_complete or is_round:
            engine.fire_event(TrainingEvents.ROUND_COMPLETED)
        if is_corrected:
            engine.fire_event(TrainingEvents.LENGTH_CORRECTED)
        if learner.is_complete:
            engine.terminate()

    trainer.add_event_handler(Events.STARTED, lambda: learner.start_clock())
    trainer.add_event_handler(Events.ITERATION_COMPLETED, count)


def attach_checkpoints(trainer: Engine, learner: Learner, checkpoints: Checkpoints) -> None:
    """Write ``checkpoint_last.pt`` every round, every few minutes, and when the engine stops.

    And when the length is corrected, so that no kill from then on changes where the training ends.
    Rounds that follow each other so quickly that writing would take much of the time go without.
    """
    if not is_first():
        return
    clock = {"saved": time.monotonic(), "took": 0.0}

    def save(engine: Engine) -> None:
        start = time.monotonic()
        checkpoints.save_last()
        clock["saved"] = time.monotonic()
        clock["took"] = clock["saved"] - start

    def save_round(engine: Engine) -> None:
        is_cheap = clock["took"] <= CHECKPOINT_SHARE * (time.monotonic() - clock["saved"])
        if is_cheap or learner.is_complete:
            save(engine)

    def save_if_due(engine: Engine) -> None:
        if time.monotonic() - clock["saved"] > CHECKPOINT_EVERY_S:
            save(engine)

    trainer.add_event_handler(TrainingEvents.ROUND_COMPLETED, save_round)
    trainer.add_event_handler(TrainingEvents.LENGTH_CORRECTED, save)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, save_if_due)
    trainer.add_event_handler(Events.INTERRUPT, save)


@contextmanager
def stop_on_interrupt(learner: Learner) -> Iterator[None]:
    """Ctrl-C ends the training after the step in flight; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signal_number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logger.warning("stopping after this step; Ctrl-C again stops at once")
        learner.wants_stop = True

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
