"""In which number format the network is computed, and whether it is compiled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from volseg.errors import MachineError, VolsegError, is_dead_worker
from volseg.inference.precision import choose_fastest, choose_half, has_fast_bfloat16
from volseg.training.parallel import count_processes

logger = logging.getLogger(__name__)

PrecisionName = Literal["auto", "float32", "bfloat16", "float16"]
_CURE = (
    "Set it to auto, or to resume what began on another machine, in the config*.yaml of the fold."
)


def choose_precision(name: PrecisionName, device: torch.device) -> torch.dtype:
    """The format of convolutions and the like; weights and losses are float32 in any case.

    ``auto`` takes 16 bits where the hardware gains by it: on a GPU, and on a CPU with AMX or the
    bfloat16 instructions of AVX-512. Other CPUs would compute bfloat16 many times slower than
    float32, and never do.

    Args:
        name: what the user asks for.
        device: of the training.

    Raises:
        MachineError: the device has no instructions for the format.
    """
    if name == "auto":
        return choose_fastest(device)
    if reason := _find_obstacle(name, device):
        raise MachineError(f"training.precision {name}{reason}. {_CURE}")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _find_obstacle(name: PrecisionName, device: torch.device) -> str:
    """What of the device is against a format, and what it should have; empty if nothing is."""
    if name == "float16" and device.type != "cuda":
        place = "a CPU" if device.type == "cpu" else device.type
        return f" on {place}; expected a CUDA GPU"
    if name == "bfloat16" and device.type == "cuda" and choose_half(device) != torch.bfloat16:
        return f": {torch.cuda.get_device_name(device)} has no bfloat16; expected a GPU that has"
    if name == "bfloat16" and device.type == "cpu" and not has_fast_bfloat16():
        return (
            " on a CPU without instructions for it, which is many times slower than float32; "
            "expected AMX or the bfloat16 instructions of AVX-512"
        )
    return ""


def spare_thin_maps_(network: nn.Module) -> None:
    """Have convolutions compute maps in float32 that are thinner than their kernel.

    For trainings in bfloat16 on a CPU. There the gradient of the weights of a 3D convolution reads
    and writes memory that is not its own (oneDNN of torch 2.13, on processors with AVX-512), where
    the map is thinner along its first axis than the kernel and thicker than 1, or at most half as
    thick as the kernel along its second axis. The result is any number, a different one each time,
    or the end of the process.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)) and max(module.kernel_size[:2]) > 2:
            module.forward = partial(  # type: ignore[method-assign]
                _spare_thin_map, module.forward, module.kernel_size
            )


def _spare_thin_map(
    forward: Callable[..., Tensor], kernel_size: Sequence[int], input: Tensor, *others: Any
) -> Tensor:
    first, second = input.shape[-3:-1]
    if not (1 < first < kernel_size[0] or second <= kernel_size[1] // 2):
        return forward(input, *others)
    with torch.autocast(input.device.type, enabled=False):
        return forward(input.float(), *others)


class CompiledNetwork:
    """The network compiled by torch; as it is once that has failed. The weights stay its own."""

    def __init__(self, network: Callable[[Tensor], Any]) -> None:
        self.network = network
        self._forward = torch.compile(network)

    def compile_again(self) -> None:
        """After the network was changed."""
        if self._forward is not self.network:
            torch.compiler.reset()
            self._forward = torch.compile(self.network)

    def __call__(self, image: Tensor) -> Any:
        """Compiled at the first call, and the backward pass at the first of those."""
        return self._forward(image)

    def gives_up(self, error: Exception) -> bool:
        """Whether the same is worth another try without the compiler, which is left from now on.

        What a compiler lacks depends on the machine; the network itself may be fine.

        Raises:
            MachineError: other processes would go on with the compiler.
        """
        is_other = isinstance(error, VolsegError) or is_dead_worker(error)
        if self._forward is self.network or is_other:
            return False
        reason = str(error).partition("\n")[0] or type(error).__name__
        if count_processes() > 1:
            # The others would wait for what this one computes in another way.
            raise MachineError(
                f"torch.compile failed in one of several processes ({reason}); expected it to work "
                "in all. Set training.compile=false."
            ) from error
        logger.warning("torch.compile failed (%s); the training goes on without it", reason)
        self._forward = self.network
        return True
