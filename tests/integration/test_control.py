"""Whole jobs without a model: real Redis, real storage, a real queue, and the faults that the control loop survives."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from mini_worker import MiniWorker
from servers import RedisServer, S3Server

from orchestrator.broker import QUEUE, make_celery, publish
from orchestrator.contract import Hint, JobSpec, JobState
from orchestrator.control import Controller
from orchestrator.errors import RedisUnavailable, StoreUnavailable, UsageError
from orchestrator.jobs import make_spec, submit
from orchestrator.ledger import StaleEpochError
from orchestrator.s3 import s3_client
from orchestrator.settings import Settings, load_settings
from orchestrator.storage import open_store
from orchestrator.verify import verify

FAST = {
    "lease_seconds": 1.0, "renew_seconds": 0.3, "reconcile_seconds": 0.1, "poll_seconds": 0.02, "lead_seconds": 1.0,
    "storage_retry_seconds": 2.0,
}  # fmt: skip


@pytest.fixture
def settings(redis_server: RedisServer) -> Settings:
    return load_settings(**FAST)


@pytest.fixture
def controller(settings: Settings) -> Iterator[Controller]:
    controller = Controller(settings)
    yield controller
    controller.close()


def write_manifest(folder: Path, rows: int, bad: Callable[[int], bool] = lambda _: False) -> Path:
    manifest = folder / "rows.jsonl"
    lines = [json.dumps({"image": f"{'bad' if bad(n) else 'img'}-{n}.png", "id": f"r{n}"}) for n in range(rows)]
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def caption_spec(manifest: object, output: object, **more: object) -> JobSpec:
    return make_spec(str(manifest), "caption", str(output), model="demo", **{"chunk_rows": 10, **more})  # type: ignore[arg-type]


def advance(
    controller: Controller, job: str, until: Callable[[JobState], bool], worker: MiniWorker | None = None,
    seconds: float = 20,
) -> JobState:  # fmt: skip
    """Steps, and works one hint a step, until the job is as wanted."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        controller.step()
        state = controller.ledger.state(job)
        if state is not None and until(state):
            return state
        hint = worker.take() if worker else None
        if worker and hint:
            worker.work(hint)
        time.sleep(0.005)
    raise AssertionError(f"still {controller.ledger.state(job)}")


def ended(state: JobState) -> bool:
    return state.ended


def rows_of(output: object) -> list[int]:
    """All row numbers of all parts, as a reader of the results finds them."""
    store = open_store(str(output))
    return [
        json.loads(line)["row"] for info in store.list("results/part-") for line in store.get(info.key).splitlines()
    ]


def test_a_job_from_manifest_to_summary(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spec = caption_spec(write_manifest(tmp_path, 95, lambda n: n % 10 == 3), out)
    job = submit(controller.ledger, spec, settings)
    state = advance(controller, job, ended, MiniWorker(settings))
    assert (state.status, state.total, state.completed, state.failed, state.chunks) == ("completed", 95, 85, 10, 10)
    assert rows_of(out) == list(range(95))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["request_counts"] == {"total": 95, "completed": 85, "failed": 10}
    assert summary["errors"] == {"image_not_found": 10}
    assert [part["rows"] for part in summary["parts"]] == [10] * 9 + [5]
    assert summary["started_at"] <= summary["finished_at"]
    assert summary["images_per_second"] > 0
    assert summary["model"]["weights_sha256"] == "f" * 64
    record = json.loads((out / "job.json").read_text())
    assert record["model"]["weights_sha256"] == "f" * 64
    assert record["manifest"]["rows"] == 95
    audit = verify(str(out))
    assert audit.ok, audit.problems


def test_failed_rows_are_a_manifest_again(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"image": "bad-1.png", "id": 7, "prompt": "a photo of", "source": {"x": 1}}\nnot json\n{"image": "img.png"}\n'
    )
    job = submit(controller.ledger, caption_spec(tmp_path / "rows.jsonl", tmp_path / "out"), settings)
    advance(controller, job, ended, MiniWorker(settings))
    failures = [json.loads(line) for line in (tmp_path / "out/errors.jsonl").read_text().splitlines()]
    assert failures[0] == {
        "image": "bad-1.png", "id": 7, "prompt": "a photo of", "source": {"x": 1},
        "error": {"code": "image_not_found", "message": "bad-1.png does not exist"},
    }  # fmt: skip
    assert failures[1]["error"]["code"] == "row_invalid"
    assert failures[1]["line"] == "not json"
    again = submit(controller.ledger, caption_spec(tmp_path / "out/errors.jsonl", tmp_path / "again"), settings)
    advance(controller, again, ended, MiniWorker(settings))
    first = json.loads((tmp_path / "again/results/part-00000000.jsonl").read_text().splitlines()[0])
    assert (first["image"], first["id"], first["input"]["prompt"]) == ("bad-1.png", 7, "a photo of")


