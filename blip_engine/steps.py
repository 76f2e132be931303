"""The engine's thread: it takes batches, runs them and settles their futures. Every future settles, whatever happens.

Whatever computes runs in this thread, loading too. If a second thread of the process used torch, their OpenMP threads
would be more than the processors, and libgomp lets such threads sleep between operators instead of waiting for the next
one. That took a base model on two cores an eighth of its speed, and in int8 nearly a third.

With `overlap` the images of the next batch are given to the device before the texts of this one are decoded, in a
stream of their own (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-streams). Decoding is many small kernels
that wait for each other, and now and then for the host; those of the vision tower fill the device meanwhile.
"""

import logging
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch

from .batcher import Batcher
from .errors import EngineClosedError
from .requests import BatchReport, Result
from .runner import AnswerRunner, Begun, CaptionRunner, MatchRunner, Prepared
from .stopwatch import Stopwatch

_log = logging.getLogger(__name__)

AnyRunner: TypeAlias = CaptionRunner | AnswerRunner | MatchRunner
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Entry:
    """A queued request."""

    runner: AnyRunner
    prepared: Prepared
    future: "Future[list[Result]]"
    weight: int  # in groups of texts
    capacity: int
    least: int  # images that the vision tower takes at once

    @property
    def group(self) -> Hashable:
        request = self.prepared.request
        return request.model, request.task, request.options, bool(request.candidates)


@dataclass(frozen=True, eq=False)
class _Call:
    """Something else that is to run in the engine's thread."""

    work: Callable[[], Any]
    future: "Future[Any]"
    weight: int = 1
    capacity: int = 1
    least: int = 1

    @property
    def group(self) -> Hashable:
        return self  # so it is a batch by itself

    def run(self) -> None:
        try:
            result = self.work()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


@dataclass
class _Started:
    """A batch whose images are encoded, or on their way through the device."""

    batch: list[Entry]
    begun: Begun | None  # None: its second half has begun too
    watch: Stopwatch
    at: float
    images_done: Any  # the event of their stream; None: they are in the stream of the texts


class Steps:
    """The queue of one device, and what runs it."""

    def __init__(self, device: torch.device, overlap: bool) -> None:
        self.batcher: Batcher[Entry | _Call] = Batcher()
        self.oom_splits = 0  # how often the device ran out of memory and batches were halved
        self.on_batch: Callable[[BatchReport], None] | None = None
        self.runners: list[AnyRunner] = []  # all of this device: their memory goes first where it runs out
        self._device, self._overlaps = device, overlap
        self._beside = torch.cuda.Stream(device) if overlap and device.type == "cuda" else None
        self._following: _Started | None = None  # beside the batch that runs
        self._splits_told, self._ended = 0, 0.0

    def call(self, work: Callable[[], ResultT]) -> "Future[ResultT]":
        """Have something run between two batches. The future fails with EngineClosedError when it is too late."""
        future: Future[ResultT] = Future()
        future.set_running_or_notify_cancel()  # a cancelled one would refuse its result and end the engine's thread
        if not self.batcher.put(_Call(work, future)):
            future.set_exception(EngineClosedError("the engine is closed"))
        return future

    def serve(self) -> None:
        """Run batches until the queue is closed and empty."""
        if self._device.index is not None and self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # what names no device means this one: events, streams, kernels
        current: _Started | None = None
        while True:
            taken = self.batcher.take(wait=current is None)
            if taken is None and current is None:
                return
            batch = [entry for entry in taken or () if isinstance(entry, Entry)]
            self._following = self._started_beside(batch) if batch and self._overlaps else None
            if current is not None:
                self._run(current.batch, current)
            for entry in taken or ():
                if isinstance(entry, _Call):
                    entry.run()
            if batch and self._following is None:
                self._run(batch)
            current, self._following = self._following, None

    def _started_beside(self, batch: list[Entry]) -> _Started | None:
        try:
            return self._start(batch, self._beside)
        except Exception:  # it is run alone then, and fails again or does not
            _log.debug("a batch could not be started beside another one", exc_info=True)
            return None

    def _start(self, batch: list[Entry], beside: Any = None) -> _Started:
        side: AbstractContextManager[Any] = nullcontext()
        if beside is not None:
            # What reads memory that this stream will use again was queued before: there is nothing else to wait for.
            beside.wait_stream(torch.cuda.current_stream(self._device))
            side = torch.cuda.stream(beside)
        with side:
            watch, at = Stopwatch(self._device), time.perf_counter()
            begun = batch[0].runner.begin([entry.prepared for entry in batch])
            watch.mark("vision")
            return _Started(batch, begun, watch, at, beside.record_event() if beside is not None else None)

    def _run(self, batch: list[Entry], started: _Started | None = None) -> None:
        try:
            results = self._finish(started or self._start(batch))
        except Exception as error:  # out of memory it is run again, smaller; else row by row; a row's is its own
            traceback.clear_frames(error.__traceback__)  # they hold what the batch took of the memory
            failure = error
        else:
            for entry, result in zip(batch, results, strict=True):
                entry.future.set_result(result)
            return
        self._after_failure(batch, failure)

    def _finish(self, started: _Started) -> Sequence[list[Result]]:
        begun, started.begun = started.begun, None
        if begun is None:
            raise ValueError("a batch is finished once")
        if started.images_done is not None:
            torch.cuda.current_stream(self._device).wait_event(started.images_done)
        started.watch.mark(None)
        results = started.batch[0].runner.finish(begun)
        self._report(started)
        return results

    def _report(self, started: _Started) -> None:
        stages, now = started.watch.stop("text"), time.perf_counter()
        busy, self._ended = now - max(started.at, self._ended), now
        if self.on_batch is None:
            return
        requests = [entry.prepared.request for entry in started.batch]
        splits, self._splits_told = self.oom_splits - self._splits_told, self.oom_splits
        texts = sum(len(request.texts) for request in requests)
        self.on_batch(BatchReport(requests[0].task, len(requests), texts, busy, stages, splits))

    def _after_failure(self, batch: list[Entry], error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError) and self._made_room(batch[0].runner):
            self._run(batch)
        elif len(batch) == 1:
            batch[0].future.set_exception(error)
        else:
            for entry in batch:
                self._run([entry])

    def _made_room(self, runner: AnyRunner) -> bool:
        """Whether there is less to hold from now on: one batch instead of two, or smaller ones."""
        try:
            return self._shrunk(runner)
        except Exception:  # the batch fails with what it failed with, and this thread goes on
            _log.exception("batches could not be made smaller")
            return False

    def _shrunk(self, runner: AnyRunner) -> bool:
        shapes = runner.resident.shapes
        if self._following is not None:
            self._following, self._overlaps = None, False
            torch.cuda.empty_cache()
            _log.warning("out of device memory: the next batch no longer begins beside this one")
        elif shapes != shapes.halved():
            self.oom_splits += 1
            for each in self.runners:
                each.forget()
            torch.cuda.empty_cache()
            runner.resize(shapes.halved())
            _log.warning("out of device memory: batches of %s are now %s", shapes, runner.resident.shapes)
        else:
            return False
        return True
