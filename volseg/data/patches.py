"""Training patches: which case and place, cut from the cache, changed, stacked into batches.

Patches are changed by the loader for a training on a CPU, and on the GPU itself for one there.

Sample ``i`` of step ``t`` depends only on ``(seed, t, i)``: no generator state is carried along,
so loader processes cannot disagree and a resumed training sees what it would have seen.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from volseg.data.augmentation import Augmentation, Cut
from volseg.data.cache import CachedCase
from volseg.data.foreground import choose_shares
from volseg.data.spatial import find_region, keep_inside
from volseg.errors import ConfigError, DataError, MachineError, is_dead_worker, is_out_of_memory


class PatchDataset(Dataset[Cut]):
    """What patches are made of: ``patches[t * batch_size + i]`` is sample i of step t.

    Args:
        cases: at least one.
        patch: voxels per axis; volumes that are smaller are padded with zeros around.
        batch_size: samples per step.
        foreground: share of the samples that are centred on a foreground voxel, where rare classes
            and small parts have their share; see `volseg.data.foreground`.
        augment: draws the changes of each patch.
        seed: of everything random.
        classes: indices of those that patches are centred on; all by default.
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        patch: Sequence[int],
        *,
        batch_size: int,
        foreground: float,
        augment: Augmentation,
        seed: int,
        classes: Collection[int] | None = None,
    ) -> None:
        if not cases:
            raise ConfigError("no case to train on; expected at least one. Check the split.")
        self.cases, self.patch = list(cases), tuple(patch)
        self.batch_size, self.augment, self.seed = batch_size, augment, seed
        self.num_centred = batch_size * foreground
        self.holders = _find_holders(self.cases, classes)
        shares = choose_shares([cases for _, cases in self.holders], len(self.cases))
        self.bounds = np.cumsum(shares)[:-1]

    def __getitem__(self, number: int) -> Cut:
        """A region of a case in the types of the cache, and what becomes of it.

        Raises:
            DataError: the prepared case cannot be read; names it.
        """
        step, i = divmod(number, self.batch_size)
        rng = np.random.default_rng((self.seed, step, i))
        # Each batch has the whole part of its centred samples, and one more by chance.
        is_centred = rng.random() < self.num_centred - i
        index, centred = self._choose(number, rng, is_centred)
        case = self.cases[index]
        try:
            return self._cut(index, centred, rng)
        except Exception as error:  # Whatever it is, the case must be known.
            if is_out_of_memory(error):
                raise
            raise DataError(
                f"case {case.case_id}: no patch could be cut from {case.folder} "
                f"({type(error).__name__}: {error}). Remove that folder to prepare the case anew."
            ) from error

    def _choose(
        self, number: int, rng: np.random.Generator, is_centred: bool
    ) -> tuple[int, int | None]:
        """The case, and the class on which the sample is centred."""
        index = self._case_index(number)
        if not (is_centred and self.holders):
            return index, None
        place = int(np.searchsorted(self.bounds, rng.random(), side="right"))
        chosen, cases = self.holders[place]
        # A case without the class makes room for one that has it.
        return (index if index in cases else cases[rng.integers(len(cases))]), chosen

    def _cut(self, index: int, centred: int | None, rng: np.random.Generator) -> Cut:
        case = self.cases[index]
        image, label = case.image, case.label
        # Of a partly annotated case, anywhere else might hold nothing to learn from.
        voxels = case.annotated if centred is None else case.positions(centred)
        voxel = None
        if voxels is not None and len(voxels):
            voxel = voxels[rng.integers(len(voxels))]
            start = _centred_start(voxel, label.shape, self.patch)
        else:
            start = _random_start(rng, label.shape, self.patch)
        changes = self.augment.draw(rng, image.shape[0])
        first, shape = start, self.patch
        middle = np.add(start, (np.asarray(self.patch) - 1) / 2)
        if (matrix := changes.matrix) is not None:
            if voxel is not None:
                middle = keep_inside(matrix, middle, self.patch, voxel)
            first, shape = find_region(matrix, middle, start, self.patch, label.shape)
        centre = tuple((middle - first).tolist())
        region, labels = (torch.from_numpy(cut(array, first, shape)) for array in (image, label))
        return Cut(region, labels, centre, self.patch, changes, case.case_id, case.absent)

    def _case_index(self, number: int) -> int:
        """Every case once per round, in a new order each round."""
        round_number, position = divmod(number, len(self.cases))
        return int(_permutation(self.seed, round_number, len(self.cases))[position])


def _find_holders(
    cases: Sequence[CachedCase], classes: Collection[int] | None
) -> list[tuple[int, list[int]]]:
    """Indices of the classes that any case has, each with the numbers of the cases."""
    holders: dict[int, list[int]] = {}
    for number, case in enumerate(cases):
        for index, count in enumerate(case.foreground_counts, start=1):
            if count and (classes is None or index in classes):
                holders.setdefault(index, []).append(number)
    return sorted(holders.items())


