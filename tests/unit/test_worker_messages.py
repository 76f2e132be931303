"""How many messages cross between a worker's processes, counted: they, not the rows, cost the parent its time."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from io import BytesIO
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import numpy as np
import pytest
from PIL import Image

from blip_engine.requests import Caption, options_for
from workers.children import Supervisor
from workers.engine_child import _Server
from workers.engine_process import EngineProcess, EngineSettings
from workers.load import Loads, decode_into
from workers.loader import LoaderLimits, LoaderPool, _Loader
from workers.messages import Ask, Failure, Loaded, Run
from workers.slots import LOADED, Slots

SIZE = (24, 32)
SupervisorT = TypeVar("SupervisorT", bound=Supervisor)


class Pipe:
    """Our end of a child's pipe: what is sent is kept, what is received was given."""

    def __init__(self, given: Sequence[Any] = ()) -> None:
        self.sent: list[Any] = []
        self._given = iter(given)

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def recv(self) -> Any:
        try:
            return next(self._given)
        except StopIteration:
            raise EOFError from None


def connection(pipe: Pipe) -> Connection:
    return cast(Connection, pipe)


def test_more_pixels_than_pillow_takes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLIP_MAX_IMAGE_PIXELS decides, upwards too."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    file = BytesIO()
    Image.new("RGB", (40, 30)).save(file, "PNG")
    for pixels, found in (
        (1200, (8, 8)),
        (1199, Failure("image_too_large", "image of 40x30 pixels; limit 1199 (BLIP_MAX_IMAGE_PIXELS)")),
    ):
        assert decode_into(Slots(1), 0, file.getvalue(), (8, 8), LoaderLimits(10**6, pixels, 5.0, 30.0)) == found


def limits(**more: Any) -> LoaderLimits:
    return LoaderLimits(10**6, 10**6, 5.0, 30.0, **more)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


@contextmanager
def unstarted(supervisor: SupervisorT) -> Iterator[SupervisorT]:
    """One whose thread never runs: this one does its work."""
    try:
        yield supervisor
    finally:
        for open_one in (supervisor._selector, supervisor._wake_read, supervisor._wake_write):
            open_one.close()


def test_what_waits_goes_to_the_loaders_in_a_message_each() -> None:
    pipes = [Pipe(), Pipe()]
    with unstarted(LoaderPool(2, Slots(64), limits(fetches=6), lambda _: None)) as pool:
        for pipe in pipes:
            pool._loaders.append(_Loader(cast(Any, SimpleNamespace(pipe=pipe, send=pipe.send)), ready=True))
        for slot in range(64):
            pool.load(slot, f"/{slot}", SIZE, SimpleQueue(), slot)
        pool._run_calls()
        pool._pump()
    assert [[len(message) for message in pipe.sent] for pipe in pipes] == [[8], [8]]  # 6 to fetch and 2 behind
    assert sorted(ask.slot for pipe in pipes for ask in pipe.sent[0]) == list(range(16))


def test_answers_of_a_loader_come_together(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.load._QUICK_SECONDS", 20.0)  # on any machine
    slots, answers = Slots(16), Pipe()
    loads = Loads(connection(answers), slots, limits(fetches=0))
    monkeypatch.setattr(loads, "_read", lambda: None)
    for slot in range(10):
        loads._fetched.put((Ask(slot, str(image), SIZE), image.read_bytes(), 0.0))

    def send(message: list[Loaded]) -> None:
        answers.sent.append(message)
        if sum(map(len, answers.sent)) == 10:
            loads._fetched.put(None)

    monkeypatch.setattr(answers, "send", send)
    loads.serve()
    assert [len(message) for message in answers.sent] == [4, 4, 2]
    assert all(isinstance(loaded, Loaded) and loaded.outcome == SIZE for message in answers.sent for loaded in message)
    assert {slots.phase(slot) for slot in range(10)} == {LOADED}


def test_fetching_goes_on_while_an_image_is_decoded(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And by several threads at once."""
    asked = [Ask(slot, slot, SIZE) for slot in range(8)]
    given = iter([asked[:5], asked[5:]])
    together = threading.Barrier(4)

    def fetch(location: int, *_: object) -> bytes:
        together.wait(20)  # none is through before four are at it
        return image.read_bytes()

    monkeypatch.setattr("workers.load.fetch", fetch)
    answers = Pipe()
    loads = Loads(connection(answers), Slots(8), limits(fetches=4))
    monkeypatch.setattr(answers, "recv", lambda: next(given, None) or threading.Event().wait())
    done: list[Loaded] = []

    def send(message: list[Loaded]) -> None:
        done.extend(message)
        if len(done) == len(asked):
            loads._fetched.put(None)

    monkeypatch.setattr(answers, "send", send)
    loads.serve()
    assert sorted(loaded.slot for loaded in done if loaded.outcome == SIZE) == list(range(8))


def run_of(slot: int) -> Run:
    return Run("caption:m", "caption", slot, (384, 384), (f"a prompt {slot}",), options_for("caption", OPTIONS))


OPTIONS = {"num_beams": 5, "repetition_penalty": 1.25}


def test_runs_go_to_the_engine_in_one_message_that_holds_the_options_once() -> None:
    pipe, options = Pipe(), options_for("caption", OPTIONS)
    with unstarted(EngineProcess(EngineSettings("", "cpu", "fp32", 1, 1), Slots(1), lambda _: None)) as engine:
        engine._child, engine._ready = cast(Any, SimpleNamespace(pipe=pipe, send=pipe.send)), True
        for slot in range(64):
            run = Run("caption:m", "caption", slot, (384, 384), (f"a prompt {slot}",), options)
            engine.submit(run, SimpleQueue(), slot)
        engine._run_calls()
        engine._pump()
    (message,) = pipe.sent
    assert len(message) == 64
    alone = len(bytes(ForkingPickler.dumps(message[:1])))
    assert len(bytes(ForkingPickler.dumps(message))) < alone + 63 * 80  # bytes for each more


def test_answers_of_the_engine_come_together() -> None:
    class Engine:
        def submit(self, request: Any) -> "Future[Any]":
            future: Future[Any] = Future()
            future.set_result([Caption("a cat", -0.5, (1, 2))])
            return future

    pipe = Pipe([[(slot, run_of(slot)) for slot in range(100)]])
    slots = Slots(100)
    server = _Server(connection(pipe), slots, Engine())
    for run_id, run in pipe.recv():
        server._run(run_id, run)
    server._answers.put(("end", None))
    pipe_sent = pipe.sent

    def send(message: list[Any]) -> None:
        pipe_sent.append(message)
        if message[-1][0] == "end":
            raise OSError

    pipe.send = send  # type: ignore[method-assign]
    server._send_answers()
    assert [len(message) for message in pipe_sent] == [64, 37]
