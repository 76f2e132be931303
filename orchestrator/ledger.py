"""The coordination state of all jobs: the one module that talks to Redis.

Everything here can be rebuilt from object storage. Each change is one Lua script (`lua/*.lua`), atomic, idempotent,
and timed by Redis's own clock. Keys, for a job <id>:

    blip:jobs                  ZSET  job id -> created (ms)
    blip:active                SET   ids of jobs that have not ended
    blip:outputs               HASH  output URI -> job id that writes there
    blip:control               HASH  owner, epoch, deadline (ms): the control loop in charge; each of its writes
                                     carries the epoch and is refused once another loop took over
    blip:workers               ZSET  worker id -> last seen (ms);  blip:workers:info HASH worker id -> JSON
    blip:job:<id>              HASH  spec (JSON), status, plan (hash), chunks, total (rows), next (chunk to feed),
                                     chunks_done, completed, failed, restored (rows), fence (last one given),
                                     error (JSON), model (JSON), weights (sha256), <status>_at (ms), round,
                                     rate, rate_weight, rate_rows, rate_at (ms): rows/s as a moving average,
                                     progress_at (ms): when rows were last seen to be more than before,
                                     worker_seconds (spent on it)
    blip:job:<id>:done         BITMAP  a bit per chunk: its part is in storage and counted; none once it is completed
    blip:job:<id>:inflight     ZSET  chunk -> deadline (ms): handed out, leased or not; overdue ones are looked after
    blip:job:<id>:leases       HASH  chunk -> "fence deadline rows worker"; kept after its deadline, until someone
                                     takes the chunk over, as the trace of a dead worker
    blip:job:<id>:attempts     HASH  chunk -> starts, drained ones not counted
    blip:job:<id>:uncounted    LIST  chunks done before Redis was lost, whose failed rows are still to be asked
    blip:job:<id>:cursor       HASH  chunk -> turn that its worker is at, when it goes in turns after a death: a row
                                     alone, or, negative, ~ the first row of a group
    blip:job:<id>:blame        HASH  "chunk:turn" -> workers that died in this turn
    blip:job:<id>:codes        HASH  error code -> rows
      What only a job at work needs goes with its end; all of the job BLIP_JOB_RETENTION_SECONDS later (lua/forget.lua).
    blip:speeds                HASH  "task model" -> rows/s of one lease
    blip:totals                HASH  rows_done (by commits), requeued, found (chunks): counters of all jobs
    blip                       LIST  the Celery queue (`broker`); only its length is read here
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import redis
from pydantic import ValidationError
from redis.backoff import ExponentialWithJitterBackoff  # type: ignore[attr-defined,unused-ignore]
from redis.exceptions import RedisError
from redis.retry import Retry

from . import redis_url
from .contract import Hint, JobSpec, JobState, Progress, Status
from .errors import JobConflict, JobError, RedisUnavailable, SpecUnreadable
from .settings import Settings

QUEUE: Final = "blip"
_FORGET_BATCH: Final = 500  # jobs looked at in one call of the script

#: status -> statuses it may follow
_FROM: Final[Mapping[Status, tuple[Status, ...]]] = {
    "validating": ("failed", "cancelled", "finalizing", "paused", "in_progress", "completed"),
    "in_progress": ("validating", "paused"),
    "finalizing": ("in_progress",),
    "completed": ("finalizing",),
    "failed": ("validating", "in_progress", "finalizing", "paused"),
    "cancelling": ("validating", "in_progress", "paused", "finalizing"),
    "cancelled": ("cancelling",),
    "paused": ("in_progress",),
}


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on a chunk, until its deadline. A part may be committed without: it is written only once."""

    job: str
    chunk: int
    plan: str
    round: int
    fence: int  # rises with each lease of the job; an older holder's writes are refused
    attempt: int  # 1 for the first start; above 1, the worker before died
    worker: str


#: done: the part exists; busy: someone (perhaps we) works on it; gone: job unknown, stopped, or planned anew
NotLeased: TypeAlias = Literal["done", "busy", "gone"]


class StaleEpochError(JobError):
    """Another control loop took over; this one must stop writing."""

    def __init__(self) -> None:
        super().__init__("stale", "another control loop took over")


