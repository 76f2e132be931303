"""The control loop: plan, feed, reconcile, finalize, for all jobs.

Stateless: everything it needs is in object storage and Redis. It may be killed between any two writes, and two at
once are harmless: one leads, and the epoch in each of its writes lets Redis refuse a loop that was replaced.
"""

import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from time import monotonic
from typing import Final

from .broker import make_celery, publish
from .contract import Hint, JobSpec, JobState
from .errors import BlipBatchError, JobError, ManifestError, RedisUnavailable, StorageError, UsageError
from .finalizer import finalize
from .jobs import claim_output, complete_job_record
from .ledger import Ledger, StaleEpochError
from .logs import fields
from .manifest import require_rows
from .parts import PartInfo, describe, part_key
from .plan import Plan, load_plan, make_plan
from .rounds import Round, existing_parts, load_rounds
from .scheduling import Demand, Workers, chunk_rows_for, rooms, route, slots_per_worker, speed_key
from .settings import Settings
from .storage import open_store

MEMORY_LIMIT: Final = 0.7  # of Redis's maxmemory; nothing new is handed out above it
GUARD_ROWS: Final = 1000  # max_error_ratio is looked at from so many rows on
_BATCH: Final = 500  # chunks named in one call of a script
_SPEED_SECONDS: Final = 30.0  # over which a job's speed is averaged

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """What there is to do for a job: in the first round all of its plan, later what the last round is about."""

    plan: Plan
    rounds: list[Round]

    @property
    def number(self) -> int:
        return len(self.rounds)

    @property
    def rows_per_chunk(self) -> float:
        if self.rounds:
            return sum(self.rounds[-1].rows) / len(self.rounds[-1].chunks)
        return self.plan.rows / self.plan.chunks

    def hint(self, job: str, chunk: int) -> Hint:
        todo = self.rounds[-1].rows_of(chunk) if self.rounds else 0
        return Hint.of(job, self.plan.hash, self.plan.chunk(chunk), self.number, todo)


@dataclass
class Step:
    """What one step works with."""

    epoch: str
    workers: Workers
    rooms: dict[str, int]  # job -> its chunks that may be in flight; none: hand out nothing
    reconcile: bool  # look for lost chunks this time
    #: Queue -> chunks in flight that are neither leased nor waiting there: so many hints may be lost.
    lost_hints: dict[str, int]


