"""Muon: steps of equal size in every direction that a convolution's weights can take.

The momentum of a weight, read as a matrix (outputs, inputs x kernel), is replaced by the nearest
orthogonal matrix, so that rare directions move as far as frequent ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz step, steepest at zero (Jordan 2024)."""
STEPS = 5
ADAM_SIZE = 0.2
"""Root mean square of a step of AdamW at learning rate 1, which a matrix step is scaled to."""


class Muon(torch.optim.AdamW):
    """Muon for weights of convolutions, AdamW for norms, biases and whatever is a vector.

    Source: Jordan and others 2024, https://kellerjordan.github.io/posts/muon; scaled to the size of
    AdamW's steps as in Liu and others 2025, doi:10.48550/arXiv.2502.16982, so that one learning
    rate serves both. Differs in that the iteration runs on the Gram matrix, which for wide kernels
    costs a fraction, and in float32.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        """Sort the parameters; those with two axes or more take Muon's steps, and decay."""
        parameters = list(parameters)
        matrices = [parameter for parameter in parameters if parameter.dim() > 1]
        others = [parameter for parameter in parameters if parameter.dim() <= 1]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "momentum": momentum},
            {"params": others, "momentum": None, "weight_decay": 0.0},
        ]
        super().__init__([g for g in groups if g["params"]], lr=lr, weight_decay=weight_decay)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a saved state; AdamW would look for its own entries in that of the matrices."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved: list[tuple[nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            if group["momentum"] is not None:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._matrix_step(parameter, parameter.grad, group)
                        moved.append((parameter, parameter.grad))
        # AdamW leaves alone what has no gradient.
        for parameter, _ in moved:
            parameter.grad = None
        super().step()
        for parameter, gradient in moved:
            parameter.grad = gradient
        return loss

    def _matrix_step(
        self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]
    ) -> None:
        state, momentum = self.state[parameter], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        matrix = gradient.lerp(buffer, momentum).flatten(1)
        size = ADAM_SIZE * max(matrix.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonalise(matrix).view_as(parameter), alpha=-group["lr"] * size)


def orthogonalise(matrix: Tensor) -> Tensor:
    """The matrix with singular values moved near 1 (0.7 to 1.2); those near zero stay small.

    Args:
        matrix: (M, N), float32.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalise(matrix.T).T
    matrix = matrix / (matrix.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    gram = matrix @ matrix.T
    identity = torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    product = identity
    # Each step multiplies the matrix by a polynomial of its Gram matrix, with which it commutes.
    for _ in range(STEPS):
        factor = a * identity + b * gram + c * (gram @ gram)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ matrix
