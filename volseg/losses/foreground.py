"""What losses share that compare probabilities of the foreground with a reference."""

from __future__ import annotations

import torch
from torch import nn

from volseg.errors import check_choice
from volseg.losses.targets import Activation, compare_foreground


class ForegroundLoss(nn.Module):
    """Turns logits and target into probabilities and shares of what is looked for.

    A loss is its `compare`. The background is looked for under neither activation.
    """

    def __init__(self, activation: Activation = "softmax") -> None:
        """Keep how logits become probabilities.

        Args:
            activation: ``"softmax"`` for classes that exclude each other, of which the background
                is left out; ``"sigmoid"`` for channels that do not.

        Raises:
            ConfigError: an unknown activation.
        """
        super().__init__()
        check_choice("activation", activation, ("softmax", "sigmoid"))
        self.activation = activation

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compare logits with the reference.

        Args:
            logits: (B, K, *S).
            target: (B, *S) or (B, 1, *S), integer class indices; or (B, K, *S), shares in [0, 1].
                A loss that needs to know inside from outside takes shares above 0.5 as inside.

        Returns:
            A scalar.

        Raises:
            ConfigError: shapes that do not belong together.
        """
        return self.compare(*compare_foreground(logits, target, self.activation))

    def compare(self, probabilities: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """The formula of the loss: a scalar of two of (B, channels, *S)."""
        raise NotImplementedError
