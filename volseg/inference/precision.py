"""In which number format a device computes best."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

PrecisionName = Literal["auto", "float32"]
"""Of a prediction: 16 bits where the hardware gains by them, or never."""

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def choose_fastest(device: torch.device) -> torch.dtype:
    """The format of convolutions and the like that a device computes fastest.

    16 bits on a GPU, and on a CPU with AMX or the bfloat16 instructions of AVX-512. Other CPUs
    compute bfloat16 many times slower than float32.
    """
    if device.type == "cuda":
        return choose_half(device)
    is_faster = device.type == "cpu" and has_fast_bfloat16()
    return torch.bfloat16 if is_faster else torch.float32


def choose_half(device: torch.device) -> torch.dtype:
    """16 bits for the arithmetic of a GPU: with the range of float32 where it has them.

    What a network computes in bfloat16 may be too large for float16. GPUs that would only emulate
    bfloat16 do not have it.
    """
    with torch.cuda.device(device):
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def has_fast_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16; others emulate it, many times slower."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def round_weights_(network: nn.Module, precision: torch.dtype) -> None:
    """Keep the weights of convolutions in the 16 bits that they are computed in, and no other.

    Under `torch.autocast`, without which the network computes no more, the result is the same:
    autocast would round them for every window.

    Args:
        network: changed in place; of volseg's own. Other code may read a weight for itself.
        precision: of convolutions; float32 leaves the network alone.
    """
    for module in network.modules():
        # What is derived from them may do other arithmetic with its weights.
        is_plain = type(module) in _CONVOLUTIONS
        if precision != torch.float32 and is_plain and module.weight.dtype == torch.float32:
            module.to(precision)
