"""What can be done with a job that was submitted: look at it, stop it, go on with it, do its failed rows again.

The command line calls these functions, and so may any program that reaches the coordination Redis and the outputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from .contract import JobSpec, JobState, Status
from .errors import UsageError
from .ledger import Ledger
from .plan import load_plan
from .rounds import begin_round, is_complete, known_failures, load_rounds
from .scheduling import Workers, holders, servers, slots_per_worker
from .settings import Settings
from .storage import open_store

_TIMES: Final = (
    "created_at", "in_progress_at", "finalizing_at", "completed_at", "failed_at", "cancelled_at",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Retry:
    """A round that was begun, or is gone on with."""

    round: int
    rows: int  # that have no result yet


def list_jobs(ledger: Ledger, settings: Settings) -> list[dict[str, Any]]:
    """All known jobs as `read_status` gives them, but without `errors`; the oldest first."""
    workers = ledger.live_workers()
    found = ((ledger.spec(job), ledger.state(job)) for job in ledger.jobs())
    return [_view(ledger, settings, spec, state, workers) for spec, state in found if spec and state]


def read_status(ledger: Ledger, settings: Settings, job: str) -> dict[str, Any]:
    """A job as the contract publishes it, and more: round, weight, workers, errors by code, a notice.

    Raises UsageError for a job that is not known.
    """
    spec, state = _known(ledger, job)
    view = _view(ledger, settings, spec, state, ledger.live_workers())
    return {**view, "errors": ledger.error_codes(job)}


def pause(ledger: Ledger, job: str) -> None:
    """Nothing more is handed out; workers let go of what they have begun. Raises UsageError."""
    _change(ledger, job, "paused", "only a job that is in_progress can be paused")


def cancel(ledger: Ledger, job: str) -> None:
    """Ends the job as soon as its workers let go; finished parts stay. Raises UsageError."""
    _change(ledger, job, "cancelling", "it has ended already")


def resume(ledger: Ledger, job: str) -> None:
    """Goes on with a job that is paused, cancelled or failed, from its finished parts. Raises UsageError."""
    _, state = _known(ledger, job)
    if state.status == "paused":
        _change(ledger, job, "in_progress", "it is not paused")
    elif state.status in {"failed", "cancelled"}:
        _change(ledger, job, "validating", "it is at work")
    else:
        raise UsageError(f"job {job} is {state.status}: only one that is paused, cancelled or failed can be resumed")


def retry(ledger: Ledger, settings: Settings, job: str) -> Retry:
    """Does the rows without a result again, in a new round; what has a result is neither fetched nor computed again.

    The round is written to the output before the job is woken, so that it outlives Redis. A round that was begun and
    stopped is gone on with. Raises UsageError, also when no row failed, and StorageError.
    """
    spec, state = _known(ledger, job)
    if not state.ended:
        raise UsageError(f"job {job} is {state.status}: wait for its end, or cancel it first")
    begun = next_round(spec, settings)
    if begun is None:
        raise UsageError(f"job {job}: every row has a result, there is nothing to retry")
    _change(ledger, job, "validating", "it is at work again")
    return begun


def next_round(spec: JobSpec, settings: Settings) -> Retry | None:
    """Begins a round of the rows without a result in the job's output, or finds one begun and not yet done.

    None: every row has a result. The job must have ended. Raises UsageError and StorageError.
    """
    plan = load_plan(open_store(spec.output, settings), settings)
    if plan is None:
        raise UsageError(f"job {spec.id} has no plan yet: nothing of it was done, so resume it, or submit it again")
    rounds = load_rounds(plan)
    begun = rounds[-1] if rounds and not is_complete(plan, rounds) else begin_round(plan, rounds)
    return None if begun is None else Retry(begun.number, sum(begun.rows))


def errors(ledger: Ledger, settings: Settings, job: str) -> Iterator[dict[str, Any]]:
    """The error records that the job has at present, in manifest order; of each row only its latest outcome counts.

    Raises UsageError, and JobError and StorageError when a part cannot be read.
    """
    spec, state = _known(ledger, job)
    plan = load_plan(open_store(spec.output, settings), settings)
    if plan is not None and (state.plan is None or plan.hash == state.plan):
        yield from known_failures(plan)


def _known(ledger: Ledger, job: str) -> tuple[JobSpec, JobState]:
    spec, state = ledger.spec(job), ledger.state(job)
    if spec is None or state is None:
        raise UsageError(f"job {job} is not known; see blip-batch list (BLIP_REDIS_URL says where)")
    return spec, state


def _change(ledger: Ledger, job: str, status: Status, otherwise: str) -> None:
    _, state = _known(ledger, job)
    if not ledger.set_status(job, status):
        raise UsageError(f"job {job} is {state.status}: {otherwise}")


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
