"""Prepared cases on disk, read through memory maps by the loader.

One folder per case: ``image.npy`` (C, *S) float16, ``label.npy`` (*S), ``foreground.npy``,
``case.json``, and ``annotated.npy`` where voxels may be ignored. Its name carries a key over the
content of the files and the preparing part of the plan, so an entry can be reused but never be
stale; it appears whole or not at all. ``digests.json`` beside them remembers the content of files
that have not changed (`volseg.data.digests`).
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from volseg.atomic import atomic_folder, remove_temporary
from volseg.cores import count_cores, count_readers
from volseg.data.cases import Case, Dataset
from volseg.data.digests import Digests
from volseg.data.foreground import FOREGROUND_VOXELS, draw_parts, draw_voxels
from volseg.data.mapping import PlaceInFile
from volseg.data.preprocessing import prepare
from volseg.data.reading import read_case
from volseg.data.resampling import resampled_shape
from volseg.errors import DataError, MachineError
from volseg.images import read_header
from volseg.planning.fingerprint import CaseFingerprint, measuring_bytes
from volseg.planning.machine import count_holders
from volseg.planning.plan import Plan

FORMAT = 3
"""Raised when what an entry holds changes, so that older entries are made again."""
_ENTRY = re.compile(r"(?P<case>.+)-[0-9a-f]{16}")
"""Name of an entry: the case's id, and what of its files and its preparation is in it."""
_ABANDONED_S = 24 * 3600
"""No case takes so long; what is older was left by a process that was killed."""
_WORKING_SHARE = 12
"""Memory that preparing a case takes, about, as a multiple of its entry."""
_HEADER_BYTES = 500
"""Of an entry: what its files hold besides arrays."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedCase:
    """A prepared case, whose arrays are mapped when they are asked for.

    Attributes:
        folder: the entry.
        case_id: of the case.
        foreground_counts: stored positions of each foreground class.
        is_partly_annotated: whether voxels of the case may be ignored.
        absent: numbers of the channels that the case lacks.
    """

    folder: Path
    case_id: str
    foreground_counts: tuple[int, ...]
    is_partly_annotated: bool = False
    absent: tuple[int, ...] = ()
    _places: dict[str, PlaceInFile] = field(default_factory=dict, repr=False, compare=False)

    @property
    def image(self) -> NDArray[np.float16]:
        """(C, *S), normalised, at the plan's spacing."""
        return self._map("image")

    @property
    def label(self) -> NDArray[np.uint8]:
        """(*S) label indices; see `volseg.data.cases.Classes`."""
        return self._map("label")

    def positions(self, index: int) -> NDArray[np.int32]:
        """(n, spatial_dims) voxels to centre patches on, of the class with this index, from 1."""
        end = sum(self.foreground_counts[:index])
        return self._map("foreground")[end - self.foreground_counts[index - 1] : end]

    @property
    def annotated(self) -> NDArray[np.int32] | None:
        """(n, spatial_dims) positions of voxels that are not ignored; None if none is ignored."""
        return self._map("annotated") if self.is_partly_annotated else None

    def _map(self, name: str) -> NDArray[Any]:
        if name not in self._places:
            self._places[name] = PlaceInFile(self.folder / f"{name}.npy")
        return self._places[name].map()


def build_cache(
    dataset: Dataset,
    cases: Sequence[Case],
    plan: Plan,
    folder: Path,
    on_case: Callable[[int, int], None] | None = None,
    measured: Sequence[CaseFingerprint] = (),
) -> list[CachedCase]:
    """Prepare every case that the cache does not hold yet, then open all.

    Args:
        dataset: channels and classes.
        cases: labelled cases of it.
        plan: spacing and normalisation.
        folder: of the cache.
        on_case: called with (cases done, cases in all).
        measured: rows of the fingerprint, from which the size of the cache follows.

    Raises:
        DataError: a case cannot be read; those already prepared stay.
        MachineError: the disk has no room for the cache, and nothing was written; or it became
            full meanwhile.
    """
    cached = []
    digests = Digests(folder / "digests.json")
    with ThreadPoolExecutor(count_readers()) as pool:
        keys = [*pool.map(partial(_key, digests, dataset, plan=plan), cases)]
    entries = [folder / f"{case.case_id}-{key}" for case, key in zip(cases, keys, strict=True)]
    remove_temporary(folder, older_than_s=_ABANDONED_S)
    new = [case for case, entry in zip(cases, entries, strict=True) if not entry.is_dir()]
    rows = {row.case_id: row for row in measured}
    sizes = [predict_bytes(dataset, case, plan, rows.get(case.case_id)) for case in new]
    _check_room(folder, sizes)
    digests.save()
    with ThreadPoolExecutor(_count_workers(dataset, new, sizes, rows)) as pool:
        futures = [
            pool.submit(_cache_case, dataset, case, plan, entry)
            for case, entry in zip(cases, entries, strict=True)
        ]
        try:
            for done, future in enumerate(futures, start=1):
                cached.append(open_case(future.result()))
                if on_case:
                    on_case(done, len(futures))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return cached


def remove_superseded(folder: Path, cases: Sequence[CachedCase]) -> None:
    """Remove entries of these cases that were made of other files or by another plan.

    Another training that began with them may still be reading them, as far as the cache knows.

    Args:
        folder: of the cache.
        cases: as `build_cache` gives them.
    """
    case_ids = {case.case_id for case in cases}
    known = {case.folder.name for case in cases}
    for other in folder.iterdir():
        is_entry = _ENTRY.fullmatch(other.name)
        if is_entry and is_entry["case"] in case_ids and other.name not in known:
            shutil.rmtree(other, ignore_errors=True)


