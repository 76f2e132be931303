"""One worker: its children, its leases, and what becomes of a hint. `app` connects it to Celery.

Every hint ends in one of three ways, whatever happens on the way: it is acknowledged (`handle` returns), put back
(`PutBack`), or refused (`Refuse`: it is none). A chunk that is neither committed nor put back is found again by the
control loop once its lease has run out.
"""

import logging
import threading
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import LifoQueue
from typing import Any, Final

from blip_engine.errors import BlipError
from blip_engine.requests import TASKS, checkpoints_of
from orchestrator.contract import BadRow, Hint, Row
from orchestrator.errors import (
    BlipBatchError,
    JobError,
    NoCredentials,
    RedisUnavailable,
    SpecUnreadable,
    StoreUnavailable,
    UsageError,
)
from orchestrator.jobs import model_name
from orchestrator.ledger import QUEUE, Lease, Ledger
from orchestrator.logs import fields, more
from orchestrator.parts import describe, part_key, put_part
from orchestrator.scheduling import queue_of
from orchestrator.settings import Settings

from .engine_process import EngineProcess, EngineSettings
from .leases import Held, LeaseKeeper
from .loader import LoaderLimits, LoaderPool, loader_count
from .messages import Checkpoint
from .metrics import WorkerMetrics
from .openjob import OpenJob
from .pipeline import CarefulRun, ChunkRun, JobContext, Lane
from .slots import Slots

_log = logging.getLogger(__name__)

_CONDEMNED_AFTER: Final = 2  # deaths of workers at one row, alone
_BACK_OFF_SECONDS: Final = 2.0  # before a hint goes back because Redis or the store is away
_LOOK_SECONDS: Final = 60.0  # without credentials; then the process ends: another one, or elsewhere, may have some
_JOBS_KEPT: Final = 16
_POLL_SECONDS: Final = 0.25
_LONGEST_WHY: Final = 300  # characters of an exception, in a job's error


class PutBack(Exception):  # noqa: N818 - an outcome, not an error
    """The hint goes back to the queue."""


class Refuse(Exception):  # noqa: N818 - an outcome, not an error
    """The message is no hint; it is dropped."""


class _Abandon(Exception):  # noqa: N818 - an outcome, not an error
    """Stop working on this chunk: the lease is lost (`put_back` False), or this worker is about to end."""

    def __init__(self, why: str, put_back: bool) -> None:
        super().__init__(why)
        self.put_back = put_back


