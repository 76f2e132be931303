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
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any, Final

from .broker import make_celery, publish
from .contract import JobSpec, JobState
from .errors import (
    BlipBatchError,
    JobConflict,
    JobError,
    ManifestError,
    RedisUnavailable,
    SpecUnreadable,
    StorageError,
    UsageError,
)  # fmt: skip
from .failures import all_failed, guard_errors
from .finalizer import finalize
from .jobs import claim_output, complete_job_record, known_plan
from .lane import Lane
from .ledger import Ledger, StaleEpochError
from .logs import fields
from .manifest import require_rows
from .pace import Pace
from .plan import Plan, read_whole
from .reconcile import reconcile
from .roster import Roster
from .rounds import begin_wanted
from .scheduling import Demand, Workers, chunk_rows_for, rooms, route, slots_per_worker, speed_key
from .settings import Settings
from .stopping import StoppingError
from .storage import Store, open_store
from .temporary import remove_left_behind
from .work import Work

MEMORY_LIMIT: Final = 0.7  # of Redis's maxmemory; nothing new is handed out above it
_STEP_SECONDS: Final = 2.0  # a job that takes longer is not waited for
#: Jobs that are fed at once, and jobs that are planned or summed up at once. They mostly wait for their stores; a plan
#: that is made holds some dozens of MB.
_WORKING, _PLANNING = 32, 12
_FORGET_SECONDS: Final = 60.0  # between two looks for jobs that ended long ago
_SPEED_SECONDS: Final = 30.0  # over which a job's speed is averaged

log = logging.getLogger(__name__)


@dataclass
class Step:
    """What one step works with."""

    epoch: str
    workers: Workers
    rooms: dict[str, int]  # job -> its chunks that may be in flight; none: hand out nothing
    reconcile: bool  # look for lost chunks this time
    overdue: dict[str, list[int]]  # job -> the chunks to look for


