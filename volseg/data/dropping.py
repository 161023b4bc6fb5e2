"""Channels that are taken away from training patches, so that a network learns to do without.

A channel that a case lacks is zero in its prepared image, and stays so whatever is done to the
patch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np


def choose_dropped(
    present: Collection[int], optional: Sequence[int], probability: float, seed: int
) -> list[int]:
    """Channels to drop; one at least of those that are `present` is left.

    The same for the same seed, and for a channel whatever the others are, but where all would be
    dropped.
    """
    # The second value tells this draw from that of the noise, which has the same seed.
    chances = np.random.default_rng((seed, 2)).random(len(optional))
    drawn = {c: chance for c, chance in zip(optional, chances, strict=True) if c in present}
    dropped = [channel for channel, chance in drawn.items() if chance < probability]
    if dropped and len(dropped) == len(present):
        dropped.remove(max(dropped, key=lambda channel: drawn[channel]))
    return dropped
