"""Workers and the orchestrator as real processes, killed, stopped and signalled in mid-job. Every row ends once."""

import hashlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from servers import MotoServer, RedisServer
from system import Cluster, colour, records, simple_job, write_images, write_rows

from orchestrator.broker import TASK_NAME, make_celery, publish
from orchestrator.contract import Hint
from orchestrator.ledger import QUEUE
from orchestrator.plan import load_plan
from orchestrator.storage import open_store
from orchestrator.verify import verify


@pytest.fixture
def cluster(redis_server: RedisServer, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def expect_whole(output: Path, count: int, failed: int = 0) -> None:
    audit = verify(str(output))
    assert audit.ok, audit.problems
    assert (audit.rows_found, audit.failed) == (count, failed)
    assert [record["row"] for record in records(output)] == list(range(count))


def test_worker_then_orchestrator_killed_in_mid_job(cluster: Cluster, tmp_path: Path) -> None:
    manifest = simple_job(tmp_path / "in", 200, prompt="order:slow")
    orchestrator, worker = cluster.start_orchestrator(), cluster.start_worker()
    job = cluster.submit(manifest, tmp_path / "out").id
    cluster.until(job, lambda state: state.chunks_done >= 2)
    worker.kill()
    worker.wait()
    cluster.until(job, lambda state: state.chunks_done < state.chunks)
    cluster.start_worker()
    before = cluster.ledger.state(job)
    assert before is not None
    cluster.until(job, lambda state: state.chunks_done > before.chunks_done)
    orchestrator.kill()
    orchestrator.wait()
    state = cluster.ledger.state(job)
    assert state is not None
    assert state.status == "in_progress"
    cluster.start_orchestrator()
    assert cluster.until_ended(job).status == "completed"
    expect_whole(tmp_path / "out", 200)
    assert {record["result"]["caption"] for record in records(tmp_path / "out")} == {
        f"{colour(n)} order:slow" for n in range(200)
    }


def test_a_killed_worker_leaves_no_child(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_orchestrator()
    worker = cluster.start_worker()
    job = cluster.submit(simple_job(tmp_path / "in", 40, prompt="order:slow"), tmp_path / "out").id
    cluster.until(job, lambda state: state.chunks_done >= 1)
    tree = psutil.Process(worker.pid).children(recursive=True)
    assert len(tree) >= 2
    worker.kill()
    worker.wait()
    _, alive = psutil.wait_procs(tree, timeout=5)
    assert not alive


def test_sigterm_puts_unfinished_chunks_back_at_once(cluster: Cluster, tmp_path: Path) -> None:
    cluster.environment["BLIP_LEASE_SECONDS"] = "300"  # so that only the drain can bring the chunks back in time
    cluster.start_orchestrator()
    worker = cluster.start_worker(BLIP_DRAIN_SECONDS="0.5")
    manifest = simple_job(tmp_path / "in", 160, prompt="order:slow")
    job = cluster.submit(manifest, tmp_path / "out", chunk_rows=80).id
    cluster.until(job, lambda _: cluster.ledger.in_flight(job)[0] >= 10)
    worker.terminate()
    assert worker.wait(15) == 0
    state = cluster.ledger.state(job)
    assert state is not None
    assert state.chunks_done == 0
    assert cluster.ledger.in_flight(job)[1] == 0  # both leases were given back
    cluster.start_worker()
    assert cluster.until_ended(job).status == "completed"
    expect_whole(tmp_path / "out", 160)


def test_sigterm_finishes_what_fits(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_orchestrator()
    worker = cluster.start_worker(BLIP_DRAIN_SECONDS="20")
    manifest = simple_job(tmp_path / "in", 240, prompt="order:slow")
    job = cluster.submit(manifest, tmp_path / "out", chunk_rows=120).id
    cluster.until(job, lambda _: cluster.ledger.in_flight(job)[0] >= 10)
    worker.terminate()
    assert worker.wait(25) == 0
    assert not cluster.ledger.live_workers()  # it said goodbye
    assert cluster.until_ended(job, 10).status == "completed"  # without any other worker
    expect_whole(tmp_path / "out", 240)


def test_a_worker_stopped_past_its_lease_changes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_orchestrator()
    first = cluster.start_worker()
    job = cluster.submit(simple_job(tmp_path / "in", 60, prompt="order:slow"), tmp_path / "out", chunk_rows=30).id
    cluster.until(job, lambda _: cluster.ledger.in_flight(job)[1] == 2)  # both chunks are leased
    first.send_signal(signal.SIGSTOP)
    cluster.start_worker()
    assert cluster.until_ended(job).status == "completed"
    before = digests(tmp_path / "out")
    first.send_signal(signal.SIGCONT)
    time.sleep(2)
    assert first.poll() is None
    assert digests(tmp_path / "out") == before
    expect_whole(tmp_path / "out", 60)


def digests(output: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (output / "results").iterdir()}


def test_duplicates_and_garbage_in_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    engine_log = tmp_path / "engine.log"
    cluster.start_orchestrator()
    job = cluster.submit(simple_job(tmp_path / "in", 30), tmp_path / "out").id
    cluster.until(job, lambda state: state.status == "in_progress")
    plan = load_plan(open_store(str(tmp_path / "out")), cluster.settings)
    assert plan is not None
    hint = Hint.of(job, plan.hash, plan.chunk(1))
    celery = make_celery(cluster.settings)
    for garbage in ([], [{}], ["x" * 2000], [{**hint.to_message(), "end": -1}], [hint.to_message(), 1]):
        celery.send_task(TASK_NAME, args=garbage, queue=QUEUE)
    celery.send_task("os.system", args=[f"touch {tmp_path}/owned"], queue=QUEUE)
    celery.send_task(TASK_NAME, args=[hint.to_message()], queue=QUEUE, serializer="pickle")
    publish(celery, [hint] * 300)
    cluster.start_worker(DRY_ENGINE_LOG=str(engine_log))
    assert cluster.until_ended(job).status == "completed"
    expect_whole(tmp_path / "out", 30)
    deadline = time.monotonic() + 20
    while cluster.ledger.queue_length() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert cluster.ledger.queue_length() == 0
    assert len(engine_log.read_text().splitlines()) == 30  # each row once
    assert not (tmp_path / "owned").exists()


def test_a_row_that_kills_the_worker_fails_alone(cluster: Cluster, tmp_path: Path) -> None:
    write_images(tmp_path / "in", 12)
    rows = [{"image": f"{n}.png", "prompt": "order:kill the worker" if n == 7 else ""} for n in range(12)]
    cluster.start_orchestrator()
    job = cluster.submit(write_rows(tmp_path / "in" / "rows.jsonl", rows), tmp_path / "out", chunk_rows=12).id
    deaths = 0
    worker = cluster.start_worker()
    deadline = time.monotonic() + 60
    while (state := cluster.ledger.state(job)) is None or not state.ended:
        assert time.monotonic() < deadline, cluster.logs()
        if worker.poll() is not None:
            deaths, worker = deaths + 1, cluster.start_worker()
        time.sleep(0.05)
    assert state.status == "completed"
    assert deaths == 3  # among neighbours, then twice alone
    expect_whole(tmp_path / "out", 12, failed=1)
    failed = [record for record in records(tmp_path / "out") if record["error"]]
    assert [(record["row"], record["error"]["code"]) for record in failed] == [(7, "crashed")]


def test_a_worker_whose_engine_cannot_restart_ends_with_one_line(cluster: Cluster, tmp_path: Path) -> None:
    worker = cluster.start_worker(BLIP_DEVICE="broken")
    assert worker.wait(20) == 1
    last = (tmp_path / "workers-0.log").read_text().strip().splitlines()[-1]
    assert last == "the worker cannot start: the engine cannot start: RuntimeError('no such device')"


def test_a_worker_without_redis_ends_with_one_line(cluster: Cluster, tmp_path: Path) -> None:
    worker = cluster.start_worker(BLIP_REDIS_URL="redis://127.0.0.1:1/0")
    assert worker.wait(20) == 1
    last = (tmp_path / "workers-0.log").read_text().strip().splitlines()[-1]
    assert last.startswith("the worker cannot start: Redis: ")
    assert last.endswith("check BLIP_REDIS_URL")


def test_every_way_a_row_can_fail_leaves_its_neighbours_alone(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_images(folder, 12)
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:-40])
    (folder / "text.jpg").write_text("no image")
    outside = tmp_path / "secret.png"
    outside.write_bytes(whole)
    (folder / "link.png").symlink_to(outside)
    bad: list[tuple[dict[str, object], str]] = [
        ({"image": "cut.png", "question": "?"}, "image_truncated"),
        ({"image": "text.jpg", "question": "?"}, "image_unreadable"),
        ({"image": "absent.png", "question": "?"}, "image_not_found"),
        ({"image": "../secret.png", "question": "?"}, "uri_not_allowed"),
        ({"image": "link.png", "question": "?"}, "uri_not_allowed"),
        ({"image": "http://169.254.169.254/latest", "question": "?"}, "unsupported_uri"),
        ({"image": "file:///etc/passwd", "question": "?"}, "unsupported_uri"),
        ({"image": "s3://elsewhere/1.png", "question": "?"}, "uri_not_allowed"),
        ({"question": "?"}, "row_invalid"),
        ({"image": "1.png"}, "text_missing"),
        ({"image": "2.png", "question": "x" * 501}, "text_too_long"),
        ({"image": "3.png", "question": "order:raise"}, "internal"),
        ({"image": "4.png", "question": "order:memory"}, "out_of_memory"),
        ({"image": "5.png", "question": "order:die"}, "crashed"),
        ({"image": "6.png", "question": "order:hang"}, "crashed"),
    ]
    rows: list[dict[str, object]] = []
    for n, (row, _) in enumerate(bad):
        rows += [{"image": f"{n % 3}.png", "question": f"q{n}"}, row]
    manifest = write_rows(folder / "rows.jsonl", rows)
    cluster.start_orchestrator()
    cluster.start_worker()
    job = cluster.submit(manifest, tmp_path / "out", "vqa", chunk_rows=30).id
    state = cluster.until_ended(job)
    assert (state.status, state.completed, state.failed) == ("completed", 15, 15)
    found = records(tmp_path / "out")
    assert [record["error"]["code"] for record in found[1::2]] == [code for _, code in bad]
    assert [record["result"]["answer"] for record in found[::2]] == [f"{n % 3},0,7 q{n}" for n in range(15)]
    expect_whole(tmp_path / "out", 30, failed=15)


def test_a_job_on_s3(cluster: Cluster, s3_server: MotoServer, tmp_path: Path) -> None:
    cluster.environment |= s3_server.s3_environment()
    store = open_store("s3://blip/in", cluster.settings)
    write_images(tmp_path / "in", 8)
    for n in range(8):
        store.put(f"{n}.png", (tmp_path / "in" / f"{n}.png").read_bytes())
    rows = [f'{{"image": "s3://blip/in/{n}.png"}}' for n in (*range(8), 99)] + ['{"image": "s3://other/1.png"}']
    store.put("rows.jsonl", "\n".join(rows).encode())
    cluster.start_orchestrator()
    cluster.start_worker()
    job = cluster.submit("s3://blip/in/rows.jsonl", "s3://blip/out", chunk_rows=4).id
    state = cluster.until_ended(job)
    assert (state.status, state.completed, state.failed) == ("completed", 8, 2)
    audit = verify("s3://blip/out", cluster.settings)
    assert audit.ok, audit.problems
    errors = open_store("s3://blip/out", cluster.settings).get("errors.jsonl").decode()
    assert "image_not_found" in errors
    assert "uri_not_allowed" in errors


def test_redis_killed_and_empty_again_in_mid_job(cluster: Cluster, redis_server: RedisServer, tmp_path: Path) -> None:
    cluster.start_orchestrator()
    worker = cluster.start_worker()
    spec = cluster.submit(simple_job(tmp_path / "in", 120, prompt="order:slow"), tmp_path / "out")
    cluster.until(spec.id, lambda state: state.chunks_done >= 2)
    redis_server.kill()
    time.sleep(0.5)
    redis_server.start()  # without persistence: it knows nothing
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "summary.json").exists():
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.1)
    assert worker.poll() is None
    expect_whole(tmp_path / "out", 120)


