"""`blip-batch recover`: a job that Redis lost, made known to it again from what object storage holds."""

from dataclasses import dataclass

from .errors import UsageError
from .jobs import read_job, spec_of, wake
from .ledger import Ledger
from .plan import load_plan
from .rounds import Round, is_whole, load_rounds, present_chunks
from .settings import Settings, load_settings
from .storage import open_store


@dataclass(frozen=True)
class Recovered:
    """What was found, and the job that goes on with it."""

    id: str
    rows: int  # of the manifest
    chunks: int  # of the last round
    parts: int  # of these, those in storage: they are not done again
    round: int
    complete: bool  # nothing is left to do but to sum up, if that


def recover(output: str, settings: Settings | None = None) -> Recovered:
    """Submits an output's job again, as its job.json tells of it; the control loop then counts the parts and goes on.

    A job that Redis still knows goes on as by `resume` where it had stopped, and else stays as it is. Raises UsageError
    for an output without a job, JobConflict while the job is being cancelled, StorageError, and RedisUnavailable.
    """
    settings = settings or load_settings()
    store = open_store(output, settings)
    record, plan = read_job(store), load_plan(store, settings)
    if record is None:
        raise UsageError(f"{output} holds no job: there is no job.json")
    spec = spec_of(record, store)
    if spec.output != store.root:
        raise UsageError(f"{output} is a copy of the output {spec.output}; put it there, or recover that one")
    ledger = Ledger.connect(settings)
    try:
        job = wake(ledger, spec, plan)  # whatever became of the manifest
    finally:
        ledger.close()
    if plan is None:  # it was lost before it was planned
        return Recovered(job, 0, 0, 0, 0, False)
    rounds = load_rounds(plan)
    last: Round | None = rounds[-1] if rounds else None
    chunks = range(plan.chunks) if last is None else last.chunks
    parts = present_chunks(plan, len(rounds)).intersection(chunks)
    return Recovered(job, plan.rows, len(chunks), len(parts), len(rounds), is_whole(plan, rounds))
