"""An engine without a model, for fault tests (`BLIP_ENGINE=dry_engine:Engine`): a text may order a fault.

A result names the mean colour of its pixels, so tests see that the right image met the right text.
"""

import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from numpy import float32

from blip_engine.errors import CheckpointError, InputError
from blip_engine.filtering import filtered
from blip_engine.requests import Answer, BatchReport, Caption, Embedding, Match, Request, Result


@dataclass(frozen=True)
class ModelInfo:
    name: str
    task: str
    source: str
    revision: str | None
    weights_sha256: str
    image_size: tuple[int, int]
    precision: str
    device: str = "cpu"


class Engine:
    """Batches whatever is queued, so that a fault meets neighbours."""

    def __init__(self, device: str = "auto", precision: str = "auto", compiled: bool | None = None) -> None:
        if {"broken", "cuda:99"} & {device, precision}:
            raise RuntimeError("no such device")
        self._precision = precision
        self.on_batch: Callable[[BatchReport], None] | None = None
        self._queue: queue.SimpleQueue[tuple[Request, Future[list[Result]]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def load_model(self, name: str, model: str, task: str) -> ModelInfo:
        if model.endswith("absent"):
            raise CheckpointError(f"model {model!r}: no such directory")
        if model.endswith("deadly"):
            os.kill(os.getpid(), signal.SIGKILL)
        while (order := Path(model, "order:load slowly")).exists():  # until the test takes it away
            order.with_name("loading").touch()
            time.sleep(0.02)
        return ModelInfo(name, task, model, None, "0" * 64, (32, 32), self._precision)

    def submit(self, request: Request) -> "Future[list[Result]]":
        future: Future[list[Result]] = Future()
        if any(len(text) > 500 for text in request.texts):
            future.set_exception(InputError("the text has more than 500 characters"))
        else:
            self._queue.put((request, future))
        return future

    def _work(self) -> None:
        while True:
            batch = [self._queue.get()]
            time.sleep(0.002)
            while not self._queue.empty() and len(batch) < 16:
                batch.append(self._queue.get())
            self._run(batch)

    def _run(self, batch: "list[tuple[Request, Future[list[Result]]]]") -> None:
        started = time.perf_counter()
        orders = " ".join(text for request, _ in batch for text in request.texts)
        if "order:die" in orders:
            os.kill(os.getpid(), signal.SIGKILL)
        if "order:kill the worker" in orders:
            os.kill(os.getppid(), signal.SIGKILL)
        if "order:hang" in orders:
            time.sleep(3600)
        if "order:slow" in orders:
            time.sleep(0.02 * len(batch))
        if "order:batch well" in orders:
            time.sleep(0.1)  # whatever its size, as a GPU does
        if self.on_batch is not None:
            busy, task = time.perf_counter() - started, batch[0][0].task
            texts = sum(len(request.texts) for request, _ in batch)
            self.on_batch(BatchReport(task, len(batch), texts, busy, {"vision": busy / 2, "text": busy / 2}, 0))
        for request, future in batch:
            if "order:raise" in orders:
                future.set_exception(RuntimeError("a kernel failed"))
            elif "order:memory" in " ".join(request.texts):
                future.set_exception(MemoryError())
            else:
                future.set_result([answer(request, text) for text in request.texts])


def answer(request: Request, text: str) -> Result:
    colour = ",".join(str(round(float(c))) for c in request.pixels.mean(axis=(0, 1)))
    if (log := os.environ.get("DRY_ENGINE_LOG")) is not None:
        with Path(log).open("a") as file:
            file.write(f"{colour} {text}\n")
    if request.task == "caption":
        return Caption(f"{colour} {text}".strip(), -0.5, (1, 2, 3))
    if request.task == "vqa":
        ranking = tuple((answer, -float(n)) for n, answer in enumerate(request.candidates))
        return Answer(*ranking[0], ranking) if ranking else Answer(f"{colour} {text}", -0.25)
    if request.task == "embed":
        vector = tuple(float(f"{float32(c / 255):.8e}") for c in request.pixels.mean(axis=(0, 1)))
        return Embedding(vector, (0.5, 0.25, float(len(text))) if text else None)
    if request.task == "capfilt":
        caption = Caption(f"{colour} by {request.model}", -0.5, (1, 2, 3))
        return filtered(caption, text or None, {text: float("right" in text), caption.text: 0.75})
    return Match(0.75, 0.5, 1.0)
