"""An engine that begins with the next batch's images beside this one's texts: the order, the same bits, and faults."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blip_engine import Engine
from blip_engine.requests import TASKS, BatchReport, Request, Result, Task, options_for
from blip_engine.resident import Shapes
from blip_engine.runner import Begun, Prepared

WAIT = 60
RANDOM = np.random.default_rng(1)
IMAGES = [RANDOM.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(13)]
TEXTS: dict[Task, tuple[str, ...]] = {"caption": ("",), "vqa": ("what is this ?", "how many dogs ?"), "itm": ("a dog",)}


def load(checkpoints: Path, device: torch.device, overlap: bool, precision: str = "fp32") -> Engine:
    """Three batches of four images, and one of one."""
    models: dict[str, str] = {task: str(checkpoints / task) for task in TASKS}
    engine = Engine.load(models, str(device), precision, overlap=overlap)
    for runner in engine._runners.values():
        runner.resident.shapes = Shapes(2, 4)
    return engine


@pytest.fixture
def engine(checkpoints: Path, device: torch.device) -> Iterator[Engine]:
    with load(checkpoints, device, overlap=True) as engine:
        yield engine


def gathered(engine: Engine, tasks: tuple[Task, ...] = ("caption",)) -> "list[Future[list[Result]]]":
    """All asked before the engine may begin."""
    held = threading.Event()
    engine._steps.call(held.wait)
    asked = [Request(task, task, pixels, TEXTS[task], options_for(task, {})) for pixels in IMAGES for task in tasks]
    futures = [engine.submit(request) for request in asked]
    held.set()
    return futures


def results(futures: "list[Future[list[Result]]]") -> list[list[Result]]:
    return [future.result(WAIT) for future in futures]


@pytest.fixture
def truth(checkpoints: Path, device: torch.device) -> list[list[Result]]:
    with load(checkpoints, device, overlap=False) as engine:
        return results(gathered(engine))


def watch(engine: Engine, monkeypatch: pytest.MonkeyPatch, fails: dict[tuple[str, int], Exception]) -> list[str]:
    """The halves of the caption batches in the order they run; those in `fails`, by half and number, fail."""
    runner, seen = engine._runners["caption"], []
    begin, finish = runner.begin, runner.finish

    def note(half: str) -> None:
        seen.append(half)
        if (error := fails.pop((half, seen.count(half)), None)) is not None:
            raise error

    def begun(batch: list[Prepared]) -> Begun:
        note("begin")
        return begin(batch)

    def finished(half: Begun) -> list[list[Result]]:
        note("finish")
        return finish(half)

    monkeypatch.setattr(runner, "begin", begun)
    monkeypatch.setattr(runner, "finish", finished)
    return seen


def test_the_next_batch_begins_before_this_one_is_finished(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(engine, monkeypatch, {})
    results(gathered(engine))
    assert seen.count("begin") == seen.count("finish") == 4
    ahead = [seen[: place + 1].count("begin") - seen[:place].count("finish") for place in range(len(seen))]
    assert max(ahead) == 2  # never more than the next
    assert seen[:5] == ["begin", "begin", "finish", "begin", "finish"]  # the last batch is not full: it may come later


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_results_are_the_same_bits(checkpoints: Path, device: torch.device, precision: str) -> None:
    with (
        load(checkpoints, device, False, precision) as usual,
        load(checkpoints, device, True, precision) as overlapping,
    ):
        expected = results(gathered(usual, TASKS))
        for _ in range(3):  # on a GPU the second batch of a kind is captured, and the third replayed
            assert results(gathered(overlapping, TASKS)) == expected


def test_embeddings_too(checkpoints: Path, device: torch.device) -> None:
    with load(checkpoints, device, False) as usual, load(checkpoints, device, True) as overlapping:
        found = []
        for engine in (usual, overlapping):
            asked = [Request("itm", "embed", pixels, ("a dog", ""), options_for("embed", {})) for pixels in IMAGES]
            found.append([future.result(WAIT) for future in [engine.submit(request) for request in asked]])
        assert found[0] == found[1]


def test_images_that_find_no_memory_beside_another_batch_are_run_alone(
    engine: Engine, truth: list[list[Result]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(engine, monkeypatch, {("begin", 2): torch.OutOfMemoryError("none left")})
    assert results(gathered(engine)) == truth
    assert seen.count("begin") == 5
    assert engine.oom_splits == 0


def test_out_of_memory_gives_up_the_overlap_first(
    engine: Engine, truth: list[list[Result]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen = watch(engine, monkeypatch, {("finish", 2): torch.OutOfMemoryError("none left")})
    assert results(gathered(engine)) == truth
    assert engine.oom_splits == 0
    assert "the next batch no longer begins beside this one" in caplog.text
    del seen[:]
    assert results(gathered(engine)) == truth
    assert seen == ["begin", "finish"] * 4


def test_then_it_halves(engine: Engine, truth: list[list[Result]], monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [torch.OutOfMemoryError("none left") for _ in range(2)]
    watch(engine, monkeypatch, {("finish", 2): errors[0], ("finish", 3): errors[1]})
    found = results(gathered(engine))
    assert [caption.text for (caption,) in found] == [caption.text for (caption,) in truth]  # type: ignore[union-attr]
    assert engine.oom_splits == 1


def test_a_batch_that_fails_leaves_the_one_beside_it_alone(
    engine: Engine, truth: list[list[Result]], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(engine, monkeypatch, {("finish", 2): RuntimeError("a kernel failed")})
    assert results(gathered(engine)) == truth  # each of its rows was tried again, by itself


def test_what_a_failed_batch_held_is_freed_before_it_is_tried_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, held, alive = engine._runners["caption"], [], []
    finish = runner.finish

    class Large:
        """Stands for what a step takes of the memory."""

        def __del__(self) -> None:
            held.pop()

    def failing(begun: Begun) -> list[list[Result]]:
        alive.append(len(held))
        held.append(True)
        large: Any = Large()
        if len(alive) < 3:
            raise torch.OutOfMemoryError("none left")
        del large
        return finish(begun)

    monkeypatch.setattr(runner, "finish", failing)
    results(gathered(engine))
    assert set(alive) == {0}


def test_time_is_counted_once(engine: Engine) -> None:
    reports: list[BatchReport] = []
    engine.on_batch = reports.append
    started = time.perf_counter()
    results(gathered(engine))
    took = time.perf_counter() - started
    assert sum(report.requests for report in reports) == len(IMAGES)
    assert 0 < sum(report.busy_seconds for report in reports) <= took


def test_closing_finishes_what_has_begun(checkpoints: Path, device: torch.device) -> None:
    engine = load(checkpoints, device, overlap=True)
    futures = gathered(engine)
    engine.close()
    assert all(future.done() and future.exception() is None for future in futures)
