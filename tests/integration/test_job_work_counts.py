"""What a job costs its servers, counted and not timed: requests to S3, calls of Redis, bytes in Redis."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from harness import advance, caption_spec, ended, write_manifest
from mini_worker import MiniWorker
from servers import MotoServer, RedisServer

from orchestrator import lifecycle
from orchestrator.contract import Hint
from orchestrator.control import Controller
from orchestrator.jobs import submit
from orchestrator.manifest.chunking import AHEAD, BLOCK, scan
from orchestrator.plan import PAGE_CHUNKS, load_plan
from orchestrator.s3 import s3_client
from orchestrator.scheduling import LEAST_IN_FLIGHT
from orchestrator.settings import Settings
from orchestrator.storage import open_store
from orchestrator.verify import verify


@pytest.fixture
def proxy(s3_server: MotoServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Before S3, with nothing up its sleeve: it counts."""
    proxy = FaultyProxy(s3_server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
    s3_client.cache_clear()
    yield proxy
    proxy.close()


def put_list(rows: int) -> None:
    names = "".join(f"s3://blip/{'bad' if n % 10 == 3 else 'img'}-{n}.png\n" for n in range(rows))
    open_store("s3://blip/in").put("list.txt", names.encode())


def requests(proxy: FaultyProxy) -> Counter[str]:
    """By method and kind of object, since the last time."""

    def kind(path: str) -> str:
        name = path.removeprefix("/blip/out/")
        return "list" if path == "/blip" else (name.partition("/")[0] if path != name else "manifest")

    found = Counter(f"{method} {kind(path)}" for method, path in proxy.requests)
    proxy.requests.clear()
    return found


def test_requests_to_s3_of_a_job(proxy: FaultyProxy, settings: Settings, controller: Controller) -> None:
    put_list(200)
    spec = caption_spec("s3://blip/in/list.txt", "s3://blip/out")
    worker = MiniWorker(settings)
    job = submit(controller.ledger, spec, settings)
    advance(controller, job, lambda state: state.status == "in_progress")
    requests(proxy)
    chunks = 20
    advance(controller, job, lambda state: state.chunks_done == chunks, worker)
    working = requests(proxy)
    assert working["HEAD results"] == working["PUT results"] == chunks  # is it there? and then: there it is
    assert working["GET results"] == 0
    assert working["GET manifest"] == chunks  # one range for each chunk
    advance(controller, job, ended, worker)
    finalizing = requests(proxy)
    assert finalizing["GET results"] == chunks  # each part is read once
    assert finalizing["PUT results"] == finalizing["HEAD results"] == 0
    assert finalizing["list"] <= 2
    assert verify("s3://blip/out", settings).ok
    assert requests(proxy)["GET results"] == chunks
    lifecycle.retry(controller.ledger, settings, job)
    asked = requests(proxy)
    assert asked["HEAD results"] == asked["GET results"] == 0  # the summary tells which rows failed
    assert asked["list"] <= 2


def test_retry_of_a_job_without_summary_asks_each_part(
    proxy: FaultyProxy, settings: Settings, controller: Controller
) -> None:
    put_list(50)
    spec = caption_spec("s3://blip/in/list.txt", "s3://blip/out")
    worker = MiniWorker(settings)
    job = submit(controller.ledger, spec, settings)
    advance(controller, job, lambda state: state.chunks_done == 3, worker)
    lifecycle.cancel(controller.ledger, job)
    advance(controller, job, ended)
    requests(proxy)
    begun = lifecycle.retry(controller.ledger, settings, job)
    assert begun.rows == 3 + 20  # those that failed, and the two chunks that were not done
    assert requests(proxy)["HEAD results"] == 3
    state = advance(controller, job, ended, worker)
    assert (state.status, state.completed, state.failed) == ("completed", 45, 5)
    assert verify("s3://blip/out", settings).ok


def test_a_plan_reads_the_manifest_once(proxy: FaultyProxy, settings: Settings, controller: Controller) -> None:
    row = b"s3://blip/img.png                                                                \n"
    size = 3 * BLOCK
    open_store("s3://blip/in").put("list.txt", row * (size // len(row)))
    requests(proxy)
    spec = caption_spec("s3://blip/in/list.txt", "s3://blip/out", chunk_rows=None)
    job = submit(controller.ledger, spec, settings)
    advance(controller, job, lambda state: state.status == "in_progress")
    found = requests(proxy)
    assert found["GET manifest"] <= 3 + 4  # its blocks; its beginning, to know the format and the length of rows
    plan = load_plan(open_store("s3://blip/out"), settings)
    assert plan is not None
    assert found["PUT plan"] == 2 + 2  # the plan and one page of its chunks; the probe of the store
    assert plan.chunks <= PAGE_CHUNKS


def test_a_scan_holds_few_blocks() -> None:
    """Blocks that were asked for and not yet counted, whatever the size of the manifest."""
    row, asked, seen = b"x" * 99 + b"\n", [], 0

    def read(start: int, end: int) -> bytes:
        asked.append(end)
        return row * ((end - start) // len(row) + 1)

    size = 40 * BLOCK
    for chunk in scan(lambda start, end: read(start, end)[: end - start], size, 4096):
        seen = chunk.end
        assert max(asked) <= seen + (AHEAD + 2) * BLOCK
    assert len(asked) == 40


def redis_calls(server: RedisServer) -> Counter[str]:
    """Calls by command since the last time; scripts count as one, and what they call as well."""
    client = server.client()
    found = Counter({name[8:]: int(stat["calls"]) for name, stat in client.info("commandstats").items()})
    client.config_resetstat()
    client.close()
    return found


def test_calls_of_redis_for_a_chunk(
    redis_server: RedisServer, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    """Of a worker, from lease to commit, and of the control loop, whose steps do not grow with the chunks."""
    job = submit(controller.ledger, caption_spec(write_manifest(tmp_path, 3000), tmp_path / "out"), settings)
    state = advance(controller, job, lambda state: state.status == "in_progress")
    plan = load_plan(open_store(str(tmp_path / "out")), settings)
    assert plan is not None
    assert state.chunks == 300
    ledger = controller.ledger
    ledger.worker_seen("w", {"slots": 100})
    redis_calls(redis_server)
    for number in range(100):
        hint = Hint.of(job, plan.hash, plan.chunk(number))
        lease = ledger.acquire(hint, "w")
        assert not isinstance(lease, str)
        assert ledger.renew(lease, 5)
        assert ledger.commit(lease, 10, 0)
    found = redis_calls(redis_server)
    assert 300 <= found["evalsha"] <= 303  # acquire, renew, commit; Redis may have to be told them first
    assert sum(found.values()) <= 100 * 45  # what the scripts do inside counts too

    def steps(count: int) -> int:
        redis_calls(redis_server)
        for _ in range(count):
            controller.step()
        calls = redis_calls(redis_server)
        return sum(calls[name] for name in ("evalsha", "hgetall", "hget", "smembers", "info", "llen", "hmget"))

    controller.step()  # fills what may be in flight
    few = steps(20)
    for number in range(100, 250):
        ledger.commit(Hint.of(job, plan.hash, plan.chunk(number)), 10, 0)
    controller.step()
    assert steps(20) <= few + 20


def test_redis_holds_little_of_a_huge_job(
    redis_server: RedisServer, settings: Settings, controller: Controller
) -> None:
    """A hundred million rows in chunks of automatic size, as many leased as may be, every other chunk done."""
    chunks, ledger, client = 195_313, controller.ledger, redis_server.client()
    before = client.info("memory")["used_memory"]
    spec = caption_spec("s3://blip/in/list.txt", "s3://blip/out", chunk_rows=512)
    ledger.create_job(spec)
    epoch = ledger.lead("test", 60)
    assert epoch is not None
    ledger.reset(spec.id, epoch, "p" * 32, chunks, 100_000_000)
    ledger.set_status(spec.id, "in_progress", epoch=epoch)
    ledger.mark(spec.id, epoch, "p" * 32, [(chunk, 500, 12, "crashed=12") for chunk in range(0, 4096, 2)])
    ledger.mark(spec.id, epoch, "p" * 32, [(chunks - 1, 512, 0, "")])
    fed = [chunk for _ in range(2) for chunk in ledger.feed(spec.id, epoch, 4096)]  # some at a time
    assert len(fed) == 4096
    for chunk in fed:
        hint = Hint(spec.id, chunk, "p" * 32, chunk * 51_200, chunk * 51_200 + 51_200, chunk * 512, 512)
        assert not isinstance(ledger.acquire(hint, "worker-of-a-host-with-a-long-name-12345-abcdef01"), str)
    held = client.info("memory")["used_memory"] - before
    client.close()
    assert held <= 2_500_000, held


def test_chunks_of_a_huge_job_that_a_small_one_waits_for(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    """Fairness in chunks: those that were handed out already, and then at most one for each of its own."""
    worker, worked = MiniWorker(settings), list[str]()

    def work(job: str, until: str) -> int:
        """Steps, a hint after each, until the job's state; how many hints of others were done."""
        before = len(worked)
        for _ in range(400):
            controller.step()
            state = controller.ledger.state(job)
            if state is not None and (state.ended or state.status == until or str(state.chunks_done) == until):
                return sum(done != job for done in worked[before:])
            if hint := worker.take():
                worker.work(hint)
                worked.append(hint.job)
            else:
                time.sleep(0.01)  # planning takes a moment
        raise AssertionError(f"{state}, {Counter(worked)}")

    for name, rows in ("huge", 20_000), ("small", 40):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, rows)
    huge = submit(controller.ledger, caption_spec(tmp_path / "huge/rows.jsonl", tmp_path / "a"), settings)
    work(huge, "10")
    small = submit(controller.ledger, caption_spec(tmp_path / "small/rows.jsonl", tmp_path / "b"), settings)
    while controller.ledger.state(small).status == "validating":  # type: ignore[union-attr]
        controller.step()
        time.sleep(0.01)
    assert work(small, "completed") <= LEAST_IN_FLIGHT + 4