class Ledger:
    """All methods raise RedisUnavailable when Redis cannot be reached or refuses; all may be called again then."""

    def __init__(self, client: "redis.Redis", settings: Settings) -> None:  # type: ignore[type-arg,unused-ignore]
        self._redis = client
        self._lease_ms = int(settings.lease_seconds * 1000)
        folder = Path(__file__).parent / "lua"
        common = (folder / "common.lua").read_text()
        self._scripts = {
            path.stem: client.register_script(common + path.read_text())
            for path in folder.glob("*.lua")
            if path.stem != "common"
        }

    @classmethod
    def connect(cls, settings: Settings) -> "Ledger":
        """Raises UsageError for a URL that is none. Does not touch the network yet."""
        found = redis_url.client(
            settings.redis_url, decode_responses=True, socket_timeout=10, socket_connect_timeout=5,
            socket_keepalive=True, health_check_interval=25,
            retry=Retry(ExponentialWithJitterBackoff(cap=1.0, base=0.1), 3),
        )  # fmt: skip
        return cls(found, settings)

    def _run(self, script: str, *args: object) -> Any:
        return self._ask(lambda: self._scripts[script](args=[str(arg) for arg in args]))

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RedisError as error:
            raise RedisUnavailable.of("Redis", error) from error

    def ping(self) -> None:
        self._ask(self._redis.ping)

    def close(self) -> None:
        self._redis.close()

    # Jobs

    def create_job(self, spec: JobSpec) -> bool:
        """False: known already. Raises JobConflict when another job is at work on the same output."""
        made = self._run("create", spec.id, spec.model_dump_json(), spec.output)
        if isinstance(made, str):
            raise JobConflict(f"{spec.output}: job {made} is writing here; choose another output or cancel it")
        return bool(made)

    def jobs(self) -> list[str]:
        """Ids, in order of creation."""
        return list(self._ask(lambda: self._redis.zrange("blip:jobs", 0, -1)))

    def statuses(self) -> Counter[str]:
        """How many of the known jobs are in each status."""
        jobs = self.jobs()
        pipeline = self._redis.pipeline(transaction=False)
        for job in jobs:
            pipeline.hget(_key(job), "status")
        return Counter(filter(None, self._ask(pipeline.execute)))

    def totals(self) -> dict[str, int]:
        """Counters of all jobs since Redis was last empty."""
        return {name: int(count) for name, count in self._ask(lambda: self._redis.hgetall("blip:totals")).items()}

    def add_total(self, name: str, count: int) -> None:
        """For metrics only: may count twice when it is called again after RedisUnavailable."""
        self._ask(lambda: self._redis.hincrby("blip:totals", name, count))

    def active_jobs(self) -> list[str]:
        """Ids of jobs that have not ended, sorted."""
        return sorted(self._ask(lambda: self._redis.smembers("blip:active")))

    def spec(self, job: str) -> JobSpec | None:
        """None: no such job. Raises SpecUnreadable for one that is of another version, or damaged."""
        text = self._ask(lambda: self._redis.hget(_key(job), "spec"))
        try:
            return JobSpec.stored(json.loads(text)) if text else None
        except ValidationError as error:
            first = error.errors()[0]
            why = f"{'.'.join(map(str, first['loc'])) or 'it'}={str(first['input'])[:40]!r}: {first['msg']}"
        except ValueError as error:
            why = str(error)
        raise SpecUnreadable(
            f"job {job}: what is in Redis of it cannot be read by this version ({why}); upgrade, or repeat its command "
            "or `blip-batch recover OUTPUT`"
        )

    def update_spec(self, spec: JobSpec) -> None:
        """For a resubmission that changes no more than the job's limits."""
        self._ask(lambda: self._redis.hset(_key(spec.id), "spec", spec.model_dump_json()))

    def state(self, job: str) -> JobState | None:
        fields: dict[str, str] = self._ask(lambda: self._redis.hgetall(_key(job)))
        return _state(job, fields) if "status" in fields else None

    def set_status(
        self, job: str, status: Status, *, epoch: str = "", error: Mapping[str, str] | None = None,
        since: Status | None = None,
    ) -> bool:  # fmt: skip
        """False: the job is not in a status that may become this one. Raises StaleEpochError.

        `since`: the one that the caller saw; of two who saw it at once, one succeeds.
        """
        text = json.dumps(dict(error)) if error else ""
        allowed = [old for old in _FROM[status] if since in {None, old}]
        return bool(self._fresh(self._run("status", job, epoch, status, text, *allowed)))

    def progress(self, job: str) -> Progress | None:
        state = self.state(job)
        if state is None:
            return None
        return Progress(state.total, state.completed, state.failed, self.in_flight(job)[0])

    def in_flight(self, job: str) -> tuple[int, int, int]:
        """Rows finished inside live leases; live leases; hints handed out that nobody has leased yet."""
        rows, live, waiting = self._run("progress", job)
        return int(rows), int(live), int(waiting)

    def at_work(self, job: str) -> list[str]:
        """The workers that hold the job's live leases, one entry for each lease."""
        return list(self._run("at_work", job))

    def report_model(self, job: str, info: Mapping[str, Any]) -> bool:
        """A worker says which model it loaded (`weights_sha256` and more). False: the job began with other weights."""
        return bool(self._run("model", job, info["weights_sha256"], json.dumps(dict(info))))

    # Chunks: for workers

    def acquire(self, hint: Hint, worker: str) -> Lease | NotLeased:
        answer = self._run("acquire", hint.job, hint.chunk, hint.plan, hint.round, worker, self._lease_ms)
        if answer[0] != "leased":
            missed: NotLeased = answer[0]
            return missed
        return Lease(hint.job, hint.chunk, hint.plan, hint.round, int(answer[1]), int(answer[2]), worker)

    def renew(self, lease: Lease, rows_done: int) -> bool:
        """False: stop; the lease is lost, or the job is paused, cancelled or failed."""
        return bool(self._run("renew", *_holder(lease), self._lease_ms, rows_done))

    def release(self, lease: Lease) -> bool:
        """Gives an unfinished chunk back (drain). The attempt is not counted; its hint must go back to the queue."""
        return bool(self._run("release", *_holder(lease), self._lease_ms))

    def commit(self, chunk: Lease | Hint, completed: int, failed: int, codes: str = "") -> bool:
        """Counts a chunk whose part is in storage; `codes` as `parts.PartInfo` has them. True the first time only."""
        counts = completed, failed, codes
        return bool(self._run("commit", chunk.job, chunk.chunk, chunk.plan, chunk.round, *counts))

    def blame(self, lease: Lease, turn: int) -> bool:
        """Before a turn (a row, or ~ the first row of a group): if this worker dies, the turn gets the blame.

        False: the lease is lost.
        """
        return bool(self._run("blame", *_holder(lease), turn))

    def suspects(self, job: str, chunk: int) -> dict[int, int]:
        """Turn -> workers that died in it."""
        found: dict[str, str] = {}
        for page in self._ask(lambda: list(self._redis.hscan_iter(_key(job) + ":blame", match=f"{chunk}:*"))):
            found[page[0]] = page[1]
        return {int(name.partition(":")[2]): int(deaths) for name, deaths in found.items()}

    def worker_seen(self, worker: str, info: Mapping[str, Any]) -> None:
        """To be called every few seconds; `slots`: chunks the worker takes at once."""
        self._run("workers", 0, worker, json.dumps(dict(info)))

    def worker_gone(self, worker: str) -> None:
        """It has ended, and is not waited for."""
        self._ask(lambda: self._redis.zrem("blip:workers", worker))

    def live_workers(self, seconds: float = 45) -> dict[str, dict[str, Any]]:
        """Workers seen within the last `seconds`."""
        flat = self._run("workers", seconds)
        return {worker: json.loads(info) for worker, info in zip(flat[::2], flat[1::2], strict=True)}

    # Chunks: for the control loop; `epoch` comes from `lead`, and a stale one raises StaleEpochError

    def lead(self, owner: str, seconds: float) -> str | None:
        """Takes or keeps the lead for that long. None: another control loop has it."""
        epoch: str | None = self._run("lead", owner, int(seconds * 1000))
        return epoch

    def reset(self, job: str, epoch: str, plan: str, chunks: int, rows: int, round_number: int = 0) -> None:
        """Sets the job's plan and round and forgets all work; `restore` then brings back what storage holds.

        In a round after the first, `open` then says what there is to do.
        """
        self._fresh(self._run("reset", job, epoch, plan, chunks, rows, round_number))

    def any_model(self, job: str, epoch: str) -> None:
        """Storage holds nothing of the job: the model that was reported before counts no more."""
        self._fresh(self._run("anew", job, epoch))

    def forget_ended(self, epoch: str, seconds: float) -> int:
        """Forgets the jobs that ended so long ago; how many."""
        total = skip = 0
        while True:
            looked, forgotten = self._fresh(self._run("forget", epoch, int(seconds * 1000), skip, _FORGET_BATCH))
            total, skip = total + forgotten, skip + looked - forgotten
            if looked < _FORGET_BATCH:
                return total

    def open(self, job: str, epoch: str, plan: str, round_number: int, chunks: Iterable[tuple[int, int]]) -> None:
        """(chunk, rows) that this round is about."""
        flat = (number for chunk in chunks for number in chunk)
        self._fresh(self._run("open", job, epoch, plan, round_number, *flat))

    def restore(self, job: str, epoch: str, plan: str, done: Iterable[tuple[int, int]], round_number: int = 0) -> None:
        """(chunk, rows) whose parts a listing shows: they count as completed until `count` says how many failed."""
        flat = (number for chunk in done for number in chunk)
        self._fresh(self._run("restore", job, epoch, plan, round_number, *flat))

    def uncounted(self, job: str, most: int) -> list[int]:
        """The next chunks to `count`, in that order."""
        return _ints(self._ask(lambda: self._redis.lrange(_key(job) + ":uncounted", 0, most - 1)))

    def count(
        self, job: str, epoch: str, plan: str, failed: Iterable[tuple[int, int, str]], round_number: int = 0
    ) -> None:
        """(chunk, failed, codes) of restored chunks, each counted once."""
        flat = (value for part in failed for value in part)
        self._fresh(self._run("count", job, epoch, plan, round_number, *flat))

    def mark(
        self, job: str, epoch: str, plan: str, done: Iterable[tuple[int, int, int, str]], round_number: int = 0
    ) -> int:
        """Counts (chunk, completed, failed, codes) of parts of the round found in storage; how many are new."""
        flat = (value for part in done for value in part)
        return int(self._fresh(self._run("mark", job, epoch, plan, round_number, *flat)))

    def measure(self, job: str, epoch: str, seconds: float, slots: float, key: str) -> None:
        """Takes the job's speed, at most once a second, averaged over about `seconds`; see `speed` for `key`."""
        self._fresh(self._run("rate", job, epoch, seconds, slots, key))

    def speed(self, key: str) -> float | None:
        """Rows per second of one lease, as last measured for `key` ("task model")."""
        found = self._ask(lambda: self._redis.hget("blip:speeds", key))
        return float(found) if found else None

    def error_codes(self, job: str) -> dict[str, int]:
        """Failed rows by code, most first."""
        found = self._ask(lambda: self._redis.hgetall(_key(job) + ":codes"))
        return dict(sorted(((code, int(rows)) for code, rows in found.items()), key=lambda pair: -pair[1]))

    def feed(self, job: str, epoch: str, most: int) -> list[int]:
        """Moves the next chunks in flight, to at most `most`; they are then to be published."""
        return _ints(self._fresh(self._run("feed", job, epoch, most, self._lease_ms)))

    def due(self, job: str, most: int = 5000) -> list[tuple[int, bool]]:
        """Overdue (chunk, was leased): a worker died at it, or its hint was lost or still waits."""
        flat = _ints(self._run("due", job, most))
        return [(chunk, bool(leased)) for chunk, leased in zip(flat[::2], flat[1::2], strict=True)]

    def requeue(self, job: str, epoch: str, chunks: Sequence[int]) -> list[int]:
        """Gives overdue chunks a new deadline; those returned are to be published again."""
        return _ints(self._fresh(self._run("requeue", job, epoch, self._lease_ms, *chunks)))

    def queue_length(self, queue: str = QUEUE) -> int:
        return int(self._ask(lambda: self._redis.llen(queue)))

    def memory_ratio(self) -> float:
        """Used memory / maxmemory; 0 where there is no limit."""
        info = self._ask(lambda: self._redis.info("memory"))
        return float(info["used_memory"] / info["maxmemory"]) if info.get("maxmemory") else 0.0

    @staticmethod
    def _fresh(answer: Any) -> Any:
        if answer is None or answer == -1:
            raise StaleEpochError
        return answer


