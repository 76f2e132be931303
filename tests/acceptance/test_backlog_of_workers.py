"""The number that KEDA reads, over HTTP from a real orchestrator while real workers start, work, drain and end.

It is compared with what is seen from outside: the parts that lie in the output, the chunks that the ledger has in
flight, and the formula of the documentation, written down once more.
"""

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from servers import RedisServer, free_port
from system import Cluster, simple_job

from orchestrator.client import BlipBatch
from orchestrator.contract import JobSpec

ROWS, CHUNK_ROWS = 600, 20  # 20 ms for a row, and the engine of a worker does one after the other
SECONDS, MOST, THREADS = 1, 7, 2


@dataclass(frozen=True)
class Seen:
    """Of a job, from outside."""

    parts: frozenset[int]  # chunks whose part is in the output
    in_flight: frozenset[int]  # chunks that were handed out and are not counted
    busy: tuple[str, ...]  # workers that hold leases, one entry for each
    speed: float | None  # rows/s of one lease

    @property
    def counted(self) -> int:
        """Chunks that are behind us: a part may be written and not be counted yet, but then its chunk is in flight."""
        return len(self.parts - self.in_flight)


@dataclass(frozen=True)
class Look:
    """An answer of the API, and what was seen just before and just after it."""

    before: Seen
    rows: int
    chunks: int
    desired: int
    after: Seen

    @property
    def still(self) -> bool:
        """Nothing moved meanwhile: the answer must be exactly what follows from what was seen."""
        return self.before == self.after


class Watch:
    """Looks at a job's backlog until told that it is enough."""

    def __init__(self, cluster: Cluster, client: BlipBatch, spec: JobSpec) -> None:
        self._cluster, self._client, self._spec = cluster, client, spec
        self.looks: list[Look] = []

    def look(self) -> Look:
        before = self._see()
        answer = self._client.backlog()
        look = Look(before, answer.rows, answer.chunks, answer.desired_workers, self._see())
        check(look)
        self.looks.append(look)
        return look

    def _see(self) -> Seen:
        names = [path.name for path in Path(self._spec.output, "results").glob("part-*.jsonl")]
        parts = frozenset(int(name[5:13]) for name in names if re.fullmatch(r"part-\d{8}\.jsonl", name))
        ledger = self._cluster.ledger
        in_flight = frozenset(map(int, ledger._redis.zrange(f"blip:job:{self._spec.id}:inflight", 0, -1)))
        busy, speed = ledger.at_work(self._spec.id), ledger.speed(f"caption {self._spec.model}")
        return Seen(parts, in_flight, tuple(sorted(busy)), speed)


def check(look: Look) -> None:
    """What holds at any moment, and to the row where nothing moved."""
    assert look.rows == look.chunks * CHUNK_ROWS
    if look.after.in_flight or len(look.after.parts) * CHUNK_ROWS < ROWS:
        assert look.rows > 0, look
        assert look.desired > 0, look
    assert look.rows >= ROWS - len(look.after.parts) * CHUNK_ROWS, look
    if look.still:
        assert look.rows == ROWS - look.before.counted * CHUNK_ROWS, look
        assert look.desired == formula(look), look


def formula(look: Look) -> int:
    """As docs/kubernetes.md has it."""
    speed, busy = look.before.speed, len(set(look.before.busy))
    by_time = math.ceil(look.rows / (speed * THREADS) / SECONDS) if speed else 0
    by_work = math.ceil(look.chunks / THREADS)
    return min(MOST, max(busy, min(max(1, by_time), by_work)))


@pytest.fixture
def cluster(redis_server: RedisServer, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    cluster.environment["BLIP_LEASE_SECONDS"] = "30"  # none runs out on a machine that is slow
    yield cluster
    cluster.close()


def test_the_number_is_right_from_no_worker_to_the_end(cluster: Cluster, tmp_path: Path) -> None:
    port = free_port()
    limits = {"BLIP_BACKLOG_SECONDS": str(SECONDS), "BLIP_MAX_WORKERS": str(MOST)}
    cluster.start("orchestrator", BLIP_API_PORT=str(port), **limits)
    manifest, output = simple_job(tmp_path, ROWS, prompt="order:slow"), tmp_path / "out"
    with BlipBatch(f"http://127.0.0.1:{port}") as client:
        assert client.backlog().model_dump() == {"rows": 0, "chunks": 0, "desired_workers": 0}
        spec = cluster.submit(manifest, output, chunk_rows=CHUNK_ROWS)
        cluster.until(spec.id, lambda state: state.status == "in_progress")
        watch = Watch(cluster, client, spec)
        look = watch.look()  # planned, and handed out to nobody
        assert (look.rows, look.chunks, look.desired, look.after.busy) == (ROWS, ROWS // CHUNK_ROWS, 1, ())

        workers = [cluster.start_worker(BLIP_DRAIN_SECONDS="20") for _ in range(2)]
        deadline = time.monotonic() + 90
        while len(watch.look().after.parts) < ROWS // CHUNK_ROWS * 0.4:  # start, and saturation
            assert time.monotonic() < deadline, cluster.logs()
            time.sleep(0.05)
        saturated = watch.looks[1:]
        workers[0].terminate()
        while workers[0].poll() is None:  # it finishes what it holds, and that counts until then
            assert watch.look().rows > 0
            time.sleep(0.05)
        assert workers[0].returncode == 0
        while watch.look().rows > 0:
            assert time.monotonic() < deadline, cluster.logs()
            time.sleep(0.05)
        state = cluster.until_ended(spec.id)
        assert (state.status, state.completed, state.failed) == ("completed", ROWS, 0)
        assert client.backlog().model_dump() == {"rows": 0, "chunks": 0, "desired_workers": 0}

    exact = [look for look in watch.looks if look.still]
    assert len(exact) > 10  # mostly nothing moves within the milliseconds of a look
    assert {len(set(look.before.busy)) for look in saturated} >= {0, 2}  # before the first, and both
    assert max(look.desired for look in watch.looks) == MOST  # by the speed, which was measured meanwhile
    assert min(look.desired for look in watch.looks if look.rows) < MOST