def test_a_job_on_s3(s3_server: S3Server, settings: Settings, controller: Controller) -> None:
    open_store("s3://blip/in").put("list.txt", b"".join(b"s3://blip/photos/%d.jpg\n" % n for n in range(35)))
    job = submit(controller.ledger, caption_spec("s3://blip/in/list.txt", "s3://blip/out"), settings)
    state = advance(controller, job, ended, MiniWorker(settings))
    assert (state.status, state.completed) == ("completed", 35)
    assert rows_of("s3://blip/out") == list(range(35))
    part = open_store("s3://blip/out").head("results/part-00000003.jsonl")
    assert part is not None
    assert part.metadata["rows"] == "5"
    assert part.metadata["plan"] == state.plan
    assert verify("s3://blip/out").ok


def test_a_folder_of_images(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    for name in ("b.JPG", "a/z.png", "a/y.webp", "notes.txt", ".hidden.png"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / name).write_bytes(b"x")
    job = submit(controller.ledger, caption_spec(tmp_path / "pictures", tmp_path / "out"), settings)
    assert advance(controller, job, ended, MiniWorker(settings)).status == "completed"
    text = (tmp_path / "out/results/part-00000000.jsonl").read_text()
    assert [json.loads(line)["image"] for line in text.splitlines()] == ["a/y.webp", "a/z.png", "b.JPG"]


def test_all_rows_failed_is_failed(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    spec = caption_spec(write_manifest(tmp_path, 12, lambda _: True), tmp_path / "out")
    state = advance(controller, submit(controller.ledger, spec, settings), ended, MiniWorker(settings))
    assert state.status == "failed"
    assert state.error is not None
    assert state.error["code"] == "all_rows_failed"
    assert "image_not_found: 12" in state.error["message"]
    assert len((tmp_path / "out/errors.jsonl").read_text().splitlines()) == 12


def test_too_many_errors_stop_a_job_after_a_thousand_rows(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path, 3000, lambda n: n % 4 != 0)
    spec = caption_spec(manifest, tmp_path / "out", chunk_rows=100)
    state = advance(controller, submit(controller.ledger, spec, settings), ended, MiniWorker(settings))
    assert state.status == "failed"
    assert state.error is not None
    assert state.error["code"] == "too_many_errors"
    assert 1000 <= state.completed + state.failed < 3000
    # The same work with a higher limit goes on from what there is.
    spec = caption_spec(manifest, tmp_path / "out", chunk_rows=100, max_error_ratio=0.8)
    state = advance(controller, submit(controller.ledger, spec, settings), ended, MiniWorker(settings))
    assert (state.status, state.failed) == ("completed", 2250)
    assert verify(str(tmp_path / "out")).ok


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"", "manifest_invalid", "is empty"),
        (b"\n \r\n\n", "manifest_invalid", "is empty"),
        (b"\x1f\x8bxx", "manifest_invalid", "gzip"),
        (b'[{"image": "x"}]', "manifest_invalid", "one object a line"),
        (b"PAR1" + bytes(40), "manifest_invalid", "Parquet"),
    ],
)
def test_a_bad_manifest_fails_at_once(
    settings: Settings, controller: Controller, tmp_path: Path, content: bytes, code: str, says: str
) -> None:
    (tmp_path / "m").write_bytes(content)
    job = submit(controller.ledger, caption_spec(tmp_path / "m", tmp_path / "out"), settings)
    state = advance(controller, job, ended)
    assert state.error is not None
    assert state.error["code"] == code
    assert says in state.error["message"]
    assert str(tmp_path / "m") in state.error["message"]


def test_an_output_that_cannot_be_written(
    s3_server: S3Server, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path, 3)
    for output, code in (("s3://absent/out", "storage_failed"), ("/proc/blip-out", "storage_failed")):
        state = advance(controller, submit(controller.ledger, caption_spec(manifest, output), settings), ended)
        assert state.error is not None
        assert state.error["code"] == code
        assert output in state.error["message"]


