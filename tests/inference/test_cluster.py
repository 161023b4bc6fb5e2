"""A local Ray cluster gives what one process gives, also when a predictor is killed."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import volseg
from volseg.data.cases import Case
from volseg.errors import ConfigError, MachineError
from volseg.inference import cluster
from volseg.inference.batch import BatchResult, Outputs, Work, predict_cases
from volseg.inference.cluster import Cluster, predict_on_cluster
from volseg.inference.inputs import find_inputs

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
    cases = find_inputs([images], 1)
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
    cases = find_inputs([balls / "imagesTr"], 1)
    work = Work((tmp_path / "nothing",), Outputs(tmp_path / "out"), {"device": "cpu"})
    with pytest.raises(ConfigError, match="is no model"):
        predict_on_cluster(Cluster("local", cpus=1), work, cases)


class FakeRay:
    """Ray as one process in which calls are made when they are waited for.

    Attributes:
        deadly: cases that end the predictor that gets them.
        load: what a predictor does first.
        machines: cores and GPUs of each.
    """

    class exceptions:
        class RayActorError(Exception):
            pass

    def __init__(self, deadly: set[str], machines: list[dict[str, float]]) -> None:
        self.deadly, self.machines = deadly, machines
        self.load: Callable[[], Exception | None] = lambda: None
        self.actors: list[object] = []
        self.calls: dict[int, Callable[[], object]] = {}
        self.needs: dict[str, int] = {}

    def nodes(self) -> list[dict[str, object]]:
        gone = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
        return [gone, *({"Alive": True, "Resources": machine} for machine in self.machines)]

    def remote(self, **needs: int) -> Callable[[type], object]:
        self.needs = needs
        return lambda worker: SimpleNamespace(remote=lambda *_: self._start())

    def _start(self) -> object:
        def call(action: Callable[..., object], *arguments: object) -> int:
            self.calls[len(self.calls)] = partial(action, *arguments)
            return len(self.calls) - 1

        def predict(case: Case) -> BatchResult:
            if case.case_id in self.deadly:
                raise self.exceptions.RayActorError("killed")
            return BatchResult(written={case.case_id: Path(case.case_id)})

        actor = SimpleNamespace(
            load=SimpleNamespace(remote=lambda cases: call(lambda: self.load())),
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


def make_crew(ray: FakeRay, number: int = 6, cpus: int = 4) -> cluster._Crew:
    cases = [
        Case(case_id=f"c{n}", images=(Path(f"{n}.nii"),), patient_id=str(n)) for n in range(number)
    ]
    return cluster._Crew(ray, Cluster("local", cpus), Work((Path("m"),), Outputs(Path("o"))), cases)


def test_a_case_that_ends_its_predictors_fails_alone() -> None:
    ray, seen = FakeRay({"c1"}, [{"CPU": 8.0}]), []
    crew = make_crew(ray)
    assert len(ray.actors) == 2
    result = crew.run(lambda done, total: seen.append((done, total)))
    assert set(result.written) == {"c0", "c2", "c3", "c4", "c5"}
    assert "4 predictors ended at this case" in str(result.failed["c1"])
    assert seen == [(done, 6) for done in range(1, 7)]


def test_predictors_that_end_while_they_load_are_not_replaced_for_ever() -> None:
    ray = FakeRay(set(), [{"CPU": 4.0}])

    def die() -> None:
        raise ray.exceptions.RayActorError("out of memory")

    ray.load = die
    with pytest.raises(MachineError, match="ended while they loaded the model"):
        make_crew(ray).run(None)


def test_a_model_that_cannot_be_loaded_ends_it_all() -> None:
    ray = FakeRay(set(), [{"CPU": 8.0}])
    ray.load = lambda: ConfigError("no model")
    crew = make_crew(ray)
    with pytest.raises(ConfigError, match="no model"):
        crew.run(None)
    crew.dismiss()
    assert not any(actor in ray.actors for actor, _ in crew.busy.values())


@pytest.mark.parametrize(
    ("machines", "needs", "number"),
    [
        # Four cores each: one of them on each machine, not three on both.
        ([{"CPU": 6.0}, {"CPU": 6.0}], {"num_cpus": 4}, 2),
        ([{"CPU": 2.0}], {"num_cpus": 2}, 1),
        ([{"CPU": 0.0}, {"CPU": 16.0}], {"num_cpus": 4}, 4),
        ([{"CPU": 8.0}, {"CPU": 4.0, "GPU": 2.0}], {"num_gpus": 1, "num_cpus": 2}, 2),
    ],
)
def test_predictors_fit_on_their_machines(
    machines: list[dict[str, float]], needs: dict[str, int], number: int
) -> None:
    ray = FakeRay(set(), machines)
    make_crew(ray)
    assert ray.needs == {"max_restarts": 0, "max_task_retries": 0, **needs}
    assert len(ray.actors) == number