@lru_cache(maxsize=4)
def _permutation(seed: int, round_number: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, round_number)).permutation(length)


def _random_start(
    rng: np.random.Generator, shape: Sequence[int], patch: Sequence[int]
) -> tuple[int, ...]:
    """Anywhere inside the volume; centred along axes that the patch covers."""
    return tuple(
        int(rng.integers(n - p + 1)) if n > p else (n - p) // 2
        for n, p in zip(shape, patch, strict=True)
    )


def _centred_start(
    voxel: NDArray[np.int32], shape: Sequence[int], patch: Sequence[int]
) -> tuple[int, ...]:
    """Around `voxel`, moved inside the volume; centred along axes that the patch covers."""
    return tuple(
        min(max(int(v) - p // 2, 0), n - p) if n > p else (n - p) // 2
        for v, n, p in zip(voxel, shape, patch, strict=True)
    )


def cut(
    array: NDArray[np.generic], start: Sequence[int], patch: Sequence[int]
) -> NDArray[np.generic]:
    """Copy a patch from the last axes of `array`; what lies outside is zero."""
    lead, shape = array.ndim - len(patch), array.shape[array.ndim - len(patch) :]
    if all(a >= 0 and a + p <= n for a, p, n in zip(start, patch, shape, strict=True)):
        inside = tuple(slice(a, a + p) for a, p in zip(start, patch, strict=True))
        return array[(slice(None),) * lead + inside].copy()
    result = np.zeros((*array.shape[:lead], *patch), dtype=array.dtype)
    source, target = [slice(None)] * lead, [slice(None)] * lead
    for a, p, n in zip(start, patch, shape, strict=True):
        low, high = max(a, 0), min(a + p, n)
        source.append(slice(low, high))
        target.append(slice(low - a, high - a))
    result[tuple(target)] = array[tuple(source)]
    return result


class _StepSampler(Sampler[list[int]]):
    """Running numbers of the samples of each step, from `first_step` on, without end."""

    def __init__(self, first_step: int, batch_size: int, share: tuple[int, int]) -> None:
        self.first_step, self.batch_size, self.share = first_step, batch_size, share

    def __iter__(self) -> Iterator[list[int]]:
        step, (part, parts) = self.first_step, self.share
        while True:
            yield [step * self.batch_size + i for i in range(part, self.batch_size, parts)]
            step += 1


class Batches:
    """What a loader gives, without end; an error in one of its processes reaches the caller.

    Attributes:
        finish: makes of it images (B, C, *P) float32 and labels (B, *P) int64.
    """

    def __init__(
        self, loader: Iterable[Any], finish: Callable[[Any], tuple[Tensor, Tensor]] = tuple
    ) -> None:
        """Keep both."""
        self.loader, self.finish = loader, finish

    def __iter__(self) -> Iterator[Any]:
        """Give what is to be finished: apart from it, since it is no waiting for the loader.

        Raises:
            DataError: a patch could not be made; one line that names the case.
            MachineError: a loader process died.
        """
        try:
            yield from self.loader
        except DataError as error:
            # A loader process sends the whole traceback as the message.
            raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error
        except (ConnectionError, EOFError) as error:
            # A process ended while it handed over a batch. torch tells of it a moment later, by an
            # error wherever the main thread is then.
            with suppress(RuntimeError):
                time.sleep(1)
            raise _describe_death(str(error) or type(error).__name__) from error
        except RuntimeError as error:
            refuse_dead_worker(error)
            raise


def refuse_dead_worker(error: BaseException) -> None:
    """Say what to do where `error` is that a loader process died.

    Raises:
        MachineError: it is.
    """
    if is_dead_worker(error):
        raise _describe_death(str(error).strip().rpartition("\n")[2]) from error


def _describe_death(reason: str) -> MachineError:
    return MachineError(
        f"a loader process ended ({reason}); most likely it was killed for its memory. Use "
        "fewer of them: --set training.workers=0 prepares patches in the training process."
    )


def _leave_interrupts(worker: int) -> None:
    """Leave Ctrl-C, which reaches all processes of a terminal, to the training process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(
    patches: PatchDataset,
    first_step: int,
    workers: int,
    device: torch.device,
    share: tuple[int, int] = (0, 1),
) -> Batches:
    """Batches of steps `first_step`, `first_step` + 1, ...

    Args:
        patches: the samples.
        first_step: 0, or where a resumed training goes on.
        workers: loader processes; 0 prepares patches in the training process.
        device: of the training. A GPU changes the patches itself, and batches lie there.
        share: number of this process and of all, each of which takes every so-manieth sample.
    """
    is_gpu = device.type == "cuda"
    loader = DataLoader(
        patches,
        batch_sampler=_StepSampler(first_step, patches.batch_size, share),
        num_workers=workers,
        collate_fn=list if is_gpu else patches.augment,
        pin_memory=is_gpu,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_interrupts,
    )
    return Batches(loader, partial(patches.augment, device=device)) if is_gpu else Batches(loader)
