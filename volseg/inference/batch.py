"""Many cases to one folder of label maps: a bad case is reported, the others go on.

While the network works on a case, the next one is read and the one before is written, unless memory
is short.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from volseg._version import __version__
from volseg.atomic import remove_temporary
from volseg.config import Record
from volseg.data.cases import Case
from volseg.data.preprocessing import Prepared
from volseg.data.splits import FOLDS_FILE
from volseg.errors import (
    ConfigError,
    DataError,
    FullDiskError,
    MachineError,
    is_out_of_gpu_memory,
    is_out_of_memory,
)
from volseg.extensions import register
from volseg.images import DICOM, SEGMENTS, check_label_suffix, is_picture, list_stored
from volseg.inference.backends import BackendName
from volseg.inference.options import Options
from volseg.inference.predictor import Locator, Predictor, Segmentation
from volseg.inference.uncertainty import UncertaintyName

logger = logging.getLogger(__name__)

_LEFT_BEHIND_S = 3600.0
"""After that a temporary file is taken for that of a writer that was killed."""


@dataclass(frozen=True)
class BatchResult:
    """What became of every case, by its id.

    Attributes:
        written: label maps of this call.
        failed: what was wrong.
        kept: label maps of an earlier call with the same model and options.
    """

    written: dict[str, Path] = field(default_factory=dict)
    failed: dict[str, Exception] = field(default_factory=dict)
    kept: dict[str, Path] = field(default_factory=dict)

    def add(self, other: BatchResult) -> None:
        """Take over what became of other cases."""
        self.written.update(other.written)
        self.failed.update(other.failed)
        self.kept.update(other.kept)

    def describe(self) -> dict[str, dict[str, str]]:
        """The same as plain text."""
        return {
            "written": {case_id: str(path) for case_id, path in self.written.items()},
            "kept": {case_id: str(path) for case_id, path in self.kept.items()},
            "failed": {case_id: str(error) for case_id, error in self.failed.items()},
        }

    @property
    def exit_code(self) -> int:
        """That of the command line: a bug before a machine that cannot, before bad data."""
        codes = {getattr(error, "exit_code", 1) for error in self.failed.values()}
        return next((code for code in (1, 4, 2, 3) if code in codes), 0)


@dataclass(frozen=True)
class Outputs:
    """What is written of cases, and where.

    Attributes:
        folder: made if missing.
        suffix: of all label maps, which chooses the format; by default ``.png`` for a picture and
            ``.nii.gz`` for anything else.
        probabilities: also write ``<case_id>_probabilities``, of a picture as ``.nrrd``.
        uncertainty: also write ``<case_id>_entropy`` and, with several folds,
            ``<case_id>_disagreement``.
        overwrite: replace files that exist; an input image is never replaced.
    """

    folder: Path
    suffix: str | None = None
    probabilities: bool = False
    uncertainty: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Work:
    """What a process that predicts cases needs to know: plain data, which may travel.

    Attributes:
        models: folders.
        outputs: what is written.
        load: arguments of `volseg.Predictor.load`, but for its locator.
        roi: folder of a model that says where to look.
        roi_margin_mm: around what it finds.
        roi_backend: what computes that model; by default as the options say.
        network: code of the user's own that the model needs, as it was typed.
    """

    models: tuple[Path, ...]
    outputs: Outputs
    load: Mapping[str, Any] = field(default_factory=dict)
    roi: Path | None = None
    roi_margin_mm: float = 20.0
    roi_backend: BackendName | None = None
    network: str | None = None

    @property
    def options(self) -> Options:
        """How the model predicts."""
        options: Options = self.load.get("options", Options())
        return options

    def with_options(self, **changes: Any) -> Work:
        """The same work with other `options`."""
        options = replace(self.options, **changes)
        return replace(self, load={**self.load, "options": options})

    def settle(self, predictor: Predictor) -> Work:
        """The same work by the backends that a predictor has chosen."""
        work = self.with_options(backend=predictor.backend)
        if predictor.locator is None:
            return work
        return replace(work, roi_backend=predictor.locator.predictor.backend)

    def make_predictor(self) -> Predictor:
        """Load the model; see `volseg.Predictor.load` for what is raised."""
        if self.network is not None and ":" in self.network:
            register("networks", self.network)
        if self.roi is None:
            return Predictor.load(*self.models, **self.load)
        fine = self.options
        options = Options(
            backend=self.roi_backend or fine.backend,
            precision=fine.precision,
            memory_gb=fine.memory_gb,
        )
        coarse = Predictor.load(self.roi, device=self.load.get("device", "auto"), options=options)
        locator = Locator(coarse, self.roi_margin_mm)
        return Predictor.load(*self.models, **self.load, locator=locator)


class CaseRecord(Record):
    """How a label map was made and what it holds: ``<case_id>.json`` beside it."""

    images: tuple[str | None, ...]
    sources: str
    """Digest of the images' files: where they are, how large, and when they were changed."""
    files: tuple[str, ...]
    """Names of all that was written of this case."""
    model: str
    """Digest of the weights."""
    options: dict[str, Any]
    volumes_ml: dict[str, float]
    seconds: dict[str, float]
    """Reading and preparing, and segmenting."""
    volseg: str = __version__