def _key(job: str) -> str:
    return f"blip:job:{job}"


def _holder(lease: Lease) -> tuple[str, int, int, str]:
    return lease.job, lease.chunk, lease.fence, lease.worker


def _ints(values: Iterable[str]) -> list[int]:
    return [int(value) for value in values]


def _state(job: str, fields: Mapping[str, str]) -> JobState:
    def count(name: str) -> int:
        return int(fields.get(name) or 0)

    times = {name: int(value) / 1000 for name, value in fields.items() if name in _TIMES}
    return JobState(
        job, fields["status"], fields.get("plan"), count("chunks"), count("chunks_done"),  # type: ignore[arg-type]
        count("total"), count("completed"), count("failed"), count("restored"), count("round"),
        rows_per_second=_rate(fields), worker_seconds=float(fields.get("worker_seconds") or 0),
        error=json.loads(fields.get("error") or "null"), model=json.loads(fields.get("model") or "null"), **times,
    )  # fmt: skip


def _rate(fields: Mapping[str, str]) -> float | None:
    """None until it was measured; the weight mends the average's slow start from nothing."""
    weight = float(fields.get("rate_weight") or 0)
    return float(fields["rate"]) / weight if weight else None


_TIMES: Final = frozenset(
    {"created_at", "in_progress_at", "finalizing_at", "completed_at", "failed_at", "cancelled_at", "progress_at"}
)
