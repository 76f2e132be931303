"""A chunk that fails ends after a bounded number of starts, and with as many results as may be. Real processes."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import RedisServer
from system import Cluster, records, simple_job, write_images, write_rows

from orchestrator.contract import JobState
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


def killers(folder: Path, count: int, which: Callable[[int], bool], prompt: str = "") -> Path:
    """A manifest whose rows `which` kill the worker."""
    write_images(folder, count)
    prompts = ["order:kill the worker" if which(n) else prompt for n in range(count)]
    return write_rows(
        folder / "rows.jsonl", [{"image": f"{n}.png", "prompt": prompt} for n, prompt in enumerate(prompts)]
    )


def until_ended(cluster: Cluster, job: str, longest: float = 600) -> tuple[JobState, int]:
    """A worker at a time, killed once it was at work for so long; how the job ended, and how many workers died."""
    deadline, deaths, worker, since = time.monotonic() + 120, 0, cluster.start_worker(), time.monotonic()
    while (state := cluster.ledger.state(job)) is None or not state.ended:
        now = time.monotonic()
        assert now < deadline, cluster.logs()
        if cluster.ledger.in_flight(job)[1] == 0:  # no lease
            since = now
        if now - since > longest:
            worker.kill()
            worker.wait()
        if worker.poll() is not None:
            deaths, worker, since = deaths + 1, cluster.start_worker(), now
        time.sleep(0.02)
    return state, deaths


def failed_rows(output: Path) -> list[tuple[int, str, str]]:
    assert verify(str(output)).ok
    return [(r["row"], r["error"]["code"], r["error"]["message"]) for r in records(output) if r["error"]]


def test_a_row_that_kills_the_worker_fails_alone_in_a_large_chunk(cluster: Cluster, tmp_path: Path) -> None:
    cluster.environment["BLIP_MAX_ATTEMPTS"] = "6"
    cluster.start_orchestrator()
    job = cluster.submit(killers(tmp_path / "in", 150, lambda n: n == 70), tmp_path / "out", chunk_rows=150).id
    state, deaths = until_ended(cluster, job)
    assert (state.status, state.completed, state.failed) == ("completed", 149, 1)
    assert failed_rows(tmp_path / "out") == [(70, "crashed", "2 workers died while they worked on this row")]
    assert deaths == 4  # among all, in its group, and twice alone


def test_kills_from_outside_cost_no_row_of_a_chunk_that_is_quick_only_in_batches(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.start_orchestrator()
    rows = simple_job(tmp_path / "in", 256, prompt="order:batch well")  # 2 s; one by one half a minute
    job = cluster.submit(rows, tmp_path / "out", chunk_rows=256).id
    first = cluster.start_worker()
    cluster.until(job, lambda _: cluster.ledger.in_flight(job)[0] > 0)
    first.kill()
    first.wait()
    state, _ = until_ended(cluster, job, longest=8)
    assert (state.status, state.completed, state.failed) == ("completed", 256, 0)


def test_at_the_limit_rows_that_a_worker_died_at_fail_and_their_neighbours_do_not(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.start_orchestrator()
    job = cluster.submit(killers(tmp_path / "in", 12, lambda n: n in {3, 7}), tmp_path / "out", chunk_rows=12).id
    state, deaths = until_ended(cluster, job)
    assert (state.status, state.completed, state.failed) == ("completed", 10, 2)
    why = "a worker died at this row, alone"
    assert failed_rows(tmp_path / "out") == [(3, "crashed", why), (7, "crashed", why)]
    assert deaths == 3


def test_a_chunk_ends_after_twice_the_limit_whatever_its_rows(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_orchestrator()
    job = cluster.submit(killers(tmp_path / "in", 12, lambda n: n % 2 == 0), tmp_path / "out", chunk_rows=12).id
    state, deaths = until_ended(cluster, job)
    assert (state.status, state.failed, deaths) == ("failed", 12, 4)
    assert failed_rows(tmp_path / "out")[-1] == (11, "crashed", "workers died 4 times over this row's chunk")