def open_case(folder: Path) -> CachedCase:
    """Take up one entry."""
    facts = json.loads((folder / "case.json").read_text())
    is_partly_annotated = (folder / "annotated.npy").exists()
    counts = tuple(facts["foreground_counts"])
    return CachedCase(folder, facts["case_id"], counts, is_partly_annotated, tuple(facts["absent"]))


def predict_bytes(
    dataset: Dataset, case: Case, plan: Plan, measured: CaseFingerprint | None = None
) -> int:
    """Size that the entry of a case will have, from its grid.

    Args:
        dataset: channels and classes.
        case: of it.
        plan: spacing.
        measured: its row of the fingerprint. Without it the header of its first file says the
            grid, which is taken whole though it may be cropped, and classes are taken as large.

    Raises:
        DataError: the header cannot be read.
    """
    classes = dataset.classes
    if measured is None:
        geometry = read_header(case.files[0])[0]
        # A view without voxels of its own, only to learn the canonical grid.
        nothing = np.broadcast_to(np.uint8(0), geometry.shape)
        grid = geometry.to_canonical(nothing)[1]
        shape, spacing_mm = grid.shape, grid.spacing_mm
        counts: Sequence[int] = (FOREGROUND_VOXELS,) * (classes.num_classes - 1)
        ignored = 0
    else:
        shape, spacing_mm = measured.shape, measured.spacing_mm
        counts = measured.class_voxels[1:]
        ignored = math.prod(measured.full_shape) - sum(measured.class_voxels)
    prepared = resampled_shape(shape, spacing_mm, plan.target_spacing(spacing_mm))
    voxels = math.prod(prepared)
    zoom = voxels / math.prod(shape)
    positions = sum(min(FOREGROUND_VOXELS, count * zoom) for count in counts)
    if classes.ignore is not None:
        positions += min(FOREGROUND_VOXELS, max(0, voxels - ignored * zoom))
    bytes_per_voxel = 2 * len(dataset.channels) + (1 if classes.num_indices <= 256 else 2)
    return round(voxels * bytes_per_voxel + positions * 4 * len(shape)) + _HEADER_BYTES


def _count_workers(
    dataset: Dataset,
    cases: Sequence[Case],
    sizes: Sequence[int],
    rows: Mapping[str, CaseFingerprint],
) -> int:
    """Threads that prepare: resampling takes cores of its own, and more memory than reading."""
    number = len(dataset.channels)
    bytes_each = [
        max(measuring_bytes(number, case, rows.get(case.case_id)), _WORKING_SHARE * size)
        for case, size in zip(cases, sizes, strict=True)
    ]
    holders = count_holders(max(bytes_each, default=0))
    return min(count_readers(), max(1, count_cores() // 2), holders)


def _check_room(folder: Path, sizes: Sequence[int]) -> None:
    """Say how large the new entries will be together, and refuse a disk without room."""
    if not sizes:
        return
    needed = sum(sizes)
    logger.info("cache: about %s for %d cases -> %s", _in_gb(needed), len(sizes), folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise MachineError(
            f"{folder}: {_in_gb(free)} free; expected {_in_gb(needed)} for the cache of "
            f"{len(sizes)} cases. Free some space, or choose a run folder on another disk (-o)."
        )


def _in_gb(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def _cache_case(dataset: Dataset, case: Case, plan: Plan, entry: Path) -> Path:
    """Prepare one case unless its entry is there; returns the entry."""
    if entry.is_dir():
        return entry
    image, label = read_case(case, dataset.channels, dataset.classes)
    if label is None:
        raise DataError(f"case {case.case_id} has no label; expected one for training.")
    classes = dataset.classes
    prepared = prepare(image, plan, label, classes.num_indices)
    indices = np.asarray(prepared.label)
    rng = np.random.default_rng(0)
    positions = [draw_parts(rng, indices == i) for i in range(1, classes.num_classes)]
    with atomic_folder(entry) as temporary:
        np.save(temporary / "image.npy", prepared.image.to(torch.float16).numpy())
        np.save(temporary / "label.npy", indices)
        np.save(temporary / "foreground.npy", np.concatenate(positions))
        if classes.ignore is not None:
            # The first index behind the classes: nothing is known.
            annotated = draw_voxels(rng, indices != classes.num_classes)
            np.save(temporary / "annotated.npy", annotated)
        facts = {
            "case_id": case.case_id,
            "foreground_counts": [len(p) for p in positions],
            "absent": image.absent,
        }
        (temporary / "case.json").write_text(json.dumps(facts))
    return entry


def _key(digests: Digests, dataset: Dataset, case: Case, plan: Plan) -> str:
    recipe = {
        "format": FORMAT,
        "plan": plan.preparation,
        "classes": dataset.classes.known_values,
        "candidates": dataset.classes.candidates,
        "annotated": case.annotated,
        "channels": dataset.channels,
    }
    if len(case.files) < len(case.images):
        recipe["absent"] = [number for number, path in enumerate(case.images) if path is None]
    digest = hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=8)
    for path in (*case.files, case.label):
        if path is not None:
            for file in _files_of(path):
                digest.update(digests.find(file))
    return digest.hexdigest()


def _files_of(path: Path) -> list[Path]:
    """The file, and all that may belong to it where a format keeps header and voxels apart.

    Wider than `volseg.images.list_stored`, since one file too many costs a preparation and no more.
    """
    if path.suffix.lower() not in (".hdr", ".img", ".mhd", ".nhdr"):
        return [path]
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}.*"))
