"""The whole way over HTTP with real processes: orchestrators, a worker around a dry engine, the client."""

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api import TOKEN, http
from servers import RedisServer, free_port
from system import Cluster, colour, simple_job

from orchestrator.client import BlipBatch
from orchestrator.verify import verify


@pytest.fixture
def cluster(redis_server: RedisServer, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    cluster.environment |= {"BLIP_API_TOKEN": TOKEN, "BLIP_ALLOWED_FOLDERS": str(tmp_path)}
    yield cluster
    cluster.close()


def start(cluster: Cluster) -> tuple["subprocess.Popen[bytes]", str]:
    """An orchestrator and the URL of its API, once that answers."""
    port = free_port()
    process, url = cluster.start("orchestrator", BLIP_API_PORT=str(port)), f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return process, url
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError(cluster.logs())


def test_from_a_submission_over_http_to_results(cluster: Cluster, tmp_path: Path) -> None:
    _, url = start(cluster)
    cluster.start_worker()
    manifest = simple_job(tmp_path / "in", 60)
    (tmp_path / "in/7.png").unlink()
    with BlipBatch(url, TOKEN) as blip:
        job = blip.submit(manifest, "caption", tmp_path / "out", model=str(cluster.model), chunk_rows=10)
        statuses = [now.status for now in job.events()]
        assert (statuses[0], statuses[-1]) == ("validating", "completed")
        assert [record["row"] for record in job.errors()] == [7]
        captions = [record["result"] and record["result"]["caption"] for record in job.results()]
    assert captions == [None if n == 7 else colour(n) for n in range(60)]


def test_two_orchestrators_serve_the_same_and_the_leader_may_die(cluster: Cluster, tmp_path: Path) -> None:
    (first, first_url), (second, second_url) = start(cluster), start(cluster)
    cluster.start_worker()
    manifest = simple_job(tmp_path / "in", 400, prompt="order:slow")
    with BlipBatch(first_url, TOKEN) as one, BlipBatch(second_url, TOKEN) as two:
        job = one.submit(manifest, "caption", tmp_path / "out", model=str(cluster.model), chunk_rows=10)
        same = two.submit(manifest, "caption", tmp_path / "out", model=str(cluster.model), chunk_rows=10)
        assert job.id == same.id
        cluster.until(job.id, lambda state: state.chunks_done >= 3)
        mine, other = job.status(), same.status()
        assert mine.status == other.status == "in_progress"
        leader = cluster.ledger._redis.hget("blip:control", "owner").split("-")[-2]  # type: ignore[union-attr]
        dies, stays = (first, same) if leader == str(first.pid) else (second, job)
        dies.send_signal(signal.SIGKILL)
        dies.wait()
        assert stays.wait(timeout=90, pause=0.1).status == "completed"
        assert [record["row"] for record in stays.results()] == list(range(400))
    audit = verify(str(tmp_path / "out"))
    assert audit.ok, audit.problems


def test_the_backlog_of_a_real_job_is_zero_at_the_end_and_never_before(cluster: Cluster, tmp_path: Path) -> None:
    """Looked at all the while by another thread, through start, saturation, drain and end."""
    process, url = start(cluster)
    looks: list[tuple[str, dict[str, int], str]] = []
    with http(url) as api, BlipBatch(url, TOKEN) as blip:
        assert set(api.get("/v1/backlog").json().values()) == {0}
        manifest = simple_job(tmp_path / "in", 200, prompt="order:slow")
        job = blip.submit(manifest, "caption", tmp_path / "out", model=str(cluster.model), chunk_rows=10)
        done = threading.Event()

        def look() -> None:
            while not done.is_set():
                before = api.get(f"/v1/jobs/{job.id}").json()["status"]
                backlog = api.get("/v1/backlog").json()
                looks.append((before, backlog, api.get(f"/v1/jobs/{job.id}").json()["status"]))

        looking = threading.Thread(target=look)
        looking.start()
        time.sleep(1)  # there is work and no worker
        cluster.start_worker()
        job.wait(timeout=90, pause=0.05)
        done.set()
        looking.join()
        assert set(api.get("/v1/backlog").json().values()) == {0}
    unfinished = [backlog for _, backlog, after in looks if after in {"validating", "in_progress"}]
    assert {status for status, _, _ in looks} >= {"in_progress", "completed"}
    assert any(backlog["rows"] == 200 for backlog in unfinished)  # before the worker came
    assert any(0 < backlog["rows"] < 200 for backlog in unfinished)
    left = [backlog for _, backlog, after in looks if after == "in_progress" and backlog["rows"]]
    assert all(backlog["desired_workers"] >= 1 and backlog["chunks"] >= 1 for backlog in left)
    # Rows without a part are in flight or wait: 0 means that the last part is there, so that only the audit is left.
    zeros = [n for n, (_, backlog, _) in enumerate(looks) if backlog["desired_workers"] == 0]
    assert zeros == list(range(zeros[0], len(looks)))
    assert looks[zeros[0] - 1][1]["rows"] > 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
