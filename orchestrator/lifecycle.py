"""What can be done with a job that was submitted: look at it, stop it, go on with it, do its failed rows again.

The command line and the HTTP API call these functions, and so may any program that reaches the coordination Redis and
the outputs.
"""

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .contract import JobSpec, JobState, Status
from .errors import JobConflict, SpecUnreadable, UnknownJob
from .jobs import check_owner
from .ledger import Ledger
from .plan import Plan, load_plan
from .rounds import (
    Round,
    ask_for_round,
    begin_round,
    failures_by_chunk,
    is_begun_soon,
    is_complete,
    load_rounds,
)  # fmt: skip
from .scheduling import (
    Backlog,
    Remaining,
    Workers,
    backlog_of,
    holders,
    pool_of,
    servers,
    serves,
    slots_per_worker,
    speed_key,
)  # fmt: skip
from .settings import Settings
from .storage import open_store

_TIMES: Final = (
    "created_at", "in_progress_at", "finalizing_at", "completed_at", "failed_at", "cancelled_at",
)  # fmt: skip


_JOB_ID: Final = re.compile(r"[a-z0-9-]{1,64}", re.ASCII)
_PAGE_SECONDS: Final = 5.0  # a page of errors ends after them, whatever it holds


@dataclass(frozen=True, slots=True)
class Retry:
    """A round that was begun, or is gone on with."""

    round: int
    rows: int | None  # that have no result yet; None: they are being counted


