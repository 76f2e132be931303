"""A chunk that cannot be done ends in a bounded number of starts, and its job with it. With real processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import RedisServer
from system import Cluster, records, simple_job

from orchestrator.verify import verify


@pytest.fixture
def cluster(redis_server: RedisServer, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    cluster.environment |= {"BLIP_LEASE_SECONDS": "1", "BLIP_RENEW_SECONDS": "0.2", "BLIP_MAX_ATTEMPTS": "2"}
    yield cluster
    cluster.close()


def test_an_error_that_nobody_expected_ends_the_job_when_it_does_not_pass(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_orchestrator()
    worker = cluster.start("faulty_worker", FAULTS="1000")
    state = cluster.until_ended(cluster.submit(simple_job(tmp_path / "in", 30), tmp_path / "out").id)
    assert state.status == "failed"
    assert state.error == {
        "code": "internal",
        "message": r"chunk 1 cannot be done: ArithmeticError('of two\nlines'); see the workers' logs",
    }
    log = (tmp_path / "faulty_worker-1.log").read_text()
    assert log.count("ArithmeticError: of two") == 3  # a traceback of each start
    assert "was begun 3 times" in log
    assert worker.poll() is None
    after = cluster.submit(simple_job(tmp_path / "other", 5), tmp_path / "out2").id  # and it goes on
    assert cluster.until_ended(after).status == "completed"


def test_an_error_that_nobody_expected_costs_nothing_when_it_passes(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_orchestrator()
    cluster.start("faulty_worker", FAULTS="1")
    job = cluster.submit(simple_job(tmp_path / "in", 30), tmp_path / "out").id
    assert cluster.until_ended(job).status == "completed"
    assert verify(str(tmp_path / "out")).ok
    assert [record["row"] for record in records(tmp_path / "out") if record["result"]] == list(range(30))
