"""In which number format the network is computed, and whether it is compiled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch

from volseg.errors import MachineError

logger = logging.getLogger(__name__)

PrecisionName = Literal["auto", "float32", "bfloat16", "float16"]


def choose_precision(name: PrecisionName, device: torch.device) -> torch.dtype:
    """The format of convolutions and the like; weights and losses are float32 in any case.

    ``auto`` takes 16 bits where the hardware gains by it: on a GPU, and on a CPU with AMX or the
    bfloat16 instructions of AVX-512. Other CPUs compute bfloat16 many times slower than float32.

    Args:
        name: what the user asks for.
        device: of the training.

    Raises:
        MachineError: float16 on a CPU, or bfloat16 on a GPU that has not got it.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.bfloat16 if _has_fast_bfloat16() else torch.float32
    if name == "float16" and device.type != "cuda":
        raise MachineError("training.precision float16 on a CPU; expected float32 or auto.")
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise MachineError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16; expected float16 or auto."
        )
    if name == "bfloat16" and device.type == "cpu" and not _has_fast_bfloat16():
        logger.warning("this CPU has no instructions for bfloat16: float32 is many times faster")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _has_fast_bfloat16() -> bool:
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def compile_network(network: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    """The network compiled by torch; as it is from the first call on which that fails.

    The weights stay those of `network`.
    """
    compiled = torch.compile(network)
    state = {"forward": compiled}

    def forward(image: torch.Tensor) -> Any:
        try:
            return state["forward"](image)
        except Exception as error:
            if state["forward"] is network or is_out_of_memory(error):
                raise
            # What a compiler lacks depends on the machine; the network itself may be fine.
            reason = str(error).partition("\n")[0] or type(error).__name__
            logger.warning("torch.compile failed (%s); the training goes on without it", reason)
            state["forward"] = network
            return network(image)

    return forward


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
