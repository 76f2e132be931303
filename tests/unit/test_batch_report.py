"""What the engine tells of its batches: every request once, before its future settles, in plain numbers."""

import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from small_models import save_checkpoint

from blip_engine import Engine
from blip_engine.requests import BatchReport, Request, Result, options_for
from blip_engine.runner import Begun
from blip_engine.stopwatch import Stopwatch

IMAGES = [np.full((32, 32, 3), shade, dtype=np.uint8) for shade in range(20)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("models")
    for task in ("caption", "itm"):
        save_checkpoint(folder / task, task)
    models = {task: str(folder / task) for task in ("caption", "itm")}
    with Engine.load(models, device=str(device), precision="fp32") as engine:
        yield engine


def test_every_request_is_in_one_report_before_its_future_settles(engine: Engine) -> None:
    reports: list[BatchReport] = []
    seen: list[int] = []
    engine.on_batch = reports.append
    options = options_for("itm", {})
    asked = [Request("itm", "itm", pixels, ("a cat", "a dog"), options) for pixels in IMAGES]
    futures = [engine.submit(request) for request in asked]
    for future in futures:
        future.add_done_callback(lambda _: seen.append(len(reports)))
    for future in futures:
        future.result(60)
    assert min(seen) >= 1
    assert sum(report.requests for report in reports) == len(IMAGES)
    assert sum(report.texts for report in reports) == 2 * len(IMAGES)
    assert {report.task for report in reports} == {"itm"}
    for report in reports:
        assert set(report.stage_seconds) == {"vision", "text"}
        assert 0 < sum(report.stage_seconds.values()) <= report.busy_seconds * 1.05
        assert pickle.loads(pickle.dumps(report)) == report


@pytest.mark.parametrize("task", ["caption", "embed"])
def test_the_task_is_the_requests_own(engine: Engine, task: str) -> None:
    reports: list[BatchReport] = []
    engine.on_batch = reports.append
    model = "itm" if task == "embed" else task
    engine.submit(Request(model, task, IMAGES[0], ("",), options_for(task, {}))).result(60)  # type: ignore[arg-type]
    assert [(report.task, report.requests) for report in reports] == [(task, 1)]


def test_a_batch_that_fails_is_not_reported(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[BatchReport] = []
    engine.on_batch = reports.append

    def broken(_: object) -> None:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(engine._runners["caption"], "finish", broken)
    future = engine.submit(Request("caption", "caption", IMAGES[0], ("",), options_for("caption", {})))
    with pytest.raises(RuntimeError, match="a kernel failed"):
        future.result(60)
    assert reports == []


def test_halved_batches_are_told_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[BatchReport] = []
    engine.on_batch = reports.append
    runner = engine._runners["caption"]
    finish = runner.finish
    failures = iter([torch.OutOfMemoryError("none left")])

    def short(begun: Begun) -> list[list[Result]]:
        if (error := next(failures, None)) is not None:
            raise error
        return finish(begun)

    monkeypatch.setattr(runner, "finish", short)
    for _ in range(2):
        engine.submit(Request("caption", "caption", IMAGES[0], ("",), options_for("caption", {}))).result(60)
    assert [report.oom_splits for report in reports] == [1, 0]


def test_time_that_is_no_stage_is_not_told(device: torch.device) -> None:
    watch = Stopwatch(device)
    watch.mark("vision")
    watch.mark(None)
    watch.mark("vision")
    assert set(watch.stop("text")) == {"vision", "text"}
