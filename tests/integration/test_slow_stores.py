"""Control loops whose stores take longer than a loop may keep silent: the lead stays, and other jobs go on."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import FAST
from faulty_proxy import FaultyProxy
from harness import advance, caption_spec, rows_of, write_manifest
from mini_worker import MiniWorker
from servers import RedisServer, S3Server

from orchestrator.broker import QUEUE
from orchestrator.control import Controller
from orchestrator.jobs import submit
from orchestrator.s3 import s3_client
from orchestrator.settings import Settings, load_settings
from orchestrator.storage import open_store
from orchestrator.work import Work

LEAD = 0.5


@pytest.fixture
def proxy(s3_server: S3Server, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """In front of a store with a manifest of 60 rows."""
    open_store("s3://blip/in").put("list.txt", b"".join(b"s3://blip/%d.jpg\n" % n for n in range(60)))
    proxy = FaultyProxy(s3_server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
    s3_client.cache_clear()
    yield proxy
    proxy.close()


@contextmanager
def two_loops(settings: Settings) -> Iterator[None]:
    stop = threading.Event()
    threads = [threading.Thread(target=Controller(settings).run, args=(stop,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_many_lost_chunks_in_a_slow_store(proxy: FaultyProxy, redis_server: RedisServer) -> None:
    settings = load_settings(**{**FAST, "lead_seconds": LEAD, "lease_seconds": 2.0})
    controller = Controller(settings)
    ledger = MiniWorker(settings).ledger
    job = submit(ledger, caption_spec("s3://blip/in/list.txt", "s3://blip/out", chunk_rows=1), settings)
    ledger.worker_seen("w", {"slots": 60})
    advance(controller, job, lambda _: ledger.in_flight(job)[2] == 60)
    controller.close()
    redis_server.client().delete(QUEUE)  # every hint is lost
    until(lambda: len(ledger.due(job)) == 60)
    proxy.seconds["HEAD"] = 4 * LEAD / 16  # more than the lead for all of them, however many are asked for at once
    with two_loops(settings):
        until(lambda: ledger.totals().get("requeued", 0) >= 60, 20)


def test_a_job_whose_store_hangs_holds_up_no_other(
    proxy: FaultyProxy, redis_server: RedisServer, tmp_path: Path
) -> None:
    settings = load_settings(**{**FAST, "lead_seconds": LEAD, "storage_retry_seconds": 9.0})
    controller, worker = Controller(settings), MiniWorker(settings)
    stuck = submit(worker.ledger, caption_spec("s3://blip/in/list.txt", "s3://blip/out"), settings)
    advance(controller, stuck, lambda state: state.status == "in_progress")
    controller.close()
    proxy.always = "hang"
    job = submit(worker.ledger, caption_spec(write_manifest(tmp_path, 40), tmp_path / "out"), settings)
    with two_loops(settings):

        def works() -> bool:
            hint = worker.take()
            if hint is not None and hint.job == job:
                worker.work(hint)
            state = worker.ledger.state(job)
            return state is not None and state.ended

        until(works)
        proxy.always = "pass"
        proxy.released.set()
    assert rows_of(tmp_path / "out") == list(range(40))
    state = worker.ledger.state(stuck)
    assert state is not None
    assert state.status == "in_progress"  # it waits for its store


def test_work_goes_on_before_all_parts_of_a_lost_job_were_asked(
    proxy: FaultyProxy, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing tells what is done; which of its rows failed is asked for meanwhile, by whichever loop leads."""
    monkeypatch.setattr("orchestrator.work._FEW", 5)
    monkeypatch.setattr("orchestrator.work._BATCH", 10)
    settings = load_settings(**{**FAST, "storage_retry_seconds": 30.0})
    spec = caption_spec(write_manifest(tmp_path, 60, lambda n: n % 2 == 1), "s3://blip/out", chunk_rows=1)
    first, worker = Controller(settings), MiniWorker(settings)
    job, ledger = submit(worker.ledger, spec, settings), worker.ledger
    advance(first, job, lambda state: state.chunks_done == 40, worker)
    while worker.take():
        pass
    redis_server.client().flushall()
    ledger.worker_seen("w", {"slots": 60})
    proxy.seconds["HEAD"] = 1.0  # a second for ten parts
    state = advance(first, job, lambda _: ledger.in_flight(job)[2] == 20)
    assert (state.chunks_done, state.completed, state.failed) == (40, 40, 0)
    state = advance(first, job, lambda state: state.failed > 0)
    first.close()
    assert len(ledger.uncounted(job, 40)) >= 10
    proxy.seconds.clear()
    second = Controller(settings)
    state = advance(second, job, lambda state: state.ended, worker)
    second.close()
    assert (state.status, state.completed, state.failed, state.restored) == ("completed", 30, 30, 40)
    assert ledger.error_codes(job) == {"image_not_found": 30}
    assert rows_of("s3://blip/out") == list(range(60))


def test_a_part_that_vanished_before_it_was_asked_is_done_again(
    s3_server: S3Server, redis_server: RedisServer, settings: Settings, controller: Controller, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("orchestrator.work._FEW", 5)
    spec = caption_spec(write_manifest(tmp_path, 40), "s3://blip/out", chunk_rows=1)
    worker = MiniWorker(settings)
    job = submit(worker.ledger, spec, settings)
    advance(controller, job, lambda state: state.chunks_done == 30, worker)
    redis_server.client().flushall()
    with monkeypatch.context() as patch:
        patch.setattr(Work, "count", lambda *_: None)  # it does not come to it
        advance(controller, job, lambda state: state.status == "in_progress" and state.chunks_done == 30)
    s3_client(5.0).delete_object(Bucket="blip", Key="out/results/part-00000007.jsonl")
    state = advance(controller, job, lambda state: state.ended, worker)
    assert (state.status, state.completed) == ("completed", 40)
    assert rows_of("s3://blip/out") == list(range(40))