class Worker:
    """The children, lanes and leases of one worker process."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.name = name
        self.faulty = threading.Event()  # this worker cannot go on; `fault` says why
        self.fault = ""
        self.ledger = Ledger.connect(settings)
        self._settings = settings
        self.metrics = WorkerMetrics(settings)
        self._slots = Slots(settings.slots)
        limits = LoaderLimits(
            settings.max_image_bytes, settings.max_image_pixels, settings.fetch_timeout_seconds,
            settings.loader_timeout_seconds, settings.fetches, settings.resize == "pillow", settings.jpeg_draft,
        )  # fmt: skip
        loaders = loader_count(settings.loaders, settings.device)
        self.loaders = LoaderPool(loaders, self._slots, limits, self._break, self.metrics.loaded)
        timeouts = (settings.engine_timeout_seconds, settings.model_timeout_seconds)
        compiled = {"auto": None, "on": True, "off": False}[settings.compile]
        engine = EngineSettings(settings.engine, settings.device, settings.precision, *timeouts, compiled)
        self.engine = EngineProcess(engine, self._slots, self._break, self.metrics.batch)
        self._lanes: LifoQueue[Lane] = LifoQueue()
        for number in range(settings.worker_threads):
            self._lanes.put(Lane(range(number, settings.slots, settings.worker_threads), self.loaders, self.engine))
        #: The only ones it serves; none: any. A pair, as capfilt has it, is named with a plus.
        self.models = [model_name(model) for pair in settings.models for model in pair.split("+")]
        #: What others are told of this worker; its `models` grow as checkpoints are loaded.
        self._presence: dict[str, Any] = {"slots": settings.worker_threads, "models": [], "only": self.models}
        self._keeper = LeaseKeeper(self.ledger, settings, name, self._presence)
        #: Where its hints come from.
        self.queues = [queue_of(model) for model in self.models] or [QUEUE]
        self.hints_taken = 0
        self.metrics.sources |= {
            "blip_engine_queue_rows": lambda: self.engine.queued,
            "blip_engine_restarts_total": lambda: self.engine.restarts,
            "blip_loader_restarts_total": lambda: self.loaders.restarts,
            "blip_worker_chunks": lambda: len(self.held()),
            "blip_last_progress_timestamp_seconds": self._last_progress,
        }
        self._jobs: dict[tuple[str, str], OpenJob] = {}
        self._drain_until: float | None = None
        self._without_since: float | None = None  # credentials, as far as is known

    def start(self) -> None:
        """Returns once the engine is up and has what is to be preloaded.

        Only then are hints taken, and is the worker ready: in an upgrade, a warm one is not replaced by a cold one.
        Raises UsageError with one line when the engine, or Redis, cannot be.
        """
        self.ledger.ping()
        self.loaders.start()
        self.engine.start()
        loads = self._preload()
        while not self.engine.started.wait(_POLL_SECONDS):
            self._check_start()
        for named, future in loads.items():
            self._await_preload(named, future)
        self._keeper.start()

    def _preload(self) -> dict[str, Future[Checkpoint]]:
        """Ask for the checkpoints that jobs will want."""
        loads = {}
        for named in self._settings.preload:
            task, _, model = named.partition(":")
            if task not in TASKS or not model:
                raise UsageError(f"setting BLIP_PRELOAD={named!r}: write TASK:MODEL; the tasks are {', '.join(TASKS)}")
            loads[named] = self.engine.load_model(model, task)
        return loads

    def _await_preload(self, named: str, future: Future[Checkpoint]) -> None:
        """One that cannot be loaded is no reason not to begin: others may be wanted. The job that names it is told."""
        while not future.done():
            self._check_start()
            with suppress(TimeoutError, BlipError):
                future.result(_POLL_SECONDS)
        if (error := future.exception()) is not None:
            _log.error("BLIP_PRELOAD=%s is not loaded: %s", named, error)
        else:
            self._tell_of([named.partition(":")[2]])

    def _tell_of(self, models: list[str]) -> None:
        """These are in memory here."""
        self._presence["models"] = list(dict.fromkeys([*self._presence["models"], *models]))

    def _check_start(self) -> None:
        if self.faulty.is_set():
            raise UsageError(self.fault)

    def drain(self) -> None:
        """Take no more; what is under way and fits into the grace period is finished, the rest put back."""
        self._drain_until = time.monotonic() + self._settings.drain_seconds

    @property
    def draining(self) -> bool:
        """It takes no more, and will end."""
        return self._drain_until is not None

    def held(self) -> list[Held]:
        """The leases in hand."""
        return self._keeper.held()

    def _last_progress(self) -> float:
        """Of the chunks in hand, that of the one that stands still: others that move must not hide it."""
        ages = [time.monotonic() - held.moved for held in self.held()]
        return time.time() - max(ages) if ages else self.metrics.last_event

    def hints_waiting(self) -> int:
        """Hints in this worker's queues. Raises RedisUnavailable."""
        return sum(self.ledger.queue_length(queue) for queue in self.queues)

    def close(self) -> None:
        """End all threads and children."""
        self._keeper.stop()
        with suppress(RedisUnavailable):  # after 45 seconds everybody knows
            self.ledger.worker_gone(self.name)
        for children in (self.loaders, self.engine):
            children.close()
        self.ledger.close()

    def _break(self, why: str) -> None:
        self.fault = why
        self.faulty.set()

    def handle(self, message: object) -> None:
        """Do what a hint says, unless it is done, busy or gone. Raises PutBack or Refuse."""
        self.hints_taken += 1
        try:
            hint = Hint.from_message(message)
        except UsageError as error:  # anything may be in a queue: dropped, and nothing of it was run
            raise Refuse(str(error)) from None
        if self.draining or self.faulty.is_set():
            raise PutBack("draining")
        asked_at = time.monotonic()
        try:
            lease = self.ledger.acquire(hint, self.name)
        except RedisUnavailable as error:  # not leased (or unknown to us, and then it runs out): try later
            time.sleep(_BACK_OFF_SECONDS)
            raise PutBack(str(error)) from error
        if isinstance(lease, Lease):
            with (
                self._keeper.holding(lease, asked_at) as held,
                fields(job=lease.job, chunk=lease.chunk, attempt=lease.attempt),
            ):
                self._work(hint, held)
        else:
            self.metrics.chunk("dropped")

    def _work(self, hint: Hint, held: Held) -> None:
        lane = self._lanes.get()
        outcome = "left"  # to the control loop, after an error that nobody expected
        try:
            outcome = "committed" if self._finish(hint, held, lane) else "duplicate"
            self._without_since = None
        except _Abandon as reason:  # given back where it is still ours; a hint is only needed if nobody else sends one
            _log.info("chunk %d of %s abandoned: %s", hint.chunk, hint.job, reason)
            self._release(held.lease)
            outcome = "put_back" if reason.put_back else "abandoned"
            if reason.put_back:
                raise PutBack(str(reason)) from None
        # An outage passes, a job of another version is for workers of that one: given back uncounted, after a while.
        except (StoreUnavailable, NoCredentials, RedisUnavailable, SpecUnreadable) as error:
            if isinstance(error, NoCredentials):
                self._note_without(error)
            _log.warning("chunk %d of %s put back: %s", hint.chunk, hint.job, error)
            time.sleep(_BACK_OFF_SECONDS)
            self._release(held.lease)
            outcome = "put_back"
            raise PutBack(str(error)) from error
        except (BlipError, BlipBatchError) as error:  # does not pass: the job ends with this line
            outcome = "failed"
            self._fail_job(hint, error)
        except Exception as error:  # nobody's intent: once it may be an accident, and the chunk is found again
            outcome = self._unexpected(hint, held.lease, error)
        finally:
            self.metrics.chunk(outcome)
            self._lanes.put(lane)

    def _unexpected(self, hint: Hint, lease: Lease, error: Exception) -> str:
        """The outcome: the job's end where the chunk was begun too often. Raises the error before that."""
        if lease.attempt <= self._settings.max_attempts:
            raise error
        _log.error("chunk %d of %s was begun %d times", hint.chunk, hint.job, lease.attempt, exc_info=error)
        what = " ".join(repr(error).split())[:_LONGEST_WHY]
        self._fail_job(hint, JobError("internal", f"chunk {hint.chunk} cannot be done: {what}; see the workers' logs"))
        return "failed"

    def _finish(self, hint: Hint, held: Held, lane: Lane) -> bool:
        """The chunk's part is in storage and counted; False: it was counted before. Raises what ends the chunk here."""
        job = self._open(hint)
        part = describe(job.store, part_key(hint.chunk, hint.round, job.plan.results), hint.plan)
        if part is None:
            rows = job.rows(hint)
            records, weights = self._compute(job, rows, held, lane)
            if held.lost:
                raise _Abandon("the lease ran out before the part was written", put_back=False)
            part = put_part(job.store, hint, records, weights, [row.number for row in rows], job.plan.results)
        counted = self.ledger.commit(held.lease, part.rows - part.failed, part.failed, part.codes)
        seconds = time.monotonic() - held.started
        if counted:
            self.metrics.committed(job.spec.task, part, seconds)
        _log.info(
            "chunk %d of %s: %d rows, %d failed, %.1f s", hint.chunk, hint.job, part.rows, part.failed, seconds,
            extra=more(rows=part.rows, failed=part.failed, seconds=round(seconds, 3)),
        )  # fmt: skip
        return counted

    def _open(self, hint: Hint) -> OpenJob:
        key = hint.job, hint.plan
        job = self._jobs.get(key)  # once: the other thread may clear them at any time
        if job is None:
            job = OpenJob.of(self.ledger, hint, self._settings)
            if len(self._jobs) >= _JOBS_KEPT:
                self._jobs.clear()  # reopened cheaply
            self._jobs[key] = job
        return job

    def _compute(
        self, job: OpenJob, rows: list[Row | BadRow], held: Held, lane: Lane
    ) -> tuple[list[dict[str, Any]], str]:
        """The records of rows, and the sha256 of the weights they come from."""
        checkpoint = self._checkpoint(job, held)
        context = JobContext(job.spec.task, job.options, checkpoint, partial(job.images.resolve, known={}))
        return lane.run(self._run_for(context, rows, held)), checkpoint.weights_sha256

    def _checkpoint(self, job: OpenJob, held: Held) -> Checkpoint:
        if job.checkpoint is not None:
            return job.checkpoint
        named = checkpoints_of(job.spec.task, job.spec.model)
        futures = [self.engine.load_model(model, task) for task, model in named]
        for future in futures:
            while not future.done():
                self._check(held, 1)
                with suppress(TimeoutError):
                    future.result(_POLL_SECONDS)
        checkpoint, *others = (future.result() for future in futures)  # CheckpointError ends the job
        for other in others:
            checkpoint = checkpoint.judged_by(other)
        job.report(self.ledger, checkpoint)
        self._tell_of(job.spec.model.split("+"))
        return checkpoint

    def _run_for(self, context: JobContext, rows: list[Row | BadRow], held: Held) -> ChunkRun:
        """The usual run; a careful one when a worker died over this chunk before."""

        def check() -> None:
            held.done(this.rows_done)
            self._check(held, len(rows))

        def blame(turn: int) -> None:
            if not self.ledger.blame(held.lease, turn):
                raise _Abandon("the lease is lost", put_back=False)

        if held.lease.attempt == 1:
            run = ChunkRun(context, rows, check)
        else:
            deaths = self.ledger.suspects(held.lease.job, held.lease.chunk)
            condemned = self._condemned(rows, held.lease.attempt, deaths)
            run = CarefulRun(context, rows, check, blame, condemned, deaths)
        this = weakref.proxy(run)  # no cycle: its records go as soon as they are written
        return run

    def _condemned(self, rows: list[Row | BadRow], attempt: int, deaths: Mapping[int, int]) -> Mapping[int, str]:
        """Rows that get `crashed` without another try, each with the reason."""
        limit = self._settings.max_attempts
        if attempt > 2 * limit:
            return {row.number: f"workers died {attempt - 1} times over this row's chunk" for row in rows}
        enough = _CONDEMNED_AFTER if attempt <= limit else 1  # the chunk must end: no more benefit of the doubt
        return {
            row: f"{count} workers died while they worked on this row"
            if count > 1
            else "a worker died at this row, alone"
            for row, count in deaths.items()
            if row >= 0 and count >= enough
        }

    def _check(self, held: Held, rows: int) -> None:
        if held.lost:
            raise _Abandon("the lease is lost, or the job is not to go on", put_back=False)
        if self.faulty.is_set():
            raise _Abandon(self.fault, put_back=True)
        if self._drain_until is not None and not self._fits(held, rows):
            raise _Abandon("draining", put_back=True)

    def _fits(self, held: Held, rows: int) -> bool:
        """Whether the rest of the chunk will be done within the grace period, at the speed seen so far."""
        now, until = time.monotonic(), self._drain_until or 0.0
        if now <= until - self._settings.drain_seconds * 0.8:  # the speed is better known in a moment
            return True
        rest = (now - held.started) * (rows - held.rows_done) / max(1, held.rows_done)
        return now + rest <= until

    def _note_without(self, error: NoCredentials) -> None:
        now = time.monotonic()
        self._without_since = self._without_since or now
        if now - self._without_since > _LOOK_SECONDS:
            self._break(str(error))

    def _release(self, lease: Lease) -> None:
        try:
            self.ledger.release(lease)
        except RedisUnavailable as error:  # it runs out by itself, and counts as an attempt
            _log.warning("lease not released: %s", error)

    def _fail_job(self, hint: Hint, error: BlipError | BlipBatchError) -> None:
        code = "model_unusable" if isinstance(error, BlipError) else getattr(error, "code", "storage_failed")
        _log.error("job %s failed: %s", hint.job, error)
        try:
            self.ledger.set_status(hint.job, "failed", error={"code": code, "message": str(error)})
        except RedisUnavailable as unavailable:  # the lease runs out, and the next try finds the same
            _log.warning("not told: %s", unavailable)
