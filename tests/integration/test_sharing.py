"""Jobs that share workers, and models that have workers of their own: real processes around a dry engine."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from servers import MotoServer, RedisServer
from system import Cluster, simple_job, write_images, write_rows

from orchestrator import lifecycle
from orchestrator.plan import load_plan
from orchestrator.rounds import latest_records
from orchestrator.scheduling import queue_of
from orchestrator.storage import open_store
from orchestrator.verify import verify


@pytest.fixture
def cluster(redis_server: RedisServer, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def seconds_of(cluster: Cluster, manifest: Path, output: Path) -> float:
    began = time.monotonic()
    job = cluster.submit(manifest, output, chunk_rows=100).id
    assert cluster.until_ended(job).status == "completed"
    return time.monotonic() - began


def test_a_small_job_is_not_stuck_behind_a_huge_one(cluster: Cluster, tmp_path: Path) -> None:
    small = simple_job(tmp_path / "in", 200)
    huge = tmp_path / "in" / "huge.jsonl"
    with huge.open("w") as file:
        for n in range(1_000_000):
            file.write(f'{{"image": "{n % 200}.png"}}\n')
    cluster.start_orchestrator()
    cluster.start_worker()
    seconds_of(cluster, small, tmp_path / "warm")  # the worker is up and holds the model
    alone = seconds_of(cluster, small, tmp_path / "alone")
    job = cluster.submit(huge, tmp_path / "huge", chunk_rows=1000).id
    cluster.until(job, lambda state: state.chunks_done >= 8)
    beside = seconds_of(cluster, small, tmp_path / "beside")
    state = cluster.ledger.state(job)
    assert state is not None
    assert state.status == "in_progress"  # it was at work all the while
    lifecycle.cancel(cluster.ledger, job)
    assert beside <= 5 * alone, f"{alone:.2f} s alone, {beside:.2f} s beside a huge job"
    cluster.until_ended(job)


def test_retry_fetches_only_the_failed_objects_again(cluster: Cluster, s3_server: MotoServer, tmp_path: Path) -> None:
    write_images(tmp_path / "in", 40)
    store = open_store("s3://blip/in", cluster.settings)
    missing = [n for n in range(40) if n % 4 == 1]
    for n in set(range(40)) - set(missing):
        store.put(f"{n}.png", (tmp_path / "in" / f"{n}.png").read_bytes())
    store.put("rows.jsonl", "".join(f'{{"image": "s3://blip/in/{n}.png"}}\n' for n in range(40)).encode())
    proxy = FaultyProxy(s3_server.port)
    try:
        cluster.environment |= s3_server.s3_environment() | {"AWS_ENDPOINT_URL_S3": proxy.endpoint}
        cluster.start_orchestrator()
        cluster.start_worker()
        job = cluster.submit("s3://blip/in/rows.jsonl", "s3://blip/out").id
        assert cluster.until_ended(job).failed == 10
        for n in missing[:5]:
            store.put(f"{n}.png", (tmp_path / "in" / f"{n}.png").read_bytes())
        proxy.requests.clear()
        lifecycle.retry(cluster.ledger, cluster.settings, job)
        state = cluster.until_ended(job)
    finally:
        proxy.close()
    assert (state.status, state.completed, state.failed, state.round) == ("completed", 35, 5, 1)
    fetched = Counter(path for method, path in proxy.requests if method == "GET" and path.endswith(".png"))
    assert fetched == Counter(f"/blip/in/{n}.png" for n in missing)
    assert verify("s3://blip/out", cluster.settings).ok
    plan = load_plan(open_store("s3://blip/out", cluster.settings), cluster.settings)
    assert plan is not None
    merged = list(latest_records(plan))
    assert [record["row"] for record in merged] == list(range(40))
    assert [record["row"] for record in merged if record["error"]] == missing[5:]


def test_kill_9_of_a_worker_during_retry(cluster: Cluster, tmp_path: Path) -> None:
    write_images(tmp_path / "in", 100)
    rows = [{"image": f"{n}.png" if n % 2 else f"later-{n}.png", "prompt": "order:slow"} for n in range(100)]
    manifest = write_rows(tmp_path / "in" / "rows.jsonl", rows)
    cluster.start_orchestrator()
    worker = cluster.start_worker()
    job = cluster.submit(manifest, tmp_path / "out").id
    assert cluster.until_ended(job).failed == 50
    for n in range(0, 100, 2):
        (tmp_path / "in" / f"{n}.png").rename(tmp_path / "in" / f"later-{n}.png")
    lifecycle.retry(cluster.ledger, cluster.settings, job)
    cluster.until(job, lambda state: state.round == 1 and cluster.ledger.in_flight(job)[1] >= 1)
    worker.kill()
    worker.wait()
    cluster.start_worker()
    state = cluster.until_ended(job)
    assert (state.status, state.completed, state.failed) == ("completed", 100, 0)
    audit = verify(str(tmp_path / "out"))
    assert audit.ok, audit.problems


def test_a_model_with_workers_of_its_own(cluster: Cluster, tmp_path: Path) -> None:
    """Its hints go to their queue, other jobs wait for other workers, and both say what they wait for."""
    other = tmp_path / "other"
    other.mkdir()
    manifest = simple_job(tmp_path / "in", 30)
    cluster.start_orchestrator()
    cluster.start_worker(BLIP_MODELS=f"{other}, demo+x/y")
    deadline = time.monotonic() + 20
    while not cluster.ledger.live_workers():
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.05)
    mine = cluster.submit(manifest, tmp_path / "mine").id
    theirs = cluster.submit(manifest, tmp_path / "theirs", model=str(other)).id
    assert cluster.until_ended(theirs).status == "completed"
    status = lifecycle.read_status(cluster.ledger, cluster.settings, mine)
    assert status["status"] == "in_progress"
    assert status["notice"] == f"no live worker serves model {cluster.model} (BLIP_MODELS)"
    assert cluster.ledger.queue_length(queue_of(str(other))) == 0
    cluster.start_worker()
    assert cluster.until_ended(mine).status == "completed"
    deadline = time.monotonic() + 10
    while not any(str(cluster.model) in info["models"] for info in cluster.ledger.live_workers().values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert json.loads((tmp_path / "mine/summary.json").read_text())["request_counts"]["completed"] == 30
