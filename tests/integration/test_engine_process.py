"""The engine process dies, hangs and fails; only the guilty image pays. Real processes, an engine without a model."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil
import pytest

from blip_engine.errors import CheckpointError
from blip_engine.requests import Caption, options_for
from workers.engine_process import EngineProcess, EngineSettings
from workers.messages import Failure, Run
from workers.slots import Slots

SIZE = (32, 32)


class Harness:
    """An engine process over 32 slots; slot n holds the colour (n, n, n)."""

    def __init__(self, **changes: Any) -> None:
        self.slots = Slots(32)
        for slot in range(32):
            self.slots.pixels(slot, SIZE)[...] = slot
        settings = {"device": "cpu", "run_timeout": 3.0, "load_timeout": 20.0} | changes
        self.broken: list[str] = []
        self.stopped = threading.Event()
        self.engine = EngineProcess(
            EngineSettings(factory="dry_engine:Engine", precision="auto", **settings), self.slots, self._break
        )
        self.engine.start()
        self.replies: SimpleQueue[tuple[Any, Any]] = SimpleQueue()

    def _break(self, why: str) -> None:
        self.broken.append(why)
        self.stopped.set()

    def run(self, texts: list[tuple[str, ...]]) -> list[Any]:
        """One run per slot; their outcomes in order."""
        self.engine.load_model("m", "caption").result(20)
        for slot, mine in enumerate(texts):
            self.submit(slot, mine)
        return self.outcomes(len(texts))

    def submit(self, slot: int, texts: tuple[str, ...]) -> None:
        run = Run("caption:m", "caption", slot, SIZE, texts, options_for("caption"))
        self.engine.submit(run, self.replies, slot)

    def outcomes(self, count: int) -> list[Any]:
        return [outcome for _, outcome in sorted(self.replies.get(timeout=40) for _ in range(count))]


@pytest.fixture
def harness() -> Iterator[Harness]:
    harness = Harness()
    yield harness
    harness.engine.close()


def caption(slot: int, text: str) -> list[Caption]:
    return [Caption(f"{slot},{slot},{slot} {text}".strip(), -0.5, (1, 2, 3))]


def test_runs_meet_their_own_pixels(harness: Harness) -> None:
    assert harness.run([(f"t{n}",) for n in range(32)]) == [caption(n, f"t{n}") for n in range(32)]


def test_no_submission_of_many_threads_is_lost(harness: Harness) -> None:
    harness.engine.load_model("m", "caption").result(20)

    def submit_and_wait(slot: int) -> None:
        for n in range(1500):  # one at a time: each wakes an engine thread that is about to sleep
            replies: SimpleQueue[tuple[Any, Any]] = SimpleQueue()
            run = Run("caption:m", "caption", slot, SIZE, (f"t{n}",), options_for("caption"))
            harness.engine.submit(run, replies, slot)
            assert replies.get(timeout=10) == (slot, caption(slot, f"t{n}"))

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(submit_and_wait, range(3)))


def test_several_texts_of_one_image(harness: Harness) -> None:
    assert harness.run([("a", "b")]) == [[*caption(0, "a"), *caption(0, "b")]]


def test_only_the_image_that_kills_the_engine_fails(harness: Harness) -> None:
    outcomes = harness.run([("order:die",) if n == 5 else (f"t{n}",) for n in range(12)])
    assert outcomes[5].code == "crashed"
    assert "signal 9" in outcomes[5].message
    assert [o for n, o in enumerate(outcomes) if n != 5] == [caption(n, f"t{n}") for n in range(12) if n != 5]
    assert harness.engine.restarts == 2  # among its neighbours, then alone


def test_only_the_image_that_hangs_the_engine_fails() -> None:
    harness = Harness(run_timeout=1.0)
    try:
        outcomes = harness.run([("order:hang",) if n == 2 else ("",) for n in range(6)])
    finally:
        harness.engine.close()
    assert outcomes[2].code == "crashed"
    assert "silent for 1 seconds" in outcomes[2].message
    assert [o for n, o in enumerate(outcomes) if n != 2] == [caption(n, "") for n in range(6) if n != 2]


def test_a_failure_in_company_is_tried_again_alone(harness: Harness) -> None:
    outcomes = harness.run([("order:raise",) if n == 3 else (f"t{n}",) for n in range(10)])
    assert outcomes[3] == Failure("internal", "RuntimeError: a kernel failed")
    assert [o for n, o in enumerate(outcomes) if n != 3] == [caption(n, f"t{n}") for n in range(10) if n != 3]
    assert harness.engine.restarts == 0


def test_input_and_memory_failures_have_their_codes(harness: Harness) -> None:
    outcomes = harness.run([("x" * 501,), ("order:memory",), ("fine",)])
    assert [getattr(o, "code", None) for o in outcomes] == ["text_too_long", "out_of_memory", None]


def test_a_sigkill_from_outside_blames_nobody(harness: Harness) -> None:
    harness.engine.load_model("m", "caption").result(20)
    for slot in range(8):
        harness.submit(slot, ("order:slow",))
    time.sleep(0.1)
    assert harness.engine.pid
    os.kill(harness.engine.pid, signal.SIGKILL)
    assert harness.outcomes(8) == [caption(n, "order:slow") for n in range(8)]


def test_an_idle_engine_that_dies_is_restarted_with_its_models(harness: Harness) -> None:
    harness.run([("a",)])
    assert harness.engine.pid
    os.kill(harness.engine.pid, signal.SIGKILL)
    time.sleep(0.2)
    harness.submit(1, ("b",))  # without loading again
    assert harness.outcomes(1) == [caption(1, "b")]


def test_a_model_that_cannot_be_loaded_is_refused_and_others_go_on(harness: Harness) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        harness.engine.load_model("absent", "caption").result(20)
    assert harness.run([("a",)]) == [caption(0, "a")]


def test_a_model_that_kills_the_engine_is_refused(harness: Harness) -> None:
    with pytest.raises(CheckpointError, match=r"signal 9.*while it loaded model 'deadly'"):
        harness.engine.load_model("deadly", "caption").result(30)
    assert harness.run([("a",)]) == [caption(0, "a")]


def test_it_is_loading_until_all_that_was_asked_for_is_there_and_again_after_a_death(
    harness: Harness, tmp_path: Path
) -> None:
    assert harness.engine.loading  # it starts
    harness.run([("a",)])
    assert not harness.engine.loading
    slow = tmp_path / "order:load slowly"
    slow.touch()
    future = harness.engine.load_model(str(tmp_path), "caption")
    until((tmp_path / "loading").exists)
    assert harness.engine.loading
    harness.submit(0, ("b",))  # of the other model: it waits too
    assert (harness.engine.loads, harness.engine.restarts) == (1, 0)
    assert harness.engine.pid
    os.kill(harness.engine.pid, signal.SIGKILL)
    until(lambda: harness.engine.restarts == 1)
    assert harness.engine.loading
    slow.unlink()
    assert future.result(20).source == str(tmp_path)
    assert harness.outcomes(1) == [caption(0, "b")]
    assert not harness.engine.loading
    assert harness.engine.loads == 3  # the first one's anew, and this one's


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_that_reads_no_more_is_replaced_though_what_it_is_sent_fills_its_pipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workers.children.STALL_SECONDS", 1.0)
    harness = Harness(run_timeout=2.0)
    try:
        harness.run([("a",)])
        assert harness.engine.pid
        os.kill(harness.engine.pid, signal.SIGSTOP)
        texts = [tuple(f"{slot}.{n:0400}" for n in range(200)) for slot in range(8)]  # 640 kB in all
        for slot in range(8):
            harness.submit(slot, texts[slot])
        found = harness.outcomes(8)
    finally:
        harness.engine.close()
    assert found == [[*(caption(slot, text)[0] for text in texts[slot])] for slot in range(8)]
    assert harness.engine.restarts == 1


def test_an_engine_that_cannot_start_is_one_line() -> None:
    harness = Harness(device="broken")
    assert harness.stopped.wait(20)
    harness.engine.close()
    assert harness.broken == ["the engine cannot start: RuntimeError('no such device')"]


def test_closing_leaves_no_process(harness: Harness) -> None:
    harness.run([("a",)])
    pid = harness.engine.pid
    assert pid
    harness.engine.close()
    assert not psutil.pid_exists(pid)
