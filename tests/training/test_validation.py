"""Validation during training where memory is short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from volseg.data.cache import build_cache
from volseg.data.layouts import find_dataset
from volseg.inference.model import load_model
from volseg.training import validation
from volseg.training.validation import validate

CPU = torch.device("cpu")


def test_windows_come_one_by_one_where_memory_is_short(
    run: Path,
    balls: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    dataset, model = find_dataset(balls), load_model(run, "cpu")
    plan = model.facts.plan
    cases = build_cache(dataset, dataset.cases[:2], plan, tmp_path)
    expected = validate(model.networks[0], cases, plan, dataset.classes, CPU)
    stream, asked = validation.stream_scores, []

    def fail(*arguments: Any, **options: Any) -> Any:
        asked.append(options["at_once"])
        if options["at_once"] > 1:
            raise RuntimeError("CUDA out of memory")
        return stream(*arguments, **options)

    monkeypatch.setattr(validation, "count_at_once", lambda *_: 4)
    monkeypatch.setattr(validation, "stream_scores", fail)
    found = validate(model.networks[0], cases, plan, dataset.classes, CPU)
    assert asked == [4, 1, 4, 1]
    assert found == pytest.approx(expected, abs=1e-6)
    assert "validation takes its windows one by one" in caplog.text


def test_other_errors_are_none_of_memory(
    run: Path, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("something else")

    dataset, model = find_dataset(balls), load_model(run, "cpu")
    cases = build_cache(dataset, dataset.cases[:1], model.facts.plan, tmp_path)
    monkeypatch.setattr(validation, "stream_scores", fail)
    with pytest.raises(RuntimeError, match="something else"):
        validate(model.networks[0], cases, model.facts.plan, dataset.classes, CPU)


def test_windows_one_by_one_on_the_cpu_are_not_tried_twice(
    run: Path, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fail(*arguments: Any, **options: Any) -> Any:
        asked.append(options["at_once"])
        raise MemoryError

    dataset, model = find_dataset(balls), load_model(run, "cpu")
    cases = build_cache(dataset, dataset.cases[:1], model.facts.plan, tmp_path)
    monkeypatch.setattr(validation, "count_at_once", lambda *_: 1)
    monkeypatch.setattr(validation, "stream_scores", fail)
    with pytest.raises(MemoryError):
        validate(model.networks[0], cases, model.facts.plan, dataset.classes, CPU)
    assert asked == [1]
