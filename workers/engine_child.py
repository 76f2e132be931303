"""Inside the engine process: it owns the device, and answers loads and runs that come through its pipe.

In: `Load`, or a list of `(id, Run)`. Out: lists of `("ready", None)` or `("broken", why)` once; then `("loaded", (name,
Checkpoint))`, `("refused", (name, why))`, `("done", (id, results))`, `("failed", (id, code, why))`, where the code is
one of the records' or UNEXPECTED: perhaps a batch-mate's fault, so the run is worth another try alone; and `("batch",
BatchReport)` before the answers of that batch.
"""

import logging
import os
import threading
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, Final

from blip_engine.errors import BlipError, InputError
from blip_engine.memory import keep_memory
from blip_engine.requests import Request

from .cpus import settle_threads
from .messages import Checkpoint, Load, Run
from .slots import Slots

_log = logging.getLogger(__name__)

UNEXPECTED: Final = "unexpected"
_MOST_TOGETHER: Final = 64  # answers in a message
STICKY_EXIT: Final = 75  # the device is unusable for this process from now on


def engine_main(
    pipe: Connection, slots: Slots, factory: str, device: str, precision: str, compiled: bool | None
) -> None:
    """The process: builds the engine, then serves messages until the pipe closes."""
    keep_memory()
    settle_threads()
    try:
        module, _, name = factory.partition(":")
        engine = getattr(import_module(module), name)(device=device, precision=precision, compiled=compiled)
    except Exception as error:
        hint = "; install blip-batch[worker]" if isinstance(error, ImportError) else ""
        why = f"{error}{hint}" if isinstance(error, BlipError | ImportError) else repr(error)
        pipe.send([("broken", why)])
        return
    _Server(pipe, slots, engine).serve()


class _Server:
    def __init__(self, pipe: Connection, slots: Slots, engine: Any) -> None:
        self._pipe, self._slots, self._engine = pipe, slots, engine
        engine.on_batch = partial(self._send, "batch")
        self._answers: SimpleQueue[tuple[str, object]] = SimpleQueue()  # from the engine's own threads

    def serve(self) -> None:
        threading.Thread(target=self._send_answers, name="answers", daemon=True).start()
        self._send("ready", None)
        while True:
            message = self._pipe.recv()
            if isinstance(message, Load):
                self._load(message)
                continue
            for run_id, run in message:
                self._run(run_id, run)

    def _send(self, kind: str, content: object) -> None:
        self._answers.put((kind, content))

    def _send_answers(self) -> None:
        """All that are there in one message: a batch's come at once, and waking the parent costs more than a result."""
        with suppress(OSError):  # the parent is gone
            while True:
                together = [self._answers.get()]
                with suppress(Empty):
                    while len(together) < _MOST_TOGETHER:
                        together.append(self._answers.get_nowait())
                self._pipe.send(together)

    def _load(self, load: Load) -> None:
        try:
            info = self._engine.load_model(load.name, load.model, load.task)
            found = Checkpoint(
                load.name, info.source, info.revision, info.weights_sha256, tuple(info.image_size),
                precision=info.precision, device=info.device,
            )  # fmt: skip
            self._send("loaded", (load.name, found))
        except BlipError as error:  # fails the job that named this model
            self._send("refused", (load.name, str(error)))
        except Exception as error:
            _exit_if_sticky(error)
            _log.exception("loading %s", load.model)
            self._send("refused", (load.name, f"cannot load model {load.model!r}: {_line(error)}"))

    def _run(self, run_id: int, run: Run) -> None:
        try:
            pixels = self._slots.pixels(run.slot, run.size)  # not refilled before the answer
            request = Request(run.model, run.task, pixels, run.texts, run.options, run.candidates, run.judge)
            future = self._engine.submit(request)
        except Exception as error:
            self._fail(run_id, error)
            return
        future.add_done_callback(partial(self._settle, run_id))

    def _settle(self, run_id: int, future: "Future[Any]") -> None:
        error = future.exception()
        if error is None:
            self._send("done", (run_id, future.result()))
        else:
            self._fail(run_id, error)

    def _fail(self, run_id: int, error: BaseException) -> None:
        if isinstance(error, InputError):
            failure = getattr(error, "code", "text_too_long"), str(error)
        elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            failure = "out_of_memory", "not enough memory on the device for this image with its texts"
        else:
            _exit_if_sticky(error)
            _log.error("a run failed", exc_info=error)
            failure = UNEXPECTED, _line(error)
        self._send("failed", (run_id, *failure))


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]


def _exit_if_sticky(error: BaseException) -> None:
    """After an asynchronous device error every further call fails in this process: end it; the worker restarts it."""
    if type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
        _log.error("the device failed; ending the engine process", exc_info=error)
        os._exit(STICKY_EXIT)
