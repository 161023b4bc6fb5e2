"""Cases over the machines of a Ray cluster: a predictor for each GPU, or each group of CPU cores.

Needs ray, an optional package: ``pip install volseg[ray]``. The model, the images and the output
must have the same paths on all machines.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from volseg.data.cases import Case
from volseg.errors import ConfigError, FullDiskError, MachineError
from volseg.inference.batch import BatchResult, Work, plan_jobs, predict_cases, report
from volseg.inference.memory import free_bytes
from volseg.inference.predictor import Predictor
from volseg.inference.windows import CPU

logger = logging.getLogger(__name__)

RETRIES = 3
"""How often a case is tried again when the predictor that works on it goes away."""
_PATIENCE_S = 60.0
"""After that the user is told that no predictor has begun yet."""


@dataclass(frozen=True)
class Cluster:
    """Where to predict.

    Attributes:
        address: of the cluster, as Ray writes it; ``local`` makes one of this machine's processes.
        cpus: cores for each predictor.
    """

    address: str
    cpus: int = 4


def predict_on_cluster(
    cluster: Cluster,
    work: Work,
    cases: Sequence[Case],
    on_case: Callable[[int, int], None] | None = None,
) -> BatchResult:
    """Give the next case to whichever predictor is free; results are those of a serial run.

    Predictors that are killed, with their machine or alone, are replaced, and their case is tried
    again; a case that takes several down fails, and the others go on.

    Raises:
        ConfigError: an output exists that was made otherwise, or the model cannot be loaded, or
            the device is one GPU by number.
        MachineError: ray is not installed, the cluster does not answer, or no predictor stays.
    """
    ray = _import_ray()
    try:
        ray.init(address=cluster.address, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, ValueError) as error:  # ValueError: it is no address.
        raise MachineError(
            f"no Ray cluster at {cluster.address} ({error}); expected its address, or local."
        ) from error
    crew = _Crew(ray, cluster, work, cases)
    try:
        return crew.run(on_case)
    finally:
        crew.dismiss()


class _Crew:
    """Predictors in processes of their own, and what each of them works on."""

    def __init__(self, ray: Any, cluster: Cluster, work: Work, cases: Sequence[Case]) -> None:
        self.ray, self.cases = ray, cases
        self.waiting = deque(cases)
        self.result = BatchResult()
        self.tries = dict.fromkeys((case.case_id for case in cases), 0)
        self.lost = 0
        self.is_checked = False
        self.said: set[str] = set()
        share = _share_out(ray, cluster, work.load.get("device", "auto"))
        self.number = min(share.number, len(cases))
        self.beside = {name: min(count, self.number) for name, count in share.beside.items()}
        self.work = work
        self.actor = ray.remote(max_restarts=0, max_task_retries=0, **share.needs)(_Worker)
        self.threads = share.needs["num_cpus"]
        # What every predictor is at: its call, and the case; None while it loads the model.
        self.busy: dict[Any, tuple[Any, Case | None]] = {}
        if cases:
            self._hire()

    def run(self, on_case: Callable[[int, int], None] | None) -> BatchResult:
        """Until every case is done or has failed."""
        reported = 0
        while self.busy and reported < len(self.cases):
            ready, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=_PATIENCE_S)
            if not ready and not self.is_checked:
                logger.warning("no predictor has begun yet: the cluster is busy, or loads slowly")
            for call in ready:
                self._take(call)
            done = len(self.result.written) + len(self.result.kept) + len(self.result.failed)
            if on_case and done > reported:
                on_case(done, len(self.cases))
            reported = done
        return self.result

    def dismiss(self) -> None:
        """End the predictors that are left."""
        for actor, _ in self.busy.values():
            self.ray.kill(actor)

    def _hire(self) -> None:
        actor = self.actor.remote(self.work, self.threads, self.beside)
        # The first one that has loaded the model looks at all outputs, before any is written.
        cases = [] if self.is_checked else list(self.cases)
        self.busy[actor.load.remote(cases)] = (actor, None)

    def _take(self, call: Any) -> None:
        """What came of a call, and the next case for the predictor that made it."""
        actor, case = self.busy.pop(call)
        try:
            found, warnings = self.ray.get(call)
        except _list_losses(self.ray) as error:
            self._replace(case, error)
            return
        self._say(warnings)
        if case is not None:
            self.result.add(found)
            for name, failure in found.failed.items():
                report(name, failure)
                if isinstance(failure, FullDiskError):
                    raise failure  # No case after this one would find room.
        elif isinstance(found, Exception):
            self.ray.kill(actor)
            if not self.is_checked or not self.busy:
                raise found
            logger.warning("a predictor is left out, the others go on: %s", found)
            return
        else:
            self._begin(found)
        if self.waiting:
            following = self.waiting.popleft()
            self.busy[actor.predict.remote(following)] = (actor, following)
        else:
            self.ray.kill(actor)

    def _begin(self, settled: Work) -> None:
        """Go on behind a predictor that has loaded the model, the first time with all the others.

        They compute by the backend that it has chosen, so that this does not depend on who
        measured what.
        """
        self.lost = 0
        if not self.is_checked:
            self.is_checked, self.work = True, settled
            for _ in range(self.number - 1):
                self._hire()

    def _say(self, warnings: Sequence[str]) -> None:
        """Tell the user what predictors warn of, each of it once."""
        for warning in warnings:
            if warning not in self.said:
                logger.warning("%s", warning)
        self.said.update(warnings)

    def _replace(self, case: Case | None, error: Exception) -> None:
        """Another predictor for one that has gone, and what becomes of its case."""
        if case is None:
            self.lost += 1
            if self.lost > RETRIES:
                raise MachineError(
                    f"{self.lost} predictors ended while they loaded the model ({error}); expected "
                    "enough memory for it on every machine."
                ) from error
        else:
            self.tries[case.case_id] += 1
            if self.tries[case.case_id] <= RETRIES:
                self.waiting.append(case)
            else:
                failure = MachineError(
                    f"{RETRIES + 1} predictors ended at this case; expected enough memory for it. "
                    "Set --memory lower, or use larger machines."
                )
                self.result.failed[case.case_id] = failure
                report(case.case_id, failure)
        if self.waiting or not self.is_checked:
            self._hire()


def _list_losses(ray: Any) -> tuple[type[Exception], ...]:
    """What Ray raises where a predictor has gone, with its process, its machine or its memory."""
    return (
        ray.exceptions.RayActorError,
        ray.exceptions.ActorUnschedulableError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.OutOfMemoryError,
        ray.exceptions.WorkerCrashedError,
    )


@dataclass(frozen=True)
class _Share:
    """What each predictor takes, and how many of them there are.

    Attributes:
        needs: as Ray names it.
        number: that the machines hold, each machine by itself.
        beside: how many of them a machine holds, by its name in Ray.
    """

    needs: dict[str, int]
    number: int
    beside: dict[str, int]


def _share_out(ray: Any, cluster: Cluster, device: str) -> _Share:
    """A GPU for each predictor where there are some and they are wanted, or a group of cores.

    Raises:
        ConfigError: the device is one GPU by number.
    """
    if device.startswith("cuda:"):
        raise ConfigError(
            f"--device {device} with --ray, which hands out the GPUs; expected cuda, auto or cpu."
        )
    nodes = [node for node in ray.nodes() if node["Alive"]]
    machines = [node["Resources"] for node in nodes]
    sizes = [(int(part.get("CPU", 0)), int(part.get("GPU", 0))) for part in machines]
    if device != "cpu" and any(gpus for _, gpus in sizes):
        needs, numbers = _share_gpus(sizes, cluster.cpus)
    else:
        needs, numbers = _share_cores([cores for cores, _ in sizes], cluster.cpus)
    beside = {node["NodeID"]: number for node, number in zip(nodes, numbers, strict=True)}
    return _Share(needs, max(1, sum(numbers)), beside)


def _share_gpus(sizes: Sequence[tuple[int, int]], cpus: int) -> tuple[dict[str, int], list[int]]:
    """A GPU for each predictor, with its share of the cores, but no more than `cpus`."""
    fewest = min(cores // gpus for cores, gpus in sizes if gpus)
    needs = {"num_gpus": 1, "num_cpus": max(1, min(cpus, fewest))}
    return needs, [gpus for _, gpus in sizes]


def _share_cores(machines: Sequence[int], cpus: int) -> tuple[dict[str, int], list[int]]:
    """As many cores as `cpus` for each predictor, or all that the largest machine has."""
    needed = max(1, min(cpus, max(machines)))
    return {"num_cpus": needed}, [cores // needed for cores in machines]


class _Worker:
    """A process of the cluster with a model kept loaded.

    Errors and warnings come back as values: Ray's own way to show them mixes them with its own.
    """

    def __init__(self, work: Work, threads: int, beside: Mapping[str, int]) -> None:
        torch.set_num_threads(threads)
        machine = _import_ray().get_runtime_context().get_node_id()
        self.work = share_memory(work, beside.get(machine, 1))
        self.predictor: Predictor | None = None

    def load(self, cases: Sequence[Case]) -> tuple[Work | Exception, list[str]]:
        """Load the model, and refuse outputs of cases that were made otherwise.

        Returns:
            The work as it is done, or what went wrong; and warnings.
        """
        with _collect_warnings() as warnings:
            try:
                self.predictor = self.work.make_predictor()
                plan_jobs(self.predictor, cases, self.work.outputs)
            except Exception as error:
                return _bare(error), warnings
        return self.work.settle(self.predictor), warnings

    def predict(self, case: Case) -> tuple[BatchResult, list[str]]:
        """Predict one case; what is wrong with it comes back in the result, before the warnings."""
        if self.predictor is None:
            raise ValueError("no model was loaded; expected a call of load before.")
        with _collect_warnings() as warnings:
            try:
                result = predict_cases(self.predictor, [case], self.work.outputs)
            except Exception as error:
                return BatchResult(failed={case.case_id: _bare(error)}), warnings
        failed = {name: _bare(error) for name, error in result.failed.items()}
        return BatchResult(result.written, failed, result.kept), warnings


def share_memory(work: Work, number: int) -> Work:
    """The work of one of several predictors of a machine, which share the memory that is free.

    Args:
        work: whose ceiling stays, if it has one.
        number: of predictors that may be there.
    """
    if work.options.memory_gb is not None or number < 2:
        return work
    return work.with_options(memory_gb=1e-9 * free_bytes(CPU) / number)


@contextlib.contextmanager
def _collect_warnings() -> Iterator[list[str]]:
    """What volseg warns of meanwhile."""
    volsegs, collector = logging.getLogger("volseg"), _Collector()
    volsegs.addHandler(collector)
    try:
        yield collector.warnings
    finally:
        volsegs.removeHandler(collector)


class _Collector(logging.Handler):
    """Takes warnings; errors are told by those who get them as values."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text of a warning."""
        if record.levelno < logging.ERROR:
            self.warnings.append(record.getMessage())


def _bare(error: Exception) -> Exception:
    """An error that can travel: what came before it may hold what cannot."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MachineError(
            "--ray needs the package ray. Install it with `pip install volseg[ray]`."
        ) from error
    return ray