class Controller:
    """One control loop. `step` is one round; `run` repeats it until told to stop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ledger = Ledger.connect(settings)
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._celery = make_celery(settings)
        self._specs: dict[str, JobSpec] = {}  # unfinished jobs: what brings them back to a Redis that lost everything
        self._works: dict[str, Work] = {}
        self._recorded: set[str] = set()  # jobs whose job.json has the model
        self._paused: set[str] = set()  # as last seen
        self._to_pause: set[str] = set()  # those of them that Redis lost: once they are rebuilt
        self._slow = ThreadPoolExecutor(4, thread_name_prefix="plan-and-finalize")
        self._running: dict[str, Future[None]] = {}
        self._next_reconcile = 0.0
        self.stepped_at = monotonic()  # when it last was through with a job, or with all: what tells that it is alive

    def run(self, stop: threading.Event) -> None:
        """Steps until `stop` is set. Outages of Redis and of the store are waited out."""
        try:
            while not stop.is_set():
                try:
                    self.step()
                except RedisUnavailable as error:  # nothing is lost: what was not confirmed is done again
                    log.warning("waiting: %s", error)
                    stop.wait(1)
                self.stepped_at = monotonic()
                stop.wait(self.settings.poll_seconds)
        finally:
            self.close()

    def close(self) -> None:
        self._slow.shutdown(cancel_futures=True)
        self._celery.close()
        self.ledger.close()

    def step(self) -> bool:
        """One round over all jobs. False: another control loop leads. Raises RedisUnavailable."""
        epoch = self.ledger.lead(self.owner, self.settings.lead_seconds)
        if epoch is None:
            return False
        jobs = self._unfinished()
        this = self._new_step(epoch, jobs)
        try:
            for spec, state in jobs:
                with fields(job=spec.id):
                    self._guarded(spec, epoch, lambda: self._advance(spec, state, this))  # noqa: B023 -- called at once
                self.stepped_at = monotonic()  # while the store is away each job takes as long as its retries
        except StaleEpochError:
            return False
        return True

    def _unfinished(self) -> list[tuple[JobSpec, JobState]]:
        """Jobs that have not ended. Those that Redis lost are created again, and rebuilt from storage like new ones."""
        active = self.ledger.active_jobs()
        for job in set(self._specs) - set(active):
            if self.ledger.state(job) is None:
                log.warning("%s: Redis lost this job; rebuilding it from storage", job)
                self.ledger.create_job(self._specs[job])
                active.append(job)
                self._to_pause |= {job} & self._paused
            else:
                self._forget(job)
        found = []
        for job in active:
            spec, state = self.ledger.spec(job), self.ledger.state(job)
            if spec is not None and state is not None:
                self._specs[job] = spec
                found.append((spec, state))
        self._paused = {spec.id for spec, state in found if state.status == "paused"}
        return found

    def _forget(self, job: str) -> None:
        self._specs.pop(job, None)
        self._works.pop(job, None)
        self._recorded.discard(job)
        self._to_pause.discard(job)

    def _new_step(self, epoch: str, jobs: Sequence[tuple[JobSpec, JobState]]) -> Step:
        working = [(spec, state) for spec, state in jobs if state.status == "in_progress"]
        workers = self.ledger.live_workers() if working else {}
        this = Step(epoch, workers, self._rooms(working, workers), monotonic() >= self._next_reconcile, {})
        if this.reconcile:
            self._next_reconcile = monotonic() + self.settings.reconcile_seconds
            for spec, _ in working:
                queue = route(spec.model, workers)
                if queue not in this.lost_hints:
                    this.lost_hints[queue] = -self.ledger.queue_length(queue)
                this.lost_hints[queue] += self.ledger.in_flight(spec.id)[2]
        return this

    def _rooms(self, working: Sequence[tuple[JobSpec, JobState]], workers: Workers) -> dict[str, int]:
        if not working or self.ledger.memory_ratio() >= MEMORY_LIMIT:
            return {}
        demands = []
        for spec, state in working:
            work, speed = self._works.get(spec.id), state.rows_per_second or 0.0
            chunks = speed / work.rows_per_chunk if work else 0.0
            demands.append(Demand(spec.id, spec.model, spec.weight, state.chunks - state.chunks_done, chunks))
        return rooms(demands, workers)

    def _advance(self, spec: JobSpec, state: JobState, this: Step) -> None:
        match state.status:
            case "validating":
                self._in_background(spec, this.epoch, self._prepare)
            case "in_progress":
                self._work(spec, state, this)
            case "finalizing":
                self._in_background(spec, this.epoch, self._finalize)
            case "cancelling" if self.ledger.in_flight(spec.id)[1] == 0:
                self.ledger.set_status(spec.id, "cancelled", epoch=this.epoch)

    def _work(self, spec: JobSpec, state: JobState, this: Step) -> None:
        _guard_errors(spec, state)
        work = self._work_of(spec, state)
        if state.model is not None and spec.id not in self._recorded:
            complete_job_record(work.plan.store, work.plan, state)
            self._recorded.add(spec.id)
        if state.chunks_done == state.chunks:
            self.ledger.set_status(spec.id, "finalizing", epoch=this.epoch)
            return
        key, slots = speed_key(spec.task, spec.model), slots_per_worker(this.workers)
        self.ledger.measure(spec.id, this.epoch, _SPEED_SECONDS, slots, key)
        if this.reconcile:
            self._reconcile(spec, work, this)
            work.plan.check_manifest()
        if room := this.rooms.get(spec.id):
            self._publish(spec, work, this, self.ledger.feed(spec.id, this.epoch, room))

    def _work_of(self, spec: JobSpec, state: JobState) -> Work:
        work = self._works.get(spec.id)
        if work is None or work.plan.hash != state.plan or work.number != state.round:
            plan = load_plan(open_store(spec.output, self.settings), self.settings)
            if plan is None or plan.hash != state.plan:
                raise JobError("plan_invalid", f"{spec.output}/plan was removed or replaced; choose another output")
            work = self._works[spec.id] = Work(plan, load_rounds(plan)[: state.round])
        return work

    def _publish(self, spec: JobSpec, work: Work, this: Step, chunks: Sequence[int]) -> None:
        """After the chunks were set in flight: if we die in between, they are overdue later and published then."""
        hints = (work.hint(spec.id, chunk) for chunk in chunks)
        publish(self._celery, hints, route(spec.model, this.workers))

    def _reconcile(self, spec: JobSpec, work: Work, this: Step) -> None:
        """Overdue chunks: counted if their part is there, else published again.

        A chunk that was leased lost its worker. One that was not may still wait in a long queue: only as many of
        those are published again as hints are missing, so that the queue never grows by it.
        """
        job, plan, queue = spec.id, work.plan, route(spec.model, this.workers)
        overdue = self.ledger.due(job)
        leased = [chunk for chunk, was_leased in overdue if was_leased]
        unleased = [chunk for chunk, was_leased in overdue if not was_leased][: max(0, this.lost_hints[queue])]
        this.lost_hints[queue] -= len(unleased)
        lost: list[int] = []
        for chunk in leased + unleased:
            part = describe(plan.store, part_key(chunk, work.number, plan.results))
            if part is None:
                lost.append(chunk)
            elif self.ledger.mark(job, this.epoch, plan.hash, [_counts(part)], work.number):
                self.ledger.add_total("found", 1)
                self.ledger.add_total("rows_done", part.rows)
        if lost:
            log.warning("%s: %d chunks lost their worker or hint; handing them out again", job, len(lost))
            again = self.ledger.requeue(job, this.epoch, lost)
            self._publish(spec, work, this, again)
            self.ledger.add_total("requeued", len(again))

    def _in_background(self, spec: JobSpec, epoch: str, task: Callable[[JobSpec, str], None]) -> None:
        """Starts the job's slow task unless it runs: reading may take minutes, and the lead must be kept."""
        running = self._running.get(spec.id)
        if running is None or running.done():
            self._running[spec.id] = self._slow.submit(self._run_slow, spec, epoch, task)

    def _run_slow(self, spec: JobSpec, epoch: str, task: Callable[[JobSpec, str], None]) -> None:
        try:
            with fields(job=spec.id):
                self._guarded(spec, epoch, lambda: task(spec, epoch))
        except (StaleEpochError, RedisUnavailable) as error:  # the job's status is as before: begun again later
            log.warning("%s: %s", spec.id, error)

    def _guarded(self, spec: JobSpec, epoch: str, action: Callable[[], None]) -> None:
        """Runs `action`; what it raises fails the job, unless it may pass. Raises StaleEpochError, RedisUnavailable."""
        try:
            action()
        except (StaleEpochError, RedisUnavailable):
            raise
        except BlipBatchError as error:
            if error.retryable and self._has_begun(spec.id):
                log.warning("%s: waiting: %s", spec.id, error)
                return
            self._fail(spec.id, epoch, _error_code(error), str(error))
        except Exception as error:  # a bug: the job stops with it, the other jobs go on
            log.exception("%s", spec.id)
            self._fail(spec.id, epoch, "internal", f"{type(error).__name__}: {error}")

    def _has_begun(self, job: str) -> bool:
        """An outage of the store is waited out, but for a job that was never planned: better to say so at once."""
        state = self.ledger.state(job)
        return job in self._works or (state is not None and state.plan is not None)

    def _fail(self, job: str, epoch: str, code: str, message: str) -> None:
        log.error("%s failed: %s", job, message)
        self.ledger.set_status(job, "failed", epoch=epoch, error={"code": code, "message": message})

    def _prepare(self, spec: JobSpec, epoch: str) -> None:
        """validating → in_progress: the plan, made or found, and what storage holds of the work."""
        store = open_store(spec.output, self.settings)
        if load_plan(store, self.settings) is None:  # a manifest that cannot be read must not claim the output
            require_rows(spec.manifest, spec.manifest_format, self.settings, spec.columns)
        record = claim_output(spec, store)
        speed = self.ledger.speed(speed_key(spec.task, spec.model))
        plan = make_plan(spec, store, self.settings, chunk_rows_for(speed))
        work = Work(plan, load_rounds(plan))
        self._works[spec.id] = work
        self._restore(spec.id, epoch, work)
        if record.get("model"):
            self.ledger.report_model(spec.id, record["model"])
        state = self.ledger.state(spec.id)
        if state is not None:
            complete_job_record(store, plan, state)
        self.ledger.set_status(spec.id, "in_progress", epoch=epoch)
        if spec.id in self._to_pause:
            self.ledger.set_status(spec.id, "paused", epoch=epoch)
            self._to_pause.discard(spec.id)

    def _restore(self, job: str, epoch: str, work: Work) -> None:
        """Tells the ledger what there is to do, and what of it storage holds already."""
        plan, number = work.plan, work.number
        self.ledger.reset(job, epoch, plan.hash, plan.chunks, plan.rows, number)
        if work.rounds:
            to_do = iter(zip(work.rounds[-1].chunks, work.rounds[-1].rows, strict=True))
            while batch := list(islice(to_do, _BATCH)):
                self.ledger.open(job, epoch, plan.hash, number, batch)
        parts = existing_parts(plan, number)
        while found := [_counts(part) for part in islice(parts, _BATCH)]:
            self.ledger.mark(job, epoch, plan.hash, found, number)

    def _finalize(self, spec: JobSpec, epoch: str) -> None:
        """finalizing → completed or failed; back to validating when parts are missing after all."""
        state = self.ledger.state(spec.id)
        if state is None:
            return
        plan = self._work_of(spec, state).plan
        summary = finalize(spec, plan, state)
        if summary is None:
            log.warning("%s: parts are missing; handing their chunks out again", spec.id)
            self.ledger.set_status(spec.id, "validating", epoch=epoch)
            return
        complete_job_record(plan.store, plan, state)
        if summary["status"] == "failed":
            codes = ", ".join(f"{code}: {count}" for code, count in summary["errors"].items())
            raise JobError("all_rows_failed", f"all {plan.rows} rows failed ({codes}); see {spec.output}/errors.jsonl")
        self.ledger.set_status(spec.id, "completed", epoch=epoch)


def _counts(part: PartInfo) -> tuple[int, int, int, str]:
    return part.chunk, part.rows - part.failed, part.failed, part.codes


def _guard_errors(spec: JobSpec, state: JobState) -> None:
    done = state.completed + state.failed
    if done >= GUARD_ROWS and state.failed > spec.max_error_ratio * done:
        raise JobError(
            "too_many_errors",
            f"{state.failed} of the first {done} rows failed, more than max_error_ratio={spec.max_error_ratio:g}; look "
            f"at {spec.output}/results, then retry, or raise the ratio and run again",
        )


def _error_code(error: BlipBatchError) -> str:
    if isinstance(error, JobError):
        return error.code
    names: dict[type[BlipBatchError], str] = {
        ManifestError: "manifest_invalid", UsageError: "spec_invalid", StorageError: "storage_failed",
    }  # fmt: skip
    return next((name for kind, name in names.items() if isinstance(error, kind)), "internal")
