"""Channels that are taken away from training patches, so that a network learns to do without.

A channel that a case lacks is zero in its prepared image, and stays so whatever is done to the
patch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from volseg.data.patches import Augment


@dataclass(frozen=True)
class ChannelDropping:
    """Callable on a patch, around the other random changes.

    Attributes:
        augment: these other changes.
        optional: numbers of the channels that a case may lack.
        probability: of each of them to be dropped, if the patch has it.
    """

    augment: Augment
    optional: Sequence[int]
    probability: float

    def __call__(self, image: Tensor, label: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Change the patch ``(C, *P)``; the same `seed` makes the same change."""
        absent = [channel for channel in self.optional if not image[channel].any()]
        present = set(range(len(image))) - set(absent)
        dropped = choose_dropped(present, self.optional, self.probability, seed)
        image, label = self.augment(image, label, seed)
        # Noise has been added to what is not there.
        image = image.clone()
        image[[*absent, *dropped]] = 0
        return image, label


def choose_dropped(
    present: Collection[int], optional: Sequence[int], probability: float, seed: int
) -> list[int]:
    """Channels to drop; one at least of those that are `present` is left.

    The same for the same seed, and for a channel whatever the others are, but where all would be
    dropped.
    """
    # The second value tells this draw from that of mirroring, which has the same seed.
    chances = np.random.default_rng((seed, 2)).random(len(optional))
    drawn = {c: chance for c, chance in zip(optional, chances, strict=True) if c in present}
    dropped = [channel for channel, chance in drawn.items() if chance < probability]
    if dropped and len(dropped) == len(present):
        dropped.remove(max(dropped, key=lambda channel: drawn[channel]))
    return dropped