@dataclass(frozen=True)
class Job:
    """A case and the files that are made of it; maps only if wanted."""

    case: Case
    labels: Path
    record: Path
    probabilities: Path | None
    uncertainty: Mapping[UncertaintyName, Path]

    @property
    def targets(self) -> list[Path]:
        """Every file, the label map last: where it and the record agree, all are there."""
        maps = [*([self.probabilities] if self.probabilities else []), *self.uncertainty.values()]
        return [self.record, *maps, self.labels]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the files besides the record."""
        return tuple(map(_as_name, self.targets[1:]))

    def is_done(self, predictor: Predictor) -> bool:
        """Whether all files are there, made in the same way of the same images."""
        if not all(map(os.path.exists, self.targets)):
            return False
        try:
            record = CaseRecord.read_json(self.record)
            sources = digest_sources(self.case)
        except (ConfigError, DataError, OSError):
            return False
        now = (sources, predictor.model.digest, predictor.describe())
        is_same = (record.sources, record.model, record.options) == now
        return is_same and set(self.names) <= set(record.files)

    def find_foreign(self) -> Path | None:
        """A file besides the label map that would be replaced, and that no killed job has left."""
        # Looked for before the record is read, which another process writes first.
        there = [path for path in self.targets[:-1] if os.path.exists(path)]
        try:
            known = {_as_name(self.record), *CaseRecord.read_json(self.record).files}
        except (ConfigError, DataError, OSError):
            known = set()
        foreign = (path for path in there if _as_name(path) not in known)
        return next(filter(os.path.exists, foreign), None)


def _as_text(path: Path) -> str:
    """A path as it may stand in a file, also one that is no UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _as_name(path: Path) -> str:
    return _as_text(Path(path.name))


def digest_sources(case: Case) -> str:
    """What tells the image files of a case from any others, also from their own later versions.

    Raises:
        OSError: one is not there.
    """
    files = [file for path in case.files for file in list_stored(path)]
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def predict_cases(
    predictor: Predictor,
    cases: Sequence[Case],
    outputs: Outputs,
    on_case: Callable[[int, int], None] | None = None,
) -> BatchResult:
    """Write a label map of every case, each whole or not at all.

    It is named by the case's id; beside it, ``<case_id>.json`` is a `CaseRecord`. Cases that an
    earlier call has finished by the same weights and options are kept.

    Args:
        predictor: a loaded model.
        cases: their labels are not read.
        outputs: what is written.
        on_case: called with (cases done, cases in all).

    Raises:
        ConfigError: an output exists that was made otherwise, and shall not be replaced, or it is
            an input, or two cases would write the same file, or the folder cannot be written to.
        FullDiskError: there is no room for the results.
        MachineError: a package for the format is missing.
    """
    kept, todo = plan_jobs(predictor, cases, outputs)
    # Of writers that were killed; those of other jobs are younger.
    remove_temporary(outputs.folder, older_than_s=_LEFT_BEHIND_S)
    result = BatchResult(kept={job.case.case_id: job.labels for job in kept})
    for number, (job, error) in enumerate(_run(predictor, todo), start=len(kept) + 1):
        if error is None:
            result.written[job.case.case_id] = job.labels
        else:
            result.failed[job.case.case_id] = error
            report(job.case.case_id, error)
        if on_case:
            on_case(number, len(cases))
    return result


