"""A local Ray cluster gives what one process gives, also when a predictor is killed."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import volseg
from volseg.data.cases import Case
from volseg.errors import ConfigError, FullDiskError, MachineError
from volseg.inference import Options, cluster
from volseg.inference.batch import BatchResult, Outputs, Work, predict_cases
from volseg.inference.cluster import Cluster, predict_on_cluster, share_memory
from volseg.inference.inputs import find_inputs
from volseg.inference.memory import free_bytes

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def local_ray():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_killed_predictor_changes_nothing(
    local_ray, run: Path, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for copy in range(3):
        for path in (balls / "imagesTr").iterdir():
            shutil.copy(path, images / f"{copy}_{path.name}")
    cases = find_inputs([images], ["MR0"])
    pids: list[int] = []
    hire = cluster._Crew._hire

    def remember(self: cluster._Crew) -> None:
        hire(self)
        actor, _ = list(self.busy.values())[-1]
        pids.append(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))

    monkeypatch.setattr(cluster._Crew, "_hire", remember)

    def kill_one(done: int, total: int) -> None:
        if done == 2:
            os.kill(pids[0], signal.SIGKILL)

    work = Work((run,), Outputs(tmp_path / "ray"), {"device": "cpu"})
    result = predict_on_cluster(Cluster("local", cpus=1), work, cases, kill_one)
    # Two, and one for the one that was killed.
    assert len(set(pids)) == 3
    assert len(result.written) + len(result.kept) == len(cases)
    predict_cases(volseg.Predictor.load(run, device="cpu"), cases, Outputs(tmp_path / "one"))
    for case in cases:
        name = f"{case.case_id}.nii.gz"
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.slow
def test_errors_of_the_model_come_back(local_ray, run: Path, balls: Path, tmp_path: Path) -> None:
    cases = find_inputs([balls / "imagesTr"], ["MR0"])
    work = Work((tmp_path / "nothing",), Outputs(tmp_path / "out"), {"device": "cpu"})
    with pytest.raises(ConfigError, match="is no model"):
        predict_on_cluster(Cluster("local", cpus=1), work, cases)


class FakeRay:
    """Ray as one process in which calls are made when they are waited for.

    Attributes:
        deadly: cases that end the predictor that gets them.
        full: cases for which there is no room.
        load: what a predictor does first, with its work.
        machines: what each has.
        started: work of every predictor.
    """

    exceptions = SimpleNamespace(
        **{
            name: type(name, (Exception,), {})
            for name in (
                "RayActorError",
                "ActorUnschedulableError",
                "NodeDiedError",
                "OutOfMemoryError",
                "WorkerCrashedError",
            )
        }
    )

    def __init__(self, deadly: set[str], machines: list[dict[str, float]]) -> None:
        self.deadly, self.machines = deadly, machines
        self.load: Callable[[Work], Work | Exception] = lambda work: work
        self.actors: list[object] = []
        self.started: list[Work] = []
        self.loss = "RayActorError"
        self.full: set[str] = set()
        self.calls: dict[int, Callable[[], object]] = {}
        self.needs: dict[str, int] = {}

    def nodes(self) -> list[dict[str, object]]:
        gone = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
        there = enumerate(self.machines)
        return [gone, *({"Alive": True, "NodeID": f"n{n}", "Resources": m} for n, m in there)]

    def remote(self, **needs: int) -> Callable[[type], object]:
        self.needs = needs
        return lambda worker: SimpleNamespace(remote=lambda work, *_: self._start(work))

    def lose(self) -> None:
        raise getattr(self.exceptions, self.loss)("killed")

    def _start(self, work: Work) -> object:
        self.started.append(work)

        def call(action: Callable[..., object], *arguments: object) -> int:
            self.calls[len(self.calls)] = partial(action, *arguments)
            return len(self.calls) - 1

        def predict(case: Case) -> tuple[BatchResult, list[str]]:
            if case.case_id in self.deadly:
                self.lose()
            if case.case_id in self.full:
                failed = {case.case_id: FullDiskError("no space left")}
                return BatchResult(failed=failed), []
            return BatchResult(written={case.case_id: Path(case.case_id)}), [case.case_id, "odd"]

        actor = SimpleNamespace(
            load=SimpleNamespace(remote=lambda cases: call(lambda: (self.load(work), []))),
            predict=SimpleNamespace(remote=partial(call, predict)),
        )
        self.actors.append(actor)
        return actor

    def wait(self, calls: list[int], **_: object) -> tuple[list[int], list[int]]:
        return calls[:1], calls[1:]

    def get(self, call: int) -> object:
        return self.calls[call]()

    def kill(self, actor: object) -> None:
        self.actors.remove(actor)


def make_crew(ray: FakeRay, number: int = 6, cpus: int = 4, **load: object) -> cluster._Crew:
    cases = [
        Case(case_id=f"c{n}", images=(Path(f"{n}.nii"),), patient_id=str(n)) for n in range(number)
    ]
    work = Work((Path("m"),), Outputs(Path("o")), load)
    return cluster._Crew(ray, Cluster("local", cpus), work, cases)


@pytest.mark.parametrize("loss", list(vars(FakeRay.exceptions)))
def test_a_case_that_ends_its_predictors_fails_alone(loss: str) -> None:
    fake, seen = FakeRay({"c1"}, [{"CPU": 8.0}]), []
    fake.loss = loss
    assert issubclass(getattr(ray.exceptions, loss), Exception)
    result = make_crew(fake).run(lambda done, total: seen.append((done, total)))
    # Two, and one for each that was lost but the last.
    assert len(fake.started) == 5
    assert set(result.written) == {"c0", "c2", "c3", "c4", "c5"}
    assert "4 predictors ended at this case" in str(result.failed["c1"])
    assert seen == [(done, 6) for done in range(1, 7)]


def test_predictors_that_end_while_they_load_are_not_replaced_for_ever() -> None:
    fake = FakeRay(set(), [{"CPU": 4.0}])
    fake.load = lambda work: fake.lose()
    with pytest.raises(MachineError, match="ended while they loaded the model"):
        make_crew(fake).run(None)
    assert len(fake.started) == 4


def test_a_model_that_cannot_be_loaded_ends_it_all() -> None:
    fake = FakeRay(set(), [{"CPU": 8.0}])
    fake.load = lambda work: ConfigError("no model")
    crew = make_crew(fake)
    with pytest.raises(ConfigError, match="no model"):
        crew.run(None)
    crew.dismiss()
    assert not any(actor in fake.actors for actor, _ in crew.busy.values())


def test_all_predictors_compute_as_the_first_one_has_chosen() -> None:
    fake, losses = FakeRay(set(), [{"CPU": 16.0}]), [1]

    def choose(work: Work) -> Work:
        if losses:
            losses.pop()
            fake.lose()
        chosen = work.with_options(backend="openvino")
        return replace(chosen, roi_backend="torch")

    fake.load = choose
    crew = make_crew(fake, options=Options(backend="auto", step=0.4))
    assert len(fake.started) == 1
    assert len(crew.run(None).written) == 6
    # The first one is lost, another one chooses, and three follow it.
    assert [work.options.backend for work in fake.started] == 2 * ["auto"] + 3 * ["openvino"]
    assert [work.roi_backend for work in fake.started[2:]] == 3 * ["torch"]
    assert {work.options.step for work in fake.started} == {0.4}


def test_what_a_predictor_has_chosen_is_said_by_name(run: Path, tmp_path: Path) -> None:
    work = Work((run,), Outputs(tmp_path), {"device": "cpu"}, roi=run)
    predictor = work.make_predictor()
    predictor.backend, predictor.locator.predictor.backend = "openvino", "torch"
    settled = work.settle(predictor)
    assert (settled.options.backend, settled.roi_backend) == ("openvino", "torch")
    again = settled.make_predictor()
    assert again.backend == "openvino"
    assert again.locator.predictor.backend == "torch"


def test_warnings_of_predictors_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    make_crew(FakeRay(set(), [{"CPU": 4.0}]), 3).run(None)
    assert [record.getMessage() for record in caplog.records] == ["c0", "odd", "c1", "c2"]


def test_a_predictor_hands_its_warnings_back(
    run: Path, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = volseg.Predictor.read

    def warn(self: volseg.Predictor, image: object) -> object:
        logging.getLogger("volseg.images").warning("%s is odd", "it")
        logging.getLogger("volseg.images").error("told by others")
        return plain(self, image)

    monkeypatch.setattr(volseg.Predictor, "read", warn)
    here = SimpleNamespace(get_node_id=lambda: "n0")
    alone = SimpleNamespace(get_runtime_context=lambda: here)
    monkeypatch.setattr(cluster, "_import_ray", lambda: alone)
    work = Work((run,), Outputs(tmp_path), {"device": "cpu"})
    worker = cluster._Worker(work, torch.get_num_threads(), {"n0": 2, "n1": 5})
    free_gb = 1e-9 * free_bytes(torch.device("cpu"))
    assert worker.work.options.memory_gb == pytest.approx(free_gb / 2, rel=0.2)
    (case, *_) = cases = find_inputs([balls / "imagesTr"], ["MR0"])
    settled, warnings = worker.load(cases)
    assert (settled.options.backend, warnings) == ("torch", [])
    result, warnings = worker.predict(case)
    assert list(result.written) == [case.case_id]
    assert warnings == ["it is odd"]


@pytest.mark.parametrize(
    ("machines", "device", "needs", "beside"),
    [
        # Four cores each: one of them on each machine, not three on both.
        ([{"CPU": 6.0}, {"CPU": 6.0}], "auto", {"num_cpus": 4}, [1, 1]),
        ([{"CPU": 2.0}], "cpu", {"num_cpus": 2}, [1]),
        ([{"CPU": 0.0}, {"CPU": 16.0}], "auto", {"num_cpus": 4}, [0, 4]),
        ([{"CPU": 8.0}, {"CPU": 4.0, "GPU": 2.0}], "cuda", {"num_gpus": 1, "num_cpus": 2}, [0, 2]),
        ([{"CPU": 8.0}, {"CPU": 4.0, "GPU": 2.0}], "cpu", {"num_cpus": 4}, [2, 1]),
    ],
)
def test_predictors_fit_on_their_machines(
    machines: list[dict[str, float]],
    device: str,
    needs: dict[str, int],
    beside: list[int],
) -> None:
    fake = FakeRay(set(), machines)
    crew = make_crew(fake, device=device)
    crew.run(None)
    assert fake.needs == {"max_restarts": 0, "max_task_retries": 0, **needs}
    assert len(fake.started) == sum(beside)
    assert list(crew.beside.values()) == beside


def test_memory_is_shared_by_predictors_that_there_are() -> None:
    # Of four that fit, a single case needs one.
    assert make_crew(FakeRay(set(), [{"CPU": 16.0}]), 1).beside == {"n0": 1}
    work = Work((Path("m"),), Outputs(Path("o")))
    assert share_memory(work, 1) == work
    free_gb = 1e-9 * free_bytes(torch.device("cpu"))
    assert share_memory(work, 4).options.memory_gb == pytest.approx(free_gb / 4, rel=0.2)
    own = work.with_options(memory_gb=5.0)
    assert share_memory(own, 4) == own


def test_a_full_disk_ends_it_all() -> None:
    fake = FakeRay(set(), [{"CPU": 4.0}])
    fake.full = {"c1"}
    crew = make_crew(fake)
    with pytest.raises(FullDiskError, match="no space left"):
        crew.run(None)
    assert len(crew.waiting) == 4


def test_nobody_is_waited_for_who_has_nothing_to_do() -> None:
    fake = FakeRay(set(), [{"CPU": 16.0}])
    crew = make_crew(fake, 2)
    loads = []

    def load(work: Work) -> Work:
        loads.append(work)
        return work

    fake.load = load
    # The first one does both cases before the second has loaded.
    fake.wait = lambda calls, **_: (calls[-1:], calls[:-1])
    assert len(crew.run(None).written) == 2
    assert (len(fake.started), len(loads)) == (2, 1)


def test_a_machine_that_cannot_do_as_the_others_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake, answers = FakeRay(set(), [{"CPU": 8.0}]), [None, MachineError("no openvino here")]
    fake.load = lambda work: answers.pop(0) or work
    assert len(make_crew(fake).run(None).written) == 6
    assert "a predictor is left out, the others go on: no openvino here" in caplog.text


def test_one_gpu_by_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--device cuda:1 with --ray.* expected cuda"):
        make_crew(FakeRay(set(), [{"CPU": 4.0, "GPU": 2.0}]), device="cuda:1")


@pytest.mark.parametrize("error", [ConnectionError("silence"), ValueError("Invalid address")])
def test_what_is_no_address_is_told(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise error

    monkeypatch.setattr(cluster, "_import_ray", lambda: SimpleNamespace(init=init))
    work = Work((tmp_path,), Outputs(tmp_path))
    with pytest.raises(MachineError, match="no Ray cluster at nowhere"):
        predict_on_cluster(Cluster("nowhere"), work, [])
