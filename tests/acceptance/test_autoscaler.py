"""From no worker to the end of a job and to no worker, by the number that KEDA reads, while workers are killed."""

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from servers import RedisServer, free_port
from system import Cluster, simple_job

from benchmarks.autoscaler import Autoscaler
from orchestrator.client import BlipBatch
from orchestrator.verify import verify

ROWS = 4000  # 20 ms each in a worker: about 40 s
MOST = 4


@pytest.fixture
def cluster(redis_server: RedisServer, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def test_from_zero_to_done_to_zero_while_workers_are_killed(cluster: Cluster, tmp_path: Path) -> None:
    port = free_port()
    cluster.start("orchestrator", BLIP_API_PORT=str(port), BLIP_BACKLOG_SECONDS="15", BLIP_MAX_WORKERS=str(MOST))
    with BlipBatch(f"http://127.0.0.1:{port}") as client:
        # Each worker lives for 40 s in the mean: harder than 30 % a minute, so that a short job sees several killed.
        scaler = Autoscaler(client, cluster.environment, MOST, kill_per_minute=1.5, patience=3)
        try:
            first = scaler.step()
            assert first is not None
            assert (first.desired, first.running, first.rows) == (0, 0, 0)
            spec = cluster.submit(simple_job(tmp_path, ROWS, prompt="order:slow"), tmp_path / "out", chunk_rows=40)
            deadline = time.monotonic() + 150
            while not scaler.done:
                assert time.monotonic() < deadline, scaler.looks[-5:]
                scaler.step()
                time.sleep(0.5)
        finally:
            scaler.close()
    state = cluster.ledger.state(spec.id)
    assert state is not None
    assert (state.status, state.completed, state.failed) == ("completed", ROWS, 0)
    audit = verify(str(tmp_path / "out"))
    assert audit.ok, audit.problems
    assert audit.rows_found == ROWS

    assert [look for look in scaler.looks if look.rows and not look.desired] == []  # never zero with work left
    assert max(look.running for look in scaler.looks) == MOST
    assert scaler.killed >= 2
    assert scaler.let_go >= 1
    assert scaler.started == scaler.killed + scaler.let_go
    assert not [process for process in psutil.Process().children() if "workers" in process.cmdline()]