def plan_jobs(
    predictor: Predictor, cases: Sequence[Case], outputs: Outputs
) -> tuple[list[Job], list[Job]]:
    """Jobs that an earlier call has finished, and those to be done; see `predict_cases`."""
    if outputs.suffix is not None:
        check_label_suffix(outputs.suffix, predictor.model.facts.plan.spatial_dims)
    jobs = [_plan_job(predictor, case, outputs) for case in cases]
    _check_targets(cases, jobs)
    kept: list[Job] = []
    todo: list[Job] = []
    for job in jobs:
        (kept if _may_stay(job, predictor, outputs) else todo).append(job)
    if todo:
        _check_folder(outputs.folder)
    return kept, todo


def _may_stay(job: Job, predictor: Predictor, outputs: Outputs) -> bool:
    """Whether a job is done.

    Raises:
        ConfigError: there is a label map that was made otherwise, and shall not be replaced.
    """
    # Looked for before: another process may finish it at any moment.
    has_labels = os.path.exists(job.labels)
    if outputs.overwrite:
        return False
    is_done = job.is_done(predictor)
    # Without its image a case fails as it is read, and what there is of it stays.
    if has_labels and not is_done and all(file.exists() for file in job.case.files):
        raise ConfigError(
            f"{job.labels} exists and was made from other images, weights or options; nothing "
            "was written. Choose another folder, or --overwrite."
        )
    if not is_done and (foreign := job.find_foreign()):
        raise ConfigError(
            f"{foreign} exists and is no result of volseg by the record beside it; nothing was "
            "written. Choose another folder, or --overwrite."
        )
    return is_done


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written to, before there is anything to write."""
    # Unlike Path.exists it takes what may not be looked at for not there.
    parents = (folder, *folder.absolute().parents)
    nearest = next(path for path in parents if os.path.exists(path))
    if not nearest.is_dir():
        raise ConfigError(f"{nearest} is no folder; expected one for the results. Change -o.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{nearest} cannot be written to; expected a folder for the results. Change -o."
        )


def report(case_id: str, error: Exception) -> None:
    """Tell the user what was wrong with a case."""
    logger.error("%s: %s", case_id, _describe(error))


def _plan_job(predictor: Predictor, case: Case, outputs: Outputs) -> Job:
    """Name the files of a case."""
    maps = predictor.uncertainty_maps if outputs.uncertainty else ()
    ending = outputs.suffix or _choose_suffix(case, predictor.model.facts.classes.dtype)
    # These formats hold labels alone.
    map_ending = {SEGMENTS: ".nrrd", DICOM: ".nii.gz"}.get(ending, ending)
    if is_picture(ending):
        map_ending = ".nrrd"

    def name_map(what: str) -> Path:
        return outputs.folder / f"{case.case_id}_{what}{map_ending}"

    return Job(
        case,
        outputs.folder / f"{case.case_id}{ending}",
        outputs.folder / f"{case.case_id}.json",
        name_map("probabilities") if outputs.probabilities else None,
        {what: name_map(what) for what in maps},
    )


def _run(predictor: Predictor, jobs: Sequence[Job]) -> Iterator[tuple[Job, Exception | None]]:
    """Every job when it is done, with what went wrong; a full disk ends them all."""
    if not predictor.works_ahead:
        yield from (_do(predictor, job) for job in jobs)
        return
    with ThreadPoolExecutor(1, "reading") as reader, ThreadPoolExecutor(1, "writing") as writer:
        ahead = (reader.submit(_read, predictor, job) for job in jobs)
        reading = list(itertools.islice(ahead, 1))
        writing: list[Future[tuple[Job, Exception | None]]] = []
        while reading:
            work = reading.pop().result()
            reading += itertools.islice(ahead, 1)
            _segment(predictor, work)
            if writing:
                yield writing.pop().result()
            writing.append(writer.submit(_write, predictor, work))
        if writing:
            yield writing.pop().result()


def _do(predictor: Predictor, job: Job) -> tuple[Job, Exception | None]:
    """One job while no other thread works on one by the same predictor."""
    with predictor.turn:
        work = _read(predictor, job)
        _segment(predictor, work)
        return _write(predictor, work)


@dataclass
class _Work:
    """A job on its way: what it has become so far, or why it went no further."""

    job: Job
    sources: str = ""
    prepared: Prepared | None = None
    segmentation: Segmentation | None = None
    error: Exception | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def _read(predictor: Predictor, job: Job) -> _Work:
    work, start = _Work(job), time.perf_counter()
    try:
        if job.labels.name.endswith(DICOM) and not job.case.files[0].is_dir():
            raise DataError(
                f"{job.case.files[0]} is no DICOM series, to which a DICOM segmentation would "
                "refer; expected its folder. Choose another --suffix."
            )
        # Before it is read: what is changed meanwhile is done again next time.
        work.sources = digest_sources(job.case)
        work.prepared = predictor.read(job.case.images)
    except Exception as error:  # The others go on.
        work.error = _settle(error)
    work.seconds["read"] = time.perf_counter() - start
    return work


def _segment(predictor: Predictor, work: _Work) -> None:
    if work.prepared is None:
        return
    start = time.perf_counter()
    job = work.job
    try:
        work.segmentation = predictor.segment(
            work.prepared,
            probabilities=job.probabilities is not None,
            uncertainty=bool(job.uncertainty),
        )
    except Exception as error:  # The others go on.
        work.error = _settle(error)
    work.prepared = None
    work.seconds["segment"] = time.perf_counter() - start


def _write(predictor: Predictor, work: _Work) -> tuple[Job, Exception | None]:
    job, segmentation = work.job, work.segmentation
    if segmentation is None:
        return job, work.error
    record = CaseRecord(
        images=tuple(path and _as_text(path) for path in job.case.images),
        sources=work.sources,
        files=job.names,
        model=predictor.model.digest,
        options=predictor.describe(),
        volumes_ml=segmentation.volumes_ml,
        seconds={name: round(seconds, 3) for name, seconds in work.seconds.items()},
    )
    try:
        # A kill from here on leaves a case that is not finished, and no older map under its record.
        job.labels.unlink(missing_ok=True)
        record.write_json(job.record)
        if job.probabilities:
            segmentation.save_probabilities(job.probabilities)
        for name, path in job.uncertainty.items():
            segmentation.save_uncertainty(name, path)
        segmentation.save(job.labels)
    except FullDiskError as error:
        _remove(job.targets)
        # No case after this one would find room.
        raise FullDiskError(
            f"no space left while writing {job.labels}; no file of that case stays. Free some "
            "space, and give the same command again."
        ) from error
    except Exception as error:  # The others go on.
        _remove(job.targets)
        return job, _settle(error)
    return job, None


def _remove(paths: Sequence[Path]) -> None:
    """Files of a case that is not finished, as far as they may be removed."""
    # The record last: it says whose the others are.
    for path in reversed(paths):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _settle(error: Exception) -> Exception:
    """The error as it is kept: without the functions that it came through, and their arrays."""
    logger.debug("what went wrong", exc_info=error)
    kept = error
    if is_out_of_gpu_memory(error):
        kept = MachineError(
            "the GPU's memory was short. Use --device cpu, or a GPU with more of it."
        )
    elif is_out_of_memory(error):
        kept = MachineError(
            "memory was short. Set --memory lower, which predicts in strips, leave "
            "--probabilities out, or use a larger machine."
        )
    elif isinstance(error, OSError):
        is_gone = isinstance(error, FileNotFoundError) and error.filename
        what = f"{error.filename} does not exist" if is_gone else error
        kept = DataError(f"{what}. Look at the file and its folder.")
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__cause__ or cause.__context__
    return kept


def _describe(error: Exception) -> str:
    if isinstance(error, (ConfigError, DataError, MachineError)):
        return str(error)
    return f"{type(error).__name__}: {error}. This is a bug in volseg; please report it."


def _choose_suffix(case: Case, dtype: np.dtype[Any]) -> str:
    """The format of a case's images, if it holds label values of a type."""
    if not all(is_picture(path.name) for path in case.files):
        return ".nii.gz"
    return ".png" if np.can_cast(dtype, np.uint16) else ".tif"


def _check_targets(cases: Sequence[Case], jobs: Sequence[Job]) -> None:
    """Refuse outputs that are inputs, or that are written twice."""
    inputs = {image.resolve() for case in cases for image in case.files}
    owners = {FOLDS_FILE: "the folds of --validation"}
    for job in jobs:
        for target in job.targets:
            if target.resolve() in inputs or target.parent.resolve() in inputs:
                raise ConfigError(
                    f"{target} is an input image, or lies among the slices of one; expected an "
                    "output folder of its own. Change -o."
                )
            other = owners.setdefault(target.name, job.case.case_id)
            if other != job.case.case_id:
                raise ConfigError(
                    f"{target} would be written for {job.case.case_id} and for {other}; expected "
                    "names that differ. Predict them into different folders."
                )
