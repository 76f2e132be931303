"""Who gets the workers: to which queue a job's hints go, and how many of its chunks are handed out at once."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .ledger import QUEUE

#: Chunks in flight for each slot. What waits stands in the way of the next job, so it is little once a job's speed is
#: known: a quarter of the slots may end at once, and the control loop looks only now and then.
PER_SLOT, PER_SLOT_UNKNOWN = 1.25, 2
AHEAD_SECONDS: Final = 2.0  # of work that waits besides
LEAST_IN_FLIGHT, MOST_IN_FLIGHT = 8, 4096  # chunks of all jobs before their speed is known; of one job
CHUNK_SECONDS: Final = 30.0  # what a chunk of automatic size should take
SMALLEST_CHUNK, LARGEST_CHUNK = 64, 4096  # rows

Workers = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Remaining:
    """What is left of a job."""

    rows: int  # that are in no finished part: those in flight count
    chunks: int  # that are not done: those in flight count
    rows_per_second: float | None  # of one worker, for the job's task and model; None: never measured


@dataclass(frozen=True, slots=True)
class Backlog:
    """What is left of all jobs, and how many workers an autoscaler should run for it."""

    rows: int
    chunks: int
    desired_workers: int


@dataclass(frozen=True, slots=True)
class Demand:
    """A job that is being worked on."""

    job: str
    model: str
    weight: float
    chunks: int  # not done yet
    chunks_per_second: float = 0.0  # as lately done; 0: not known


def queue_of(model: str) -> str:
    """The queue of the workers that serve this model alone, or a few, this among them."""
    return f"{QUEUE}.{hashlib.sha256(model.encode()).hexdigest()[:16]}"


def route(model: str, workers: Workers) -> str:
    """Where the model's hints go now: to its own queue if a live worker listens there, else to everyone's."""
    if any(_limited_to(info, model) for info in workers.values()):
        return queue_of(_named(model)[0])
    return QUEUE


def servers(model: str, workers: Workers) -> dict[str, Mapping[str, Any]]:
    """The live workers that take this model's hints."""
    dedicated = {name: info for name, info in workers.items() if _limited_to(info, model)}
    return dedicated or {name: info for name, info in workers.items() if not info.get("only")}


def pool_of(workers: Workers, models: Sequence[str], rest: bool) -> Workers:
    """The workers that serve exactly `models`. None named: with `rest` those that take what no pool of models does,
    else all.
    """
    if models:
        return {name: info for name, info in workers.items() if set(info.get("only") or ()) == set(models)}
    return {name: info for name, info in workers.items() if not (rest and info.get("only"))}


def holders(model: str, workers: Workers) -> list[str]:
    """The live workers in whose memory the model is."""
    return [name for name, info in workers.items() if set(_named(model)) <= set(info.get("models", ()))]


def rooms(demands: Sequence[Demand], workers: Workers) -> dict[str, int]:
    """Chunks of each job that may be in flight: its share, by weight, of what the workers can hold.

    What a job with few chunks left does not need of its share, the others get.
    """
    found: dict[str, int] = {}
    for queue in {route(demand.model, workers) for demand in demands}:
        group = [demand for demand in demands if route(demand.model, workers) == queue]
        room, weight = _capacity(group, workers), sum(demand.weight for demand in group)
        for demand in sorted(group, key=lambda demand: demand.chunks / demand.weight):
            share = max(1, math.ceil(room * demand.weight / weight))
            found[demand.job] = min(MOST_IN_FLIGHT, share, demand.chunks)
            room, weight = max(0.0, room - found[demand.job]), max(weight - demand.weight, 1e-9)
    return found


def _capacity(group: Sequence[Demand], workers: Workers) -> float:
    """Chunks that may be in flight of all jobs that share workers."""
    slots = sum(int(info.get("slots", 1)) for info in servers(group[0].model, workers).values())
    room = PER_SLOT * slots + AHEAD_SECONDS * sum(demand.chunks_per_second for demand in group)
    if any(demand.chunks_per_second == 0 for demand in group):
        return max(room, LEAST_IN_FLIGHT, PER_SLOT_UNKNOWN * slots)
    return room


def speed_key(task: str, model: str) -> str:
    """Under which the speed of a task and model is kept in the ledger."""
    return f"{task} {model}"


def chunk_rows_for(rows_per_second: float | None) -> int | None:
    """Rows of a chunk that takes a lease of this speed CHUNK_SECONDS; None: not known yet."""
    if not rows_per_second:
        return None
    return round(min(LARGEST_CHUNK, max(SMALLEST_CHUNK, rows_per_second * CHUNK_SECONDS)))


def slots_per_worker(workers: Workers) -> float:
    """The mean; 1 without workers."""
    return sum(int(info.get("slots", 1)) for info in workers.values()) / len(workers) if workers else 1.0


def backlog_of(jobs: Sequence[Remaining], busy: int, slots: float, seconds: float, most: int) -> Backlog:
    """The rows and chunks that are left, and the workers for them, of which 0 are desired only when nothing is left:

        by_time = ceil(sum over the jobs of rows / rows_per_second / seconds)
        by_work = ceil(chunks / slots)
        desired = min(most, max(busy, min(max(1, by_time), by_work)))

    `by_time` workers finish what is left within `seconds`; a job of unknown speed adds nothing to it, and so begins
    with one worker, which measures. More than `by_work` would find nothing to do. `busy` workers hold chunks now, and
    are not taken away: the last chunks are not slower done because few are left.
    `slots`: chunks that a worker takes at once; `most`: the bound that was set.
    """
    rows, chunks = sum(job.rows for job in jobs), sum(job.chunks for job in jobs)
    by_time = math.ceil(sum(job.rows / job.rows_per_second for job in jobs if job.rows_per_second) / seconds)
    by_work = math.ceil(chunks / slots)
    return Backlog(rows, chunks, min(most, max(busy, min(max(1, by_time), by_work))))


def serves(models: Sequence[str], model: str) -> bool:
    """Whether workers that hold `models` can do a job of `model`."""
    return set(_named(model)) <= set(models)


def _limited_to(info: Mapping[str, Any], model: str) -> bool:
    """Whether the worker serves chosen models only, and this among them."""
    return bool(info.get("only")) and serves(info["only"], model)


def _named(model: str) -> list[str]:
    """The models of a job: a task may need two, with a plus between."""
    return model.split("+")