class Controller:
    """One control loop. `step` is one round; `run` repeats it until told to stop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ledger = Ledger.connect(settings)
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._celery = make_celery(settings)
        self._roster = Roster(self.ledger)
        self._specs: dict[str, JobSpec] = {}  # unfinished jobs: what brings them back to a Redis that lost everything
        self._works: dict[str, Work] = {}
        self._unreadable: set[str] = set()  # jobs that were told of
        self._recorded: set[str] = set()  # jobs whose job.json has the model
        self._paused: set[str] = set()  # as last seen
        self._to_pause: set[str] = set()  # those of them that Redis lost: once they are rebuilt
        self._stop, self._closed = threading.Event(), False
        self._work_lane = Lane(_WORKING, "work", self._stopping)
        self._slow_lane = Lane(_PLANNING, "plan-and-finalize", self._stopping)
        self._next_reconcile = self._next_forget = 0.0
        self._pace = Pace(settings.poll_seconds)
        self.stepped_at = monotonic()  # when it last was sure to go on: what tells that it is alive

    def run(self, stop: threading.Event) -> None:
        """Steps until `stop` is set. Outages of Redis and of the store are waited out."""
        self._stop = stop
        remove_left_behind()
        try:
            while not stop.is_set():
                began = monotonic()
                try:
                    self.step()
                except RedisUnavailable as error:  # nothing is lost: what was not confirmed is done again
                    log.warning("waiting: %s", error)
                    stop.wait(1)
                self.stepped_at = monotonic()
                stop.wait(self._pace.pause(self.stepped_at - began))
        finally:
            self.close()

    def _stopping(self) -> bool:
        return self._closed or self._stop.is_set()

    def close(self) -> None:
        """What runs in threads stops at its next block, and leaves its job as it is."""
        self._closed = True
        self._work_lane.close()
        self._slow_lane.close()
        self._celery.close()
        self.ledger.close()

    def step(self) -> bool:
        """One round over all jobs. False: another control loop leads. Raises RedisUnavailable.

        What asks a store happens in threads: the lead must be kept, and other jobs go on, while one waits for its own.
        """
        epoch = self.ledger.lead(self.owner, self.settings.lead_seconds)
        jobs = self._unfinished(epoch is not None)
        workers = self._roster.look() if any(state.status == "in_progress" for _, state in jobs) else {}
        if epoch is None:
            return False
        self._pace.saw({spec.id: state.status for spec, state in jobs})
        this = self._new_step(epoch, jobs, workers)
        try:
            self._forget_ended(epoch)
            begun = [self._advance(spec, state, this) for spec, state in jobs]
            self._await({task for task in begun if task is not None}, epoch)
        except StaleEpochError:
            return False
        return True

    def _await(self, tasks: "set[Future[None]]", epoch: str) -> None:
        """Waits for the tasks, but not for long: those that take longer are left to themselves. Raises what they do."""
        until = monotonic() + _STEP_SECONDS
        while tasks and monotonic() < until and not self._stopping():
            done, tasks = wait(tasks, min(_STEP_SECONDS, self.settings.lead_seconds) / 4, FIRST_EXCEPTION)
            for task in done:
                task.result()
            self.stepped_at = monotonic()
            if tasks and self.ledger.lead(self.owner, self.settings.lead_seconds) != epoch:
                raise StaleEpochError

    def _unfinished(self, leading: bool = True) -> list[tuple[JobSpec, JobState]]:
        """Jobs that have not ended. Those that Redis lost are created again, and rebuilt from storage like new ones.

        One that does not lead only remembers them: it may be the one that is left, and must not bring back what ended.
        """
        active = self.ledger.active_jobs()
        for job in set(self._specs) - set(active):
            if self.ledger.state(job) is not None:
                self._forget(job)
            elif leading and self._create_again(job):
                active.append(job)
        found = []
        for job in active:
            spec, state = self._spec(job), self.ledger.state(job)
            if spec is not None and state is not None:
                self._specs[job] = spec
                found.append((spec, state))
        lost = set(self._specs) - set(active)  # where another loop leads, which is about to create them again
        self._paused = {spec.id for spec, state in found if state.status == "paused"} | (self._paused & lost)
        return found

    def _create_again(self, job: str) -> bool:
        try:
            self.ledger.create_job(self._specs[job])
        except JobConflict as error:  # another job was quicker to take the output
            log.warning("%s: Redis lost this job, and it is not brought back: %s", job, error)
            self._forget(job)
            return False
        log.warning("%s: Redis lost this job; rebuilding it from storage", job)
        self._to_pause |= {job} & self._paused
        self._roster.recall()
        return True

    def _spec(self, job: str) -> JobSpec | None:
        """None: gone, or not readable, which is told once. It is left alone, for a later version may be at it."""
        try:
            spec = self.ledger.spec(job)
        except SpecUnreadable as error:
            if job not in self._unreadable:
                log.error("skipped: %s", error)
            self._unreadable.add(job)
            return None
        self._unreadable.discard(job)
        return spec

    def _forget(self, job: str) -> None:
        self._specs.pop(job, None)
        self._works.pop(job, None)
        self._recorded.discard(job)
        self._to_pause.discard(job)

    def _forget_ended(self, epoch: str) -> None:
        if monotonic() >= self._next_forget:
            self._next_forget = monotonic() + _FORGET_SECONDS
            if count := self.ledger.forget_ended(epoch, self.settings.job_retention_seconds):
                log.info("%d jobs ended long ago; Redis knows of them no more", count)

    def _new_step(self, epoch: str, jobs: Sequence[tuple[JobSpec, JobState]], workers: Workers) -> Step:
        working = [(spec, state) for spec, state in jobs if state.status == "in_progress"]
        this = Step(epoch, workers, self._rooms(working, workers), monotonic() >= self._next_reconcile, {})
        if this.reconcile:
            self._next_reconcile = monotonic() + self.settings.reconcile_seconds
            this.overdue = self._overdue([spec for spec, _ in working], workers)
        return this

    def _overdue(self, jobs: Sequence[JobSpec], workers: Workers) -> dict[str, list[int]]:
        """The overdue chunks of each job.

        A chunk that was leased lost its worker. One that was not may still wait in a long queue: only as many of
        those are looked for as hints are missing, so that the queue never grows by it.
        """
        queues = {spec.id: route(spec.model, workers) for spec in jobs}
        missing = {queue: -self.ledger.queue_length(queue) for queue in set(queues.values())}
        for job, queue in queues.items():
            missing[queue] += self.ledger.in_flight(job)[2]
        found = {}
        for job, queue in queues.items():
            due = self.ledger.due(job)
            unleased = [chunk for chunk, was_leased in due if not was_leased][: max(0, missing[queue])]
            missing[queue] -= len(unleased)
            found[job] = [chunk for chunk, was_leased in due if was_leased] + unleased
        return found

    def _rooms(self, working: Sequence[tuple[JobSpec, JobState]], workers: Workers) -> dict[str, int]:
        if not working or self.ledger.memory_ratio() >= MEMORY_LIMIT:
            return {}
        demands = []
        for spec, state in working:
            work, speed = self._works.get(spec.id), state.rows_per_second or 0.0
            chunks = speed / work.rows_per_chunk if work else 0.0
            demands.append(Demand(spec.id, spec.model, spec.weight, state.chunks - state.chunks_done, chunks))
        return rooms(demands, workers)

    def _advance(self, spec: JobSpec, state: JobState, this: Step) -> "Future[None] | None":
        """Begins what the job's status asks for; a task that is soon done is returned."""
        match state.status:
            case "in_progress":
                if (work := self._works.get(spec.id)) is not None and not work.counted:  # Redis lost a huge job
                    count = partial(work.count, self.ledger, spec.id, this.epoch)
                    self._begin(self._slow_lane, spec, this.epoch, count)
                return self._begin(self._work_lane, spec, this.epoch, lambda: self._work(spec, state, this))
            case "validating":
                self._begin(self._slow_lane, spec, this.epoch, lambda: self._prepare(spec, this.epoch))
            case "finalizing":
                self._begin(self._slow_lane, spec, this.epoch, lambda: self._finalize(spec, this.epoch))
            case "cancelling" if self.ledger.in_flight(spec.id)[1] == 0:
                self.ledger.set_status(spec.id, "cancelled", epoch=this.epoch)
        return None

    def _begin(self, lane: Lane, spec: JobSpec, epoch: str, action: Callable[[], None]) -> "Future[None] | None":
        """Starts the job's task unless it has one that runs."""

        def task() -> None:
            with fields(job=spec.id):
                try:
                    self._guarded(spec, epoch, action)
                except StoppingError:
                    log.info("%s: left as it is: the control loop is to end", spec.id)
                except (StaleEpochError, RedisUnavailable) as error:  # the job's status is as before: begun again later
                    log.warning("%s: %s", spec.id, error)
                    raise

        return lane.start(spec.id, task)

    def _work(self, spec: JobSpec, state: JobState, this: Step) -> None:
        work = self._work_of(spec, state)
        guard_errors(spec, state, work.plan, self.ledger)
        if state.model is not None and spec.id not in self._recorded:
            complete_job_record(work.plan.store, work.plan, state)
            self._recorded.add(spec.id)
        if state.chunks_done == state.chunks and work.counted:
            self.ledger.set_status(spec.id, "finalizing", epoch=this.epoch)
            return
        key, slots = speed_key(spec.task, spec.model), slots_per_worker(this.workers)
        self.ledger.measure(spec.id, this.epoch, _SPEED_SECONDS, slots, key)
        if room := this.rooms.get(spec.id):
            self._publish(spec, work, this, self.ledger.feed(spec.id, this.epoch, room))
        if this.reconcile:
            work.plan.check_manifest()
            overdue = this.overdue.get(spec.id, [])
            reconcile(self.ledger, spec.id, this.epoch, work, overdue, partial(self._publish, spec, work, this))

    def _work_of(self, spec: JobSpec, state: JobState) -> Work:
        work = self._works.get(spec.id)
        if work is None or work.plan.hash != state.plan or work.number != state.round:
            work = self._works[spec.id] = Work.load(spec, state, self.settings)
        return work

    def _publish(self, spec: JobSpec, work: Work, this: Step, chunks: Sequence[int]) -> None:
        """After the chunks were set in flight: if we die in between, they are overdue later and published then."""
        hints = (work.hint(spec.id, chunk) for chunk in chunks)
        publish(self._celery, hints, route(spec.model, this.workers))

    def _guarded(self, spec: JobSpec, epoch: str, action: Callable[[], None]) -> None:
        """Runs `action`; what it raises fails the job, unless it may pass.

        Raises StaleEpochError, RedisUnavailable and StoppingError, which leave the job as it is.
        """
        try:
            action()
        except (StaleEpochError, RedisUnavailable, StoppingError):
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
        plan, record = self._planned(spec, store)
        work = Work(plan, begin_wanted(plan))
        self._works[spec.id] = work
        found = work.restore(self.ledger, spec.id, epoch)
        if not found and not work.rounds and not record.get("model"):  # a new output, or one that was removed
            self.ledger.any_model(spec.id, epoch)
        if record.get("model"):
            self.ledger.report_model(spec.id, record["model"])
        state = self.ledger.state(spec.id)
        if state is not None:
            complete_job_record(store, plan, state)
        self.ledger.set_status(spec.id, "in_progress", epoch=epoch)
        if spec.id in self._to_pause:
            self.ledger.set_status(spec.id, "paused", epoch=epoch)
            self._to_pause.discard(spec.id)

    def _planned(self, spec: JobSpec, store: Store) -> tuple[Plan, dict[str, Any]]:
        """The output's plan and its job.json, made unless they are there.

        A manifest that cannot be read to its end does not claim the output: a mended one may be another job.
        """
        plan = known_plan(store, self.settings)
        if plan is None:  # what can be known at once, before all of the manifest is read
            require_rows(spec.manifest, spec.manifest_format, self.settings, spec.columns)
        store.check_conditional_put()
        if plan is not None:
            return plan, claim_output(spec, store)
        worth = chunk_rows_for(self.ledger.speed(speed_key(spec.task, spec.model)))
        draft = read_whole(spec, store, self.settings, worth)
        record = claim_output(spec, store)
        return draft.write(store, self.settings, spec.results), record

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
            raise all_failed(plan, summary["errors"], state.round)
        self.ledger.set_status(spec.id, "completed", epoch=epoch)


def _error_code(error: BlipBatchError) -> str:
    if isinstance(error, JobError):
        return error.code
    names: dict[type[BlipBatchError], str] = {
        ManifestError: "manifest_invalid", UsageError: "spec_invalid", StorageError: "storage_failed",
    }  # fmt: skip
    return next((name for kind, name in names.items() if isinstance(error, kind)), "internal")