def test_workers_of_two_precisions_share_a_job_and_say_so(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_orchestrator()
    first = cluster.start_worker(BLIP_PRECISION="bf16")
    job = cluster.submit(simple_job(tmp_path / "in", 60, prompt="order:slow"), tmp_path / "out").id
    cluster.until(job, lambda state: state.chunks_done >= 1)
    first.terminate()
    assert first.wait(30) == 0
    cluster.start_worker(BLIP_PRECISION="fp32")
    assert cluster.until_ended(job).status == "completed"
    assert "this job began in bf16: scores of fp32 differ a little" in cluster.logs()
    model = json.loads((tmp_path / "out/job.json").read_text())["model"]
    assert (model["precision"], model["device"]) == ("bf16", "cpu")
    expect_whole(tmp_path / "out", 60)


@pytest.mark.parametrize("change", [{"task": "segment"}, {"options": {"segments": 3}}])
def test_a_job_of_another_version_waits_for_a_worker_of_that_version(
    cluster: Cluster, redis_server: RedisServer, tmp_path: Path, change: dict[str, object]
) -> None:
    """In a rolling upgrade old workers meet new jobs."""
    cluster.start_orchestrator()
    job = cluster.submit(simple_job(tmp_path / "in", 20), tmp_path / "out").id
    cluster.until(job, lambda _: cluster.ledger.queue_length() > 0)
    redis = redis_server.client()
    known = redis.hget(f"blip:job:{job}", "spec")
    redis.hset(f"blip:job:{job}", "spec", json.dumps(json.loads(known) | change))
    cluster.start_worker()
    cluster.until(job, lambda _: f"put back: job {job}" in cluster.logs())
    redis.hset(f"blip:job:{job}", "spec", known)  # as its own version reads it
    assert cluster.until_ended(job).status == "completed"
    expect_whole(tmp_path / "out", 20)


def test_a_cancelled_job_is_let_go(cluster: Cluster, tmp_path: Path) -> None:
    engine_log = tmp_path / "engine.log"
    cluster.start_orchestrator()
    cluster.start_worker(DRY_ENGINE_LOG=str(engine_log), BLIP_SLOTS="128")  # so many are in the engine at once
    manifest = simple_job(tmp_path / "in", 400, prompt="order:slow")
    job = cluster.submit(manifest, tmp_path / "out", chunk_rows=200).id
    cluster.until(job, lambda _: cluster.ledger.in_flight(job)[0] >= 5)
    assert cluster.ledger.set_status(job, "cancelling")
    cluster.until(job, lambda state: state.status == "cancelled", 15)
    time.sleep(4)  # what was in the engine still runs
    rows = len(engine_log.read_text().splitlines())
    time.sleep(0.5)
    assert len(engine_log.read_text().splitlines()) == rows < 400
    after = cluster.submit(simple_job(tmp_path / "other", 5), tmp_path / "out2").id  # the worker is free again
    assert cluster.until_ended(after).status == "completed"