def test_the_same_command_goes_on_and_another_is_refused(
    redis_server: RedisServer, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    manifest, out = write_manifest(tmp_path, 100), tmp_path / "out"
    spec, worker = caption_spec(manifest, out), MiniWorker(settings)
    job = submit(controller.ledger, spec, settings)
    advance(controller, job, lambda state: state.chunks_done >= 4, worker)
    redis_server.client().flushall()  # as if everything but the output were gone
    fresh = Controller(settings)
    with pytest.raises(UsageError, match="chunk_rows=10, not 20"):
        submit(fresh.ledger, caption_spec(manifest, out, chunk_rows=20), settings)
    assert submit(fresh.ledger, caption_spec(manifest, out), settings) == job
    state = advance(fresh, job, lambda state: state.status == "in_progress")
    assert state.completed >= 40
    assert state.restored == state.completed
    state = advance(fresh, job, ended, worker)
    assert (state.status, state.completed) == ("completed", 100)
    assert rows_of(out) == list(range(100))
    fresh.close()


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
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    job = submit(controller.ledger, caption_spec(write_manifest(tmp_path, 20), tmp_path / "out"), settings)
    worker = MiniWorker(settings)
    advance(controller, job, lambda state: state.status == "in_progress")
    controller.step()
    hint = worker.take()
    assert hint is not None
    lease = worker.start(hint)
    assert not isinstance(lease, str)
    began = time.monotonic()
    assert {controller.ledger.acquire(hint, name) for name in ("mini", "other") for _ in range(2500)} == {"busy"}
    assert worker.finish(hint)
    assert {controller.ledger.acquire(hint, "other") for _ in range(5000)} == {"done"}
    assert not controller.ledger.commit(hint, 10, 0)
    assert time.monotonic() - began < 15
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
        proxy.always = "pass"
        state = advance(controller, job, ended, worker)
        assert (state.status, state.completed) == ("completed", 60)
        assert rows_of("s3://blip/out") == list(range(60))
    finally:
        controller.close()
        proxy.close()


def test_a_prefix_on_s3(s3_server: S3Server, settings: Settings, controller: Controller) -> None:
    for key in ("photos/b.jpg", "photos/a/1.PNG", "photos/readme.md", "other/c.jpg"):
        open_store("s3://blip").put(key, b"x")
    job = submit(controller.ledger, caption_spec("s3://blip/photos/", "s3://blip/out"), settings)
    assert advance(controller, job, ended, MiniWorker(settings)).status == "completed"
    text = open_store("s3://blip/out").get("results/part-00000000.jsonl")
    assert [json.loads(line)["image"] for line in text.splitlines()] == [
        "s3://blip/photos/a/1.PNG", "s3://blip/photos/b.jpg",
    ]  # fmt: skip


def test_a_cancelled_job_ends_when_its_workers_let_go(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    spec = caption_spec(write_manifest(tmp_path, 100), tmp_path / "out")
    job, worker = submit(controller.ledger, spec, settings), MiniWorker(settings)
    advance(controller, job, lambda state: state.chunks_done == 3, worker)
    hint = worker.take()
    assert hint is not None
    lease = worker.start(hint)
    assert not isinstance(lease, str)
    assert controller.ledger.set_status(job, "cancelling")
    controller.step()
    assert controller.ledger.state(job).status == "cancelling"  # type: ignore[union-attr]
    assert not controller.ledger.renew(lease, 1)
    worker.finish(hint)  # what is finished is kept
    state = advance(controller, job, ended)
    assert (state.status, state.completed) == ("cancelled", 40)
    # The same command again goes on from there.
    assert submit(controller.ledger, spec, settings) == job
    assert advance(controller, job, ended, worker).status == "completed"
    assert rows_of(tmp_path / "out") == list(range(100))


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


def test_a_part_that_vanished_is_computed_again(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    job = submit(controller.ledger, caption_spec(write_manifest(tmp_path, 40), tmp_path / "out"), settings)
    worker = MiniWorker(settings)
    advance(controller, job, lambda state: state.chunks_done == 3, worker)
    next((tmp_path / "out/results").glob("part-*.jsonl")).unlink()
    state = advance(controller, job, ended, worker)
    assert (state.status, state.completed) == ("completed", 40)
    assert rows_of(tmp_path / "out") == list(range(40))


def test_a_finished_job_stays_as_it_is(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    spec = caption_spec(write_manifest(tmp_path, 15), tmp_path / "out")
    worker = MiniWorker(settings)
    advance(controller, submit(controller.ledger, spec, settings), ended, worker)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    controller.ledger._redis.flushall()
    state = advance(controller, submit(controller.ledger, spec, settings), ended, worker)
    assert state.status == "completed"
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_a_hint_of_another_plan_or_job_is_gone(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    job = submit(controller.ledger, caption_spec(write_manifest(tmp_path, 20), tmp_path / "out"), settings)
    state = advance(controller, job, lambda state: state.status == "in_progress")
    assert state.plan is not None
    for hint in (Hint(job, 0, "other", 0, 9, 0, 9), Hint("unknown", 0, state.plan, 0, 9, 0, 9)):
        assert controller.ledger.acquire(hint, "w") == "gone"
        assert not controller.ledger.commit(hint, 9, 0)