def list_jobs(ledger: Ledger, settings: Settings, jobs: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Jobs as `read_status` gives them, but without `errors` and `live_workers`; all known ones, the oldest first."""
    workers = ledger.live_workers()
    found = (_look(ledger, settings, job, workers) for job in (ledger.jobs() if jobs is None else jobs))
    return [view for view in found if view is not None]


def read_status(ledger: Ledger, settings: Settings, job: str) -> dict[str, Any]:
    """A job as the contract publishes it, and more: round, weight, workers, errors by code, a notice.

    Of one that another version wrote, and this one cannot read, the notice says so. Raises UnknownJob.
    """
    workers = ledger.live_workers()
    view = _look(ledger, settings, job, workers) if _JOB_ID.fullmatch(job) else None
    if view is None:
        raise _unknown(job)
    return {**view, "errors": ledger.error_codes(job), "live_workers": workers}


def pause(ledger: Ledger, job: str) -> None:
    """Nothing more is handed out; workers let go of what they have begun. Raises JobConflict."""
    _change(ledger, job, "paused", "only a job that is in_progress can be paused")


def cancel(ledger: Ledger, job: str) -> None:
    """Ends the job as soon as its workers let go; finished parts stay. Raises JobConflict."""
    _change(ledger, job, "cancelling", "it has ended already, or is about to")


def resume(ledger: Ledger, job: str) -> None:
    """Goes on with a job that is paused, cancelled or failed, from its finished parts. Raises JobConflict."""
    _, state = _known(ledger, job)
    if state.status == "paused":
        _change(ledger, job, "in_progress", "it is not paused", state)
    elif state.status in {"failed", "cancelled"}:
        _change(ledger, job, "validating", "it is at work", state)
    else:
        raise JobConflict(f"job {job} is {state.status}: only one that is paused, cancelled or failed can be resumed")


def retry(ledger: Ledger, settings: Settings, job: str) -> Retry:
    """Does the rows without a result again, in a new round; what has a result is neither fetched nor computed again.

    The round is written to the output before the job is woken, so that it outlives Redis. Of a huge job without a
    summary it is only asked for there, and the control loop begins it: the job is `validating` meanwhile. A round that
    was begun and stopped is gone on with. Raises JobConflict, also when no row failed, and StorageError.
    """
    spec, state = _known(ledger, job)
    if not state.ended:
        raise JobConflict(f"job {job} is {state.status}: wait for its end, or cancel it first")
    begun = next_round(_own_plan(spec, state, settings), patient=False)
    if begun is None:
        raise JobConflict(f"job {job}: every row has a result, there is nothing to retry")
    _change(ledger, job, "validating", "it is at work again", state)
    return begun


def _own_plan(spec: JobSpec, state: JobState, settings: Settings) -> Plan:
    """The plan that the job worked by. Raises JobConflict when its output has none, or is another job's by now."""
    store = open_store(spec.output, settings)
    try:
        check_owner(spec, store)
    except JobConflict as error:
        raise JobConflict(f"job {spec.id} has lost its output: {error}") from None
    plan = load_plan(store, settings)
    if plan is None:
        raise JobConflict(f"job {spec.id} has no plan yet: nothing of it was done, so resume it, or submit it again")
    if state.plan not in {None, plan.hash}:
        raise JobConflict(f"job {spec.id}: {store.root} was planned anew; submit the job again to go on with that")
    return plan


def next_round(plan: Plan, *, patient: bool = True) -> Retry | None:
    """Begins a round of the rows without a result in an output, or finds one begun and not yet done.

    None: every row has a result. Not `patient`: a round that would take minutes to begin is asked for instead. The job
    must have ended. Raises JobError and StorageError.
    """
    rounds = load_rounds(plan)
    if rounds and not is_complete(plan, rounds):
        begun: Round | None = rounds[-1]
    elif patient or is_begun_soon(plan, rounds):
        begun = begin_round(plan, rounds)
    else:
        return Retry(ask_for_round(plan, rounds), None)
    return None if begun is None else Retry(begun.number, sum(begun.rows))


def errors(ledger: Ledger, settings: Settings, job: str, first_row: int = 0) -> Iterator[dict[str, Any]]:
    """The error records that the job has at present, in manifest order; of each row only its latest outcome counts.

    Raises UnknownJob at once, and JobError and StorageError when a part cannot be read.
    """
    plan = _plan_of(ledger, settings, job)
    chunks = failures_by_chunk(plan, first_row) if plan else ()
    return (record for _, failures in chunks for record in failures if record["row"] >= first_row)


def error_page(
    ledger: Ledger, settings: Settings, job: str, first_row: int, limit: int
) -> tuple[list[dict[str, Any]], int | None]:  # fmt: skip
    """Some of the error records from `first_row` on, at most `limit`, and the row to go on from; None: that was all.

    May hold fewer, even none, though there are more: reading the parts of a huge job takes long. Raises as `errors`.
    """
    plan = _plan_of(ledger, settings, job)
    deadline, found = time.monotonic() + _PAGE_SECONDS, list[dict[str, Any]]()
    for chunk, failures in failures_by_chunk(plan, first_row) if plan else ():
        found += [record for record in failures if record["row"] >= first_row]
        if len(found) > limit:
            return found[:limit], found[limit]["row"]
        if time.monotonic() > deadline:
            return found, chunk.first_row + chunk.rows
    return found, None


def speed(ledger: Ledger, settings: Settings, task: str, model: str) -> float | None:
    """Rows per second of one worker, as last measured for this task and model (`JobSpec.model`); None: never."""
    found = ledger.speed(speed_key(task, model))
    return found * _slots(model, ledger.live_workers(), settings) if found else None


def _slots(model: str, workers: Workers, settings: Settings) -> float:
    """Leases that a worker of this model holds at once."""
    served = servers(model, workers)
    return slots_per_worker(served) if served else settings.worker_threads


def backlog(
    ledger: Ledger, settings: Settings, models: Sequence[str] = (), without: Sequence[str] = ()
) -> Backlog:  # fmt: skip
    """What is left to do, and the workers to do it; `scheduling.backlog_of` has the formula.

    Everything that is in no finished part counts, in flight or not; a job that is not planned yet as one row, so that a
    worker is there when it is; of one that is paused or being cancelled only what workers still hold.
    `models`: only jobs that workers with BLIP_MODELS=`models` take, and of the workers only these. `without`: only jobs
    that none of these kinds of workers takes (of each, its models with a plus between), and of the workers only those
    without BLIP_MODELS. So a pool is never asked for more because workers of another are busy, be it at the same jobs.
    """
    own = [model for pair in models for model in pair.split("+")]
    workers, busy = ledger.live_workers(), set[str]()
    pool = pool_of(workers, own, bool(without))
    left = []
    for job in ledger.active_jobs():
        try:
            spec, state = ledger.spec(job), ledger.state(job)
        except SpecUnreadable:  # the control loop hands nothing of it out
            continue
        if spec is None or state is None:
            continue
        at_work = ledger.at_work(job)
        busy.update(pool.keys() & at_work)  # whatever the job: none of them is taken away
        if (own and not serves(own, spec.model)) or any(serves(kind.split("+"), spec.model) for kind in without):
            continue
        busy.update(set(at_work) - workers.keys())  # unheard of for a while; whose they are is not known
        seen = ledger.speed(speed_key(spec.task, spec.model))
        rows, chunks = _left(state, len(at_work))
        left.append(Remaining(rows, chunks, seen * _slots(spec.model, workers, settings) if seen else None))
    slots = slots_per_worker(pool) if pool else settings.worker_threads
    return backlog_of(left, len(busy), slots, settings.backlog_seconds, settings.max_workers)


def _left(state: JobState, leases: int) -> tuple[int, int]:
    """Rows and chunks of a job that are in no finished part."""
    rows, chunks = state.total - state.completed - state.failed, state.chunks - state.chunks_done
    match state.status:
        case "validating":  # its manifest may not have been read, or its parts not been counted
            return max(1, rows), max(1, chunks)
        case "in_progress" | "finalizing":
            return max(rows, chunks), chunks
        case "paused" | "cancelling":
            return max(leases, math.ceil(leases * rows / max(1, chunks))), leases
        case _:
            return 0, 0


def _plan_of(ledger: Ledger, settings: Settings, job: str) -> Plan | None:
    """The plan that the job works by; None: it has none yet."""
    spec, state = _known(ledger, job)
    plan = load_plan(open_store(spec.output, settings), settings)
    return plan if plan is not None and state.plan in {None, plan.hash} else None


def _known(ledger: Ledger, job: str) -> tuple[JobSpec, JobState]:
    if _JOB_ID.fullmatch(job):  # other names may be those of other keys
        spec, state = ledger.spec(job), ledger.state(job)
        if spec is not None and state is not None:
            return spec, state
    raise _unknown(job)


def _unknown(job: str) -> UnknownJob:
    return UnknownJob(
        f"job {job[:80]} is not known; blip-batch list shows those that are, and `blip-batch recover OUTPUT` brings "
        "back one that ended long ago"
    )


def _change(ledger: Ledger, job: str, status: Status, otherwise: str, seen: JobState | None = None) -> None:
    """`seen`: what the decision was made on; someone else may have changed the job since."""
    _known(ledger, job)
    if not ledger.set_status(job, status, since=None if seen is None else seen.status):
        _, state = _known(ledger, job)
        raise JobConflict(f"job {job} is {state.status}: {otherwise}")


def _look(ledger: Ledger, settings: Settings, job: str, workers: Workers) -> dict[str, Any] | None:
    """A job as it is shown; None: no such job."""
    state, unreadable = ledger.state(job), None
    try:
        spec = ledger.spec(job)
    except SpecUnreadable as error:
        blank = dict.fromkeys(("task", "model", "manifest", "output"), "unknown")
        spec, unreadable = JobSpec.model_construct(id=job, **blank, created_at=0.0), str(error)  # type: ignore[arg-type]
    if spec is None or state is None:
        return None
    view = _view(ledger, settings, spec, state, workers)
    return view if unreadable is None else {**view, "notice": unreadable}


def _view(
    ledger: Ledger, settings: Settings, spec: JobSpec, state: JobState, workers: Workers
) -> dict[str, Any]:  # fmt: skip
    working = state.status == "in_progress"
    inside, leases, _ = ledger.in_flight(spec.id) if working else (0, 0, 0)
    done = min(state.total, state.completed + state.failed + inside)
    speed = state.rows_per_second if working else None
    eta = (state.total - done) / speed if speed else None
    busy = leases / slots_per_worker(workers)
    return {
        "id": spec.id, "task": spec.task, "model": spec.model, "manifest": spec.manifest, "output": spec.output,
        "options": spec.options, "status": state.status, "round": state.round, "weight": spec.weight,
        "request_counts": {"total": state.total, "completed": state.completed, "failed": state.failed},
        "rows_done": done, "rows_per_second": None if speed is None else round(speed, 3),
        "eta_seconds": None if eta is None else round(eta, 1),
        "estimated_cost": _cost(settings, state.worker_seconds + (eta or 0) * busy), "workers": round(busy, 2),
        **{name: getattr(state, name) for name in _TIMES}, "error": state.error,
        "notice": _notice(spec, state, workers),
    }  # fmt: skip


def _cost(settings: Settings, worker_seconds: float) -> float | None:
    """Of what was spent and what is expected, where a price is set."""
    price = settings.price_per_worker_hour
    return None if price is None else round(worker_seconds / 3600 * price, 4)


def _notice(spec: JobSpec, state: JobState, workers: Workers) -> str | None:
    """Why the job may be waiting, where that is known."""
    if state.status not in {"validating", "in_progress"}:
        return None
    if not workers:
        return "no worker is live"
    able = servers(spec.model, workers)
    if not able:
        return f"no live worker serves model {spec.model} (BLIP_MODELS)"
    if not holders(spec.model, able):
        return f"no live worker holds model {spec.model} yet; the first one to take a chunk loads it"
    return None
