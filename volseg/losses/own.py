"""A loss of the user's own, given what volseg's are given."""

from __future__ import annotations

import torch
from torch import nn

from volseg.errors import ConfigError, is_dead_worker, is_out_of_memory
from volseg.losses.targets import with_channel_axis


class OwnLoss(nn.Module):
    """Any module that compares logits with a target and gives a scalar.

    Attributes:
        loss: the module.
    """

    def __init__(self, loss: nn.Module) -> None:
        """Wrap a module."""
        super().__init__()
        self.loss = loss

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compare logits with the reference.

        Args:
            logits: (B, K, *S); the module gets them in single precision or more.
            target: (B, *S) or (B, 1, *S), integer, which the module gets as (B, 1, *S); or floating
                shares (B, K, *S), as they are.

        Returns:
            A scalar.

        Raises:
            ConfigError: the module fails, or gives something else.
        """
        wide = logits.float() if logits.dtype.itemsize < 4 else logits
        wanted = with_channel_axis(target, logits.dim())
        try:
            loss = self.loss(wide, wanted)
        except Exception as error:  # Code of others fails in its own ways.
            if is_out_of_memory(error) or is_dead_worker(error):
                raise
            raise ConfigError(
                f"{type(self.loss).__name__} fails with logits {tuple(wide.shape)} and a target "
                f"{tuple(wanted.shape)} of {wanted.dtype} ({type(error).__name__}: {error}). Mend "
                "that loss; --debug shows where."
            ) from error
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            what = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ConfigError(
                f"{type(self.loss).__name__} gives {what}; expected one number, a tensor."
            )
        return loss.reshape(())
