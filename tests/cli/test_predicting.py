"""Every word of ``volseg predict`` reaches what it is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from volseg.cli import main, predicting
from volseg.cli.predicting import Request, parse_least, parse_memory, set_threads
from volseg.errors import ConfigError
from volseg.inference import cluster
from volseg.inference.batch import BatchResult, Work
from volseg.inference.cluster import Cluster

HERE = Path.cwd()
WORDS: dict[str, tuple[list[str], Callable[[Work], Any], Any]] = {
    "with": (["--with", "n"], lambda work: work.models, (HERE / "m", HERE / "n")),
    "fold": (["--fold", "2"], lambda work: work.load["folds"], (2,)),
    "checkpoint": (["--checkpoint", "best"], lambda work: work.load["checkpoint"], "best"),
    "device": (["--device", "cpu"], lambda work: work.load["device"], "cpu"),
    "suffix": (["--suffix", ".nrrd"], lambda work: work.outputs.suffix, ".nrrd"),
    "probabilities": (["--probabilities"], lambda work: work.outputs.probabilities, True),
    "uncertainty": (["--uncertainty"], lambda work: work.outputs.uncertainty, True),
    "overwrite": (["--overwrite"], lambda work: work.outputs.overwrite, True),
    "largest": (["--largest", "a"], lambda work: work.options.largest, ("a",)),
    "min_volume": (["--min-volume", "a=2"], lambda work: work.options.least_ml, {"a": 2.0}),
    "mirror": (["--mirror"], lambda work: work.options.mirror, True),
    "step": (["--step", "0.3"], lambda work: work.options.step, 0.3),
    "backend": (["--backend", "openvino"], lambda work: work.options.backend, "openvino"),
    "precision": (["--precision", "float32"], lambda work: work.options.precision, "float32"),
    "memory": (["--memory", "500MB"], lambda work: work.options.memory_gb, 0.5),
    "roi": (["--roi", "r"], lambda work: work.roi, HERE / "r"),
    "roi_margin": (["--roi-margin", "7"], lambda work: work.roi_margin_mm, 7.0),
    "network": (["--network", "nets:make"], lambda work: work.network, "nets:make"),
}


def type_words(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Request:
    """What the command line makes of words."""
    seen = []

    def take(self: Request) -> BatchResult:
        seen.append(self)
        return BatchResult()

    monkeypatch.setattr(Request, "run", take)
    monkeypatch.setattr("volseg.cli.own_code.take_code_of", lambda *_: None)
    assert main(["predict", "m", "-o", "o", *words]) == 0
    return seen[0]


@pytest.mark.parametrize("name", WORDS)
def test_a_word_decides_what_it_names_and_nothing_else(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, find, expected = WORDS[name]
    plain = type_words([], monkeypatch).make_work()
    work = type_words(words, monkeypatch).make_work()
    assert find(plain) != find(work) == expected
    for other, (_, find_other, _) in WORDS.items():
        if other != name:
            assert find_other(work) == find_other(plain), other
    assert work.outputs.folder == HERE / "o"


def test_words_that_say_who_does_it(
    run: Path, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def predict(cluster: Cluster, work: Work, cases: list[Any], on_case: object) -> BatchResult:
        given.update(cluster=cluster, cases=cases)
        return BatchResult()

    monkeypatch.setattr(cluster, "predict_on_cluster", predict)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: given.update(threads=number))
    words = ["--ray", "head:6379", "--threads", "3", "--shard", "2/2"]
    assert main(["predict", str(run), str(balls / "imagesTr"), "-o", str(tmp_path), *words]) == 0
    assert given["cluster"] == Cluster("head:6379", 3)
    assert given["threads"] == 3
    assert len(given["cases"]) == 2


@pytest.mark.parametrize(("torchs", "expected"), [(64, 4), (4, 4), (1, 1)])
def test_threads_are_those_that_there_are_cores_for(
    torchs: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: torchs)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(predicting, "count_cores", lambda: 4)
    set_threads(None)
    set_threads(9)
    assert given == [expected, 9]
    with pytest.raises(ConfigError, match="--threads 0; expected 1 or more"):
        set_threads(0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("8GB", 8.0),
        ("8", 8.0),
        ("1.5 g", 1.5),
        ("500MB", 0.5),
        ("2tb", 2000.0),
        ("250000K", 0.25),
        ("8GiB", 8.589934592),
        ("512Mi", 0.536870912),
        ("1 TiB", 1099.511627776),
    ],
)
def test_memory_as_people_write_it(text: str | None, expected: float | None) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "much", "8XB", "-1GB", "0", "1.2.3GB", "8 GB 2", "GB"])
def test_what_is_no_memory_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a size, as in 8GB or 500MB"):
        parse_memory(text)


def test_least_volumes() -> None:
    assert parse_least([]) == {}
    assert parse_least(["tumour=0.5", "a=b=2", "all=1e-3"]) == {
        "tumour": 0.5,
        "a=b": 2.0,
        "all": 0.001,
    }
    for word in ("tumour", "tumour=", "=1", "tumour=much", ""):
        with pytest.raises(ConfigError, match=r"expected CLASS=ML, as in tumour=0\.5"):
            parse_least([word])
