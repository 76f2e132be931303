"""Whole jobs while something breaks: Redis, the store, workers, control loops."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import FAST
from faulty_proxy import FaultyProxy
from harness import advance, caption_spec, ended, rows_of, write_manifest
from mini_worker import MiniWorker
from servers import RedisServer, S3Server

from orchestrator.broker import QUEUE, make_celery, publish
from orchestrator.contract import Hint
from orchestrator.control import Controller
from orchestrator.errors import RedisUnavailable, StoreUnavailable
from orchestrator.jobs import submit
from orchestrator.ledger import StaleEpochError
from orchestrator.s3 import s3_client
from orchestrator.settings import Settings, load_settings
from orchestrator.storage import open_store
from orchestrator.verify import verify


def test_flushall_in_mid_job_is_rebuilt_from_storage(
    redis_server: RedisServer, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    job = submit(controller.ledger, caption_spec(write_manifest(tmp_path, 200), tmp_path / "out"), settings)
    worker = MiniWorker(settings)
    advance(controller, job, lambda state: state.chunks_done >= 5, worker)
    hint = worker.take()
    assert hint is not None
    lease = worker.start(hint)
    assert not isinstance(lease, str)
    redis_server.client().flushall()
    assert not controller.ledger.renew(lease, 1)  # its worker is told to stop
    state = advance(controller, job, ended, worker)
    assert (state.status, state.completed, state.chunks_done) == ("completed", 200, 20)
    assert rows_of(tmp_path / "out") == list(range(200))


def test_an_empty_redis_after_a_crash_is_waited_for_and_rebuilt(
    redis_server: RedisServer, settings: Settings, tmp_path: Path
) -> None:
    controller, stop = Controller(settings), threading.Event()
    thread = threading.Thread(target=controller.run, args=(stop,))
    thread.start()
    worker = MiniWorker(settings)
    job = submit(worker.ledger, caption_spec(write_manifest(tmp_path, 100), tmp_path / "out"), settings)
    try:
        while len(worker.outcomes) < 3:
            hint = worker.take()
            if hint:
                worker.work(hint)
        redis_server.kill()
        time.sleep(0.3)
        redis_server.start()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            hint = worker.take()
            if hint:
                worker.work(hint)
            state = worker.ledger.state(job)
            if state and state.ended:
                break
    finally:
        stop.set()
        thread.join()
    assert rows_of(tmp_path / "out") == list(range(100))
    assert verify(str(tmp_path / "out")).ok


def test_ten_thousand_duplicate_hints_change_nothing(
    redis_server: RedisServer, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    redis = redis_server.client()
    job = submit(controller.ledger, caption_spec(write_manifest(tmp_path, 20), tmp_path / "out"), settings)
    worker = MiniWorker(settings.model_copy(update={"lease_seconds": 60}))  # longer than 5,000 calls take anywhere
    advance(controller, job, lambda state: state.status == "in_progress")
    controller.step()
    hint = worker.take()
    assert hint is not None
    lease = worker.start(hint)
    assert not isinstance(lease, str)
    redis.config_resetstat()
    assert {controller.ledger.acquire(hint, name) for name in ("mini", "other") for _ in range(2500)} == {"busy"}
    assert worker.finish(hint)
    assert {controller.ledger.acquire(hint, "other") for _ in range(5000)} == {"done"}
    assert not controller.ledger.commit(hint, 10, 0)
    assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] <= 10_000 + 10  # cheap: one call each
    state = advance(controller, job, ended, worker)
    assert (state.completed, state.total) == (20, 20)


def test_a_dead_worker_s_chunk_is_handed_out_again(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    job = submit(controller.ledger, caption_spec(write_manifest(tmp_path, 30), tmp_path / "out"), settings)
    dead, alive = MiniWorker(settings, "dead"), MiniWorker(settings, "alive")
    advance(controller, job, lambda state: state.status == "in_progress")
    controller.step()
    popped, leased, put = dead.take(), dead.take(), dead.take()
    assert popped
    assert leased
    assert put
    assert not isinstance(dead.start(leased), str)  # died while it worked
    assert not isinstance(dead.start(put), str)  # died between PUT and commit
    commit, dead.ledger.commit = dead.ledger.commit, lambda *_: False  # type: ignore[method-assign]
    dead.finish(put)
    dead.ledger.commit = commit  # type: ignore[method-assign]
    state = advance(controller, job, ended, alive)
    assert (state.status, state.completed) == ("completed", 30)
    assert alive.outcomes == ["committed", "committed"]  # the third was found in storage, and not handed out again
    assert rows_of(tmp_path / "out") == list(range(30))


def test_hints_that_wait_in_a_long_queue_are_not_multiplied(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    job = submit(controller.ledger, caption_spec(write_manifest(tmp_path, 300), tmp_path / "out"), settings)
    controller.ledger.worker_seen("idle", {"slots": 30})
    advance(controller, job, lambda state: state.status == "in_progress")
    for _ in range(5):  # far beyond every deadline, with no worker
        controller.step()
        time.sleep(0.4)
    assert controller.ledger.queue_length() == 30
    worker = MiniWorker(settings)
    for _ in range(3):
        assert worker.take()  # lost: popped by a worker that died before it leased
    deadline = time.monotonic() + 5
    while controller.ledger.queue_length() < 30 and time.monotonic() < deadline:
        controller.step()
        time.sleep(0.05)
    assert controller.ledger.queue_length() == 30
    assert advance(controller, job, ended, worker).completed == 300


def test_two_control_loops_at_once(settings: Settings, tmp_path: Path) -> None:
    loops, stop = [Controller(settings) for _ in range(2)], threading.Event()
    threads = [threading.Thread(target=loop.run, args=(stop,)) for loop in loops]
    for thread in threads:
        thread.start()
    worker = MiniWorker(settings)
    job = submit(worker.ledger, caption_spec(write_manifest(tmp_path, 400), tmp_path / "out"), settings)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            hint = worker.take()
            if hint:
                worker.work(hint)
            state = worker.ledger.state(job)
            assert state is not None
            if state.ended:
                break
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert worker.outcomes.count("committed") == 40
    assert rows_of(tmp_path / "out") == list(range(400))
    assert verify(str(tmp_path / "out")).ok


def test_a_replaced_control_loop_cannot_write(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    job = submit(controller.ledger, caption_spec(write_manifest(tmp_path, 50), tmp_path / "out"), settings)
    advance(controller, job, lambda state: state.status == "in_progress")
    old = controller.ledger.lead(controller.owner, 0.2)
    assert old is not None
    other = Controller(settings)
    assert not other.step()  # the lead is held
    time.sleep(0.3)
    assert other.step()
    assert not controller.step()
    with pytest.raises(StaleEpochError):
        controller.ledger.feed(job, old, 64)
    with pytest.raises(StaleEpochError):
        controller.ledger.set_status(job, "failed", epoch=old)
    other.close()


def test_kill_9_of_the_control_loop_before_each_of_its_writes(
    redis_server: RedisServer, settings: Settings, tmp_path: Path
) -> None:
    times = {**FAST, "lead_seconds": 0.1}
    environment = {
        **os.environ, "BLIP_REDIS_URL": redis_server.url,
        **{f"BLIP_{name.upper()}": str(value) for name, value in times.items()},
    }  # fmt: skip
    here = Path(__file__).parent
    ledger = MiniWorker(settings).ledger
    spec = caption_spec(write_manifest(tmp_path, 900, lambda n: n == 5), tmp_path / "out", chunk_rows=5)
    job = submit(ledger, spec, settings)
    worker = subprocess.Popen([sys.executable, str(here / "mini_worker.py"), "w", "0.005"], env=environment)
    try:
        lives = subprocess.run(
            [sys.executable, str(here / "dying_loop.py"), job], env=environment, timeout=60, check=True,
            stdout=subprocess.PIPE,
        ).stdout  # fmt: skip
    finally:
        worker.kill()
        worker.wait()
    assert int(lives) > 12  # it died in planning, feeding and finalizing alike
    state = ledger.state(job)
    assert state is not None
    assert (state.status, state.completed, state.failed) == ("completed", 899, 1)
    assert rows_of(tmp_path / "out") == list(range(900))
    assert verify(str(tmp_path / "out")).ok


def test_the_store_is_down_for_a_while(
    s3_server: S3Server, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store("s3://blip/in").put("list.txt", b"".join(b"s3://blip/%d.jpg\n" % n for n in range(60)))
    proxy = FaultyProxy(s3_server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
    s3_client.cache_clear()
    settings = load_settings(**{**FAST, "storage_retry_seconds": 0.5})
    controller, worker = Controller(settings), MiniWorker(settings)
    try:
        job = submit(controller.ledger, caption_spec("s3://blip/in/list.txt", "s3://blip/out"), settings)
        advance(controller, job, lambda state: state.chunks_done == 2, worker)
        lost = worker.take()
        assert lost is not None
        assert not isinstance(worker.start(lost), str)
        proxy.always = 503
        with pytest.raises(StoreUnavailable):
            worker.finish(lost)
        deadline = time.monotonic() + 3  # longer than the lease: the control loop has to look for the part
        while time.monotonic() < deadline:
            controller.step()
        state = controller.ledger.state(job)
        assert state is not None
        assert (state.status, state.chunks_done) == ("in_progress", 2)
        controller.close()
        controller = Controller(settings)  # one that starts in the middle of the outage
        deadline = time.monotonic() + 2.5
        while time.monotonic() < deadline:
            controller.step()
        assert controller.ledger.state(job) == state
        proxy.always = "pass"
        state = advance(controller, job, ended, worker)
        assert (state.status, state.completed) == ("completed", 60)
        assert rows_of("s3://blip/out") == list(range(60))
    finally:
        controller.close()
        proxy.close()


def test_hints_are_small_json_on_the_queue_and_an_outage_is_one_error(
    redis_server: RedisServer, settings: Settings
) -> None:
    app, hint = make_celery(settings), Hint("job-" + "a" * 20, 1, "b" * 32, 0, 900, 0, 9)
    assert publish(app, [hint, hint]) == 2
    client = redis_server.client()
    (message, _) = client.lrange(QUEUE, 0, -1)
    client.close()
    assert len(message) < 2048
    assert json.loads(message)["content-type"] == "application/json"
    assert MiniWorker(settings).take() == hint
    redis_server.kill()
    with pytest.raises(RedisUnavailable, match="BLIP_REDIS_URL"):
        publish(app, [hint])
    redis_server.start()
    assert publish(app, [hint]) == 1
    assert MiniWorker(settings).take() == hint
    app.close()


def test_a_manifest_overwritten_in_mid_job_fails_clearly(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path, 50)
    job = submit(controller.ledger, caption_spec(manifest, tmp_path / "out"), settings)
    worker = MiniWorker(settings)
    advance(controller, job, lambda state: state.chunks_done >= 2, worker)
    write_manifest(tmp_path, 60)
    hint = worker.take()
    assert hint is not None
    worker.work(hint)
    state = advance(controller, job, ended, worker)
    assert state.error is not None
    assert state.error["code"] == "manifest_changed"
    assert str(manifest) in state.error["message"]


def test_an_overwritten_manifest_is_noticed_by_the_control_loop_too(
    s3_server: S3Server, settings: Settings, controller: Controller
) -> None:
    store = open_store("s3://blip/in")
    store.put("list.txt", b"s3://blip/1.jpg\n" * 50)
    job = submit(controller.ledger, caption_spec("s3://blip/in/list.txt", "s3://blip/out"), settings)
    advance(controller, job, lambda state: state.status == "in_progress")
    store.put("list.txt", b"s3://blip/2.jpg\n" * 50)
    state = advance(controller, job, ended)
    assert state.error is not None
    assert state.error["code"] == "manifest_changed"


def test_a_paused_job_that_redis_lost_stays_paused(
    redis_server: RedisServer, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    job = submit(controller.ledger, caption_spec(write_manifest(tmp_path, 60), tmp_path / "out"), settings)
    worker = MiniWorker(settings)
    advance(controller, job, lambda state: state.chunks_done == 2, worker)
    controller.ledger.set_status(job, "paused")
    controller.step()
    redis_server.client().flushall()
    state = advance(controller, job, lambda state: state.status == "paused")
    assert (state.chunks, state.chunks_done) == (6, 2)
    for _ in range(5):  # hints that were out meanwhile are dropped
        controller.step()
        if hint := worker.take():
            worker.work(hint)
    assert controller.ledger.state(job) == state
    assert controller.ledger.set_status(job, "in_progress")
    assert advance(controller, job, ended, worker).status == "completed"
    assert rows_of(tmp_path / "out") == list(range(60))


def test_a_job_that_raced_for_another_ones_output_fails(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    """Both looked before either had written job.json; the one that wrote it first keeps the output."""
    manifest = write_manifest(tmp_path, 20)
    first = caption_spec(manifest, tmp_path / "out")
    other = caption_spec(manifest, tmp_path / "out", options={"num_beams": 1})
    advance(controller, submit(controller.ledger, first, settings), ended, MiniWorker(settings))
    assert controller.ledger.create_job(other)
    state = advance(controller, other.id, ended)
    assert state.error is not None
    assert state.error["code"] == "output_taken"
    assert "holds a job with options" in state.error["message"]
    assert rows_of(tmp_path / "out") == list(range(20))


def test_a_part_that_vanished_is_computed_again(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    job = submit(controller.ledger, caption_spec(write_manifest(tmp_path, 40), tmp_path / "out"), settings)
    worker = MiniWorker(settings)
    advance(controller, job, lambda state: state.chunks_done == 3, worker)
    next((tmp_path / "out/results").glob("part-*.jsonl")).unlink()
    state = advance(controller, job, ended, worker)
    assert (state.status, state.completed) == ("completed", 40)
    assert rows_of(tmp_path / "out") == list(range(40))


def test_a_hint_of_another_plan_or_job_is_gone(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    job = submit(controller.ledger, caption_spec(write_manifest(tmp_path, 20), tmp_path / "out"), settings)
    state = advance(controller, job, lambda state: state.status == "in_progress")
    assert state.plan is not None
    for hint in (Hint(job, 0, "other", 0, 9, 0, 9), Hint("unknown", 0, state.plan, 0, 9, 0, 9)):
        assert controller.ledger.acquire(hint, "w") == "gone"
        assert not controller.ledger.commit(hint, 9, 0)
