"""Jobs that are paused, resumed, cancelled and retried: real Redis, real storage, a real queue, no model."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from harness import advance, caption_spec, ended, write_manifest
from mini_worker import MiniWorker
from servers import RedisServer, S3Server

from orchestrator import lifecycle
from orchestrator.contract import JobSpec, JobState
from orchestrator.control import Controller
from orchestrator.errors import JobError, UsageError
from orchestrator.jobs import submit
from orchestrator.plan import Plan, load_plan
from orchestrator.rounds import latest_records, load_rounds
from orchestrator.settings import Settings, load_settings
from orchestrator.storage import open_store
from orchestrator.verify import verify


def plan_of(output: object) -> Plan:
    plan = load_plan(open_store(str(output)), load_settings())
    assert plan is not None
    return plan


def outcomes(output: object) -> dict[int, str]:
    """Row -> "ok" or its error code, in the merged view; fails when a row is there twice or out of order."""
    found = [(record["row"], (record["error"] or {"code": "ok"})["code"]) for record in latest_records(plan_of(output))]
    assert [row for row, _ in found] == list(range(len(found)))
    return dict(found)


def mend(folder: Path, *rows: int) -> None:
    for row in rows:
        (folder / f"mended-bad-{row}.png").touch()


def in_round(state: JobState, number: int) -> bool:
    return (state.status, state.round) == ("in_progress", number)


def finished(settings: Settings, controller: Controller, folder: Path, rows: int = 95) -> tuple[JobSpec, MiniWorker]:
    """A job of chunks of 10, every tenth row failed."""
    spec = caption_spec(write_manifest(folder, rows, lambda n: n % 10 == 3), folder / "out")
    worker = MiniWorker(settings)
    state = advance(controller, submit(controller.ledger, spec, settings), ended, worker)
    assert state.status == "completed"
    return spec, worker


def test_retry_does_only_the_failed_rows_and_merges(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    spec, worker = finished(settings, controller, tmp_path)
    first = {path: path.read_bytes() for path in (tmp_path / "out/results").iterdir()}
    mend(tmp_path, 3, 23, 43, 63)
    worker.worked.clear()
    begun = lifecycle.retry(controller.ledger, settings, spec.id)
    assert (begun.round, begun.rows) == (1, 10)
    state = advance(controller, spec.id, ended, worker)
    assert sorted(worker.worked) == list(range(3, 95, 10))  # these rows, once, and no other
    assert (state.status, state.total, state.completed, state.failed, state.round) == ("completed", 95, 89, 6, 1)
    assert {path: path.read_bytes() for path in (tmp_path / "out/results").iterdir()} == first
    assert Counter(outcomes(tmp_path / "out").values()) == {"ok": 89, "image_not_found": 6}
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["request_counts"] == {"total": 95, "completed": 89, "failed": 6}
    assert (summary["round"], summary["errors"]) == (1, {"image_not_found": 6})
    failures = [json.loads(line) for line in (tmp_path / "out/errors.jsonl").read_text().splitlines()]
    assert [failure["id"] for failure in failures] == ["r13", "r33", "r53", "r73", "r83", "r93"]
    audit = verify(str(tmp_path / "out"))
    assert audit.ok, audit.problems
    assert (audit.rows_found, audit.failed, audit.rounds) == (95, 6, 2)

    mend(tmp_path, *range(95))
    worker.worked.clear()
    assert lifecycle.retry(controller.ledger, settings, spec.id).rows == 6
    state = advance(controller, spec.id, ended, worker)
    assert sorted(worker.worked) == [13, 33, 53, 73, 83, 93]
    assert (state.completed, state.failed, state.round) == (95, 0, 2)
    assert set(outcomes(tmp_path / "out").values()) == {"ok"}
    assert (tmp_path / "out/errors.jsonl").read_bytes() == b""
    assert verify(str(tmp_path / "out")).ok
    with pytest.raises(UsageError, match="every row has a result"):
        lifecycle.retry(controller.ledger, settings, spec.id)


def test_retry_on_s3_fetches_counts_from_metadata(
    s3_server: S3Server, settings: Settings, controller: Controller
) -> None:
    names = b"".join(b"s3://blip/%s-%d.jpg\n" % (b"bad" if n % 7 == 0 else b"img", n) for n in range(40))
    open_store("s3://blip/in").put("list.txt", names)
    spec, worker = caption_spec("s3://blip/in/list.txt", "s3://blip/out"), MiniWorker(settings)
    advance(controller, submit(controller.ledger, spec, settings), ended, worker)
    assert lifecycle.read_status(controller.ledger, settings, spec.id)["errors"] == {"image_not_found": 6}
    worker.worked.clear()
    lifecycle.retry(controller.ledger, settings, spec.id)
    state = advance(controller, spec.id, ended, worker)
    assert sorted(worker.worked) == list(range(0, 40, 7))
    assert (state.status, state.completed, state.failed) == ("completed", 34, 6)
    assert verify("s3://blip/out").ok
    assert len(outcomes("s3://blip/out")) == 40


def test_flushall_in_mid_retry_is_rebuilt_from_storage(
    redis_server: RedisServer, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    spec, worker = finished(settings, controller, tmp_path, 300)
    mend(tmp_path, *range(100))
    worker.worked.clear()
    lifecycle.retry(controller.ledger, settings, spec.id)
    advance(controller, spec.id, lambda state: in_round(state, 1) and state.chunks_done >= 10, worker)
    assert worker.worked
    redis_server.client().flushall()
    state = advance(controller, spec.id, ended, worker)
    assert (state.status, state.completed, state.failed, state.round) == ("completed", 280, 20, 1)
    assert Counter(worker.worked) == Counter(range(3, 300, 10))  # what was done before the loss was kept
    assert verify(str(tmp_path / "out")).ok


def test_redis_lost_right_after_retry_was_asked_for(
    redis_server: RedisServer, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    spec, worker = finished(settings, controller, tmp_path)
    mend(tmp_path, 3)
    lifecycle.retry(controller.ledger, settings, spec.id)
    redis_server.client().flushall()
    fresh = Controller(settings)  # one that never heard of the job
    assert submit(fresh.ledger, spec, settings) == spec.id
    state = advance(fresh, spec.id, ended, worker)
    assert (state.status, state.completed, state.round) == ("completed", 86, 1)
    fresh.close()


def test_kill_9_of_workers_and_the_control_loop_during_retry(
    redis_server: RedisServer, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    spec, _ = finished(settings, controller, tmp_path, 400)
    mend(tmp_path, *range(200))
    here = Path(__file__).parent
    environment = {
        **os.environ, "BLIP_REDIS_URL": redis_server.url, "BLIP_LEASE_SECONDS": "1", "BLIP_RENEW_SECONDS": "0.3",
        "BLIP_RECONCILE_SECONDS": "0.1", "BLIP_POLL_SECONDS": "0.02", "BLIP_LEAD_SECONDS": "0.1",
    }  # fmt: skip
    time.sleep(1.1)  # the fixture's loop loses the lead
    lifecycle.retry(controller.ledger, settings, spec.id)

    def start(script: str, *arguments: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, str(here / script), *arguments], env=environment)

    worker, dying = start("mini_worker.py", "w0", "0.05"), start("dying_loop.py", spec.id)
    try:
        for number in range(1, 6):
            time.sleep(0.7)
            worker.kill()
            worker.wait()
            worker = start("mini_worker.py", f"w{number}", "0.02")
        assert dying.wait(60) == 0
    finally:
        for process in (worker, dying):
            process.kill()
            process.wait()
    state = controller.ledger.state(spec.id)
    assert state is not None
    assert (state.status, state.completed, state.failed, state.round) == ("completed", 380, 20, 1)
    assert len(outcomes(tmp_path / "out")) == 400
    assert verify(str(tmp_path / "out")).ok


def test_retry_of_a_job_that_the_guard_stopped(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    """The failed rows of what was done and all rows of what was not; late parts of the first round change nothing."""
    manifest = write_manifest(tmp_path, 3000, lambda n: n % 4 != 0)
    spec, worker = caption_spec(manifest, tmp_path / "out", chunk_rows=100), MiniWorker(settings)
    state = advance(controller, submit(controller.ledger, spec, settings), ended, worker)
    assert state.status == "failed"
    done = state.chunks_done
    mend(tmp_path, *range(3000))
    begun = lifecycle.retry(controller.ledger, settings, spec.id)
    assert begun.rows == 3000 - state.completed
    worker.worked.clear()
    state = advance(controller, spec.id, ended, worker)
    assert (state.status, state.completed, state.failed, state.round) == ("completed", 3000, 0, 1)
    assert Counter(worker.worked).most_common(1)[0][1] == 1
    assert len(worker.worked) == begun.rows
    assert set(outcomes(tmp_path / "out").values()) == {"ok"}
    assert len(list((tmp_path / "out/results").iterdir())) == done
    audit = verify(str(tmp_path / "out"))
    assert audit.ok, audit.problems


def test_a_retry_that_was_cancelled_goes_on_as_the_same_round(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    spec, worker = finished(settings, controller, tmp_path, 200)
    lifecycle.retry(controller.ledger, settings, spec.id)
    advance(controller, spec.id, lambda state: in_round(state, 1) and state.chunks_done >= 5, worker)
    lifecycle.cancel(controller.ledger, spec.id)
    assert advance(controller, spec.id, ended).status == "cancelled"
    audit = verify(str(tmp_path / "out"))
    assert any("round 1 is not complete" in problem for problem in audit.problems)
    worker.worked.clear()
    assert lifecycle.retry(controller.ledger, settings, spec.id).round == 1
    state = advance(controller, spec.id, ended, worker)
    assert (state.status, state.failed, state.round) == ("completed", 20, 1)
    assert 0 < len(worker.worked) < 20
    assert len(load_rounds(plan_of(tmp_path / "out"))) == 1


def test_verify_sees_what_is_wrong_with_a_round(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    spec, worker = finished(settings, controller, tmp_path)
    lifecycle.retry(controller.ledger, settings, spec.id)
    advance(controller, spec.id, ended, worker)
    folder = tmp_path / "out/rounds/1"
    part = folder / "part-00000002.jsonl"
    good = part.read_bytes()
    part.write_bytes(good.replace(b'"row":23', b'"row":24'))
    (folder / "part-00000099.jsonl").write_text("")
    (folder / "part-00000004.jsonl").unlink()
    problems = "\n".join(verify(str(tmp_path / "out")).problems)
    assert "row 24 where row 23 belongs" in problems
    assert "rounds/1/part-00000099.jsonl: no chunk of a round" in problems
    assert "rounds/1/part-00000004.jsonl is missing: 1 rows of round 1" in problems
    (folder / "round.json").write_text("{}")
    with pytest.raises(JobError, match="is no round of this plan"):
        verify(str(tmp_path / "out"))


def test_a_paused_job_rests_and_resumes_at_once(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    spec = caption_spec(write_manifest(tmp_path, 300), tmp_path / "out")
    job, worker = submit(controller.ledger, spec, settings), MiniWorker(settings)
    advance(controller, job, lambda state: state.chunks_done >= 3, worker)
    held = worker.take()
    assert held is not None
    lease = worker.start(held)
    assert not isinstance(lease, str)
    lifecycle.pause(controller.ledger, job)
    assert not controller.ledger.renew(lease, 1)  # its worker lets go
    assert controller.ledger.release(lease)
    before = len(worker.worked)
    while hint := worker.take():  # what waits in the queue is dropped
        worker.work(hint)
    for _ in range(5):
        controller.step()
    assert worker.take() is None
    assert len(worker.worked) == before
    assert set(worker.outcomes[3:]) == {"gone"}
    assert lifecycle.read_status(controller.ledger, settings, job)["status"] == "paused"
    with pytest.raises(UsageError, match="is paused"):
        lifecycle.pause(controller.ledger, job)
    lifecycle.resume(controller.ledger, job)
    controller.step()
    hint = worker.take()  # not only after a lease's time
    assert hint is not None
    worker.work(hint)
    assert worker.outcomes[-1] == "committed"
    state = advance(controller, job, ended, worker)
    assert (state.status, state.completed) == ("completed", 300)
    assert Counter(worker.worked) == Counter(range(300))


def test_what_cannot_be_done_is_one_line(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    ledger = controller.ledger
    with pytest.raises(UsageError, match="job job-x is not known"):
        lifecycle.read_status(ledger, settings, "job-x")
    spec, _ = finished(settings, controller, tmp_path)
    for action, says in (
        (lambda: lifecycle.pause(ledger, spec.id), "completed: only a job that is in_progress"),
        (lambda: lifecycle.cancel(ledger, spec.id), "completed: it has ended already"),
        (lambda: lifecycle.resume(ledger, spec.id), "only one that is paused, cancelled or failed"),
    ):
        with pytest.raises(UsageError, match=says):
            action()
    (tmp_path / "m").write_bytes(b"")
    empty = submit(ledger, caption_spec(tmp_path / "m", tmp_path / "other"), settings)
    advance(controller, empty, ended)
    with pytest.raises(UsageError, match="has no plan yet"):
        lifecycle.retry(ledger, settings, empty)
    lifecycle.resume(ledger, empty)
    with pytest.raises(UsageError, match="wait for its end"):
        lifecycle.retry(ledger, settings, empty)


def test_status_tells_speed_time_cost_and_errors(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    settings = settings.model_copy(update={"price_per_worker_hour": 3600.0})
    spec = caption_spec(write_manifest(tmp_path, 400, lambda n: n % 10 == 0), tmp_path / "out", weight=2)
    job, worker = submit(controller.ledger, spec, settings), MiniWorker(settings)
    status = lifecycle.read_status(controller.ledger, settings, job)
    assert (status["status"], status["notice"], status["weight"]) == ("validating", "no worker is live", 2)
    deadline = time.monotonic() + 20
    while True:
        advance(controller, job, lambda _: True)
        if hint := worker.take():
            worker.work(hint, 0.1)
        status = lifecycle.read_status(controller.ledger, settings, job)
        if status["rows_per_second"]:
            break
        assert time.monotonic() < deadline
    rows = status["request_counts"]
    assert 10 < status["rows_per_second"] < 200
    assert status["eta_seconds"] == pytest.approx((400 - status["rows_done"]) / status["rows_per_second"], abs=0.06)
    assert status["errors"] == {"image_not_found": rows["failed"]}
    assert len(list(lifecycle.errors(controller.ledger, settings, job))) == rows["failed"]
    assert status["notice"].startswith("no live worker holds model demo yet")
    speed = controller.ledger.speed("caption demo")
    assert speed is None or speed > 0
    state = advance(controller, job, ended, worker)
    status = lifecycle.read_status(controller.ledger, settings, job)
    assert (status["status"], status["eta_seconds"], status["notice"]) == ("completed", None, None)
    assert status["estimated_cost"] == pytest.approx(state.worker_seconds, abs=0.01)
    assert [entry["id"] for entry in lifecycle.list_jobs(controller.ledger, settings)] == [job]


def test_chunks_of_automatic_size_follow_the_speed_seen(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    """About half a minute of work for one lease: a slow model gets smaller chunks than a quick one."""
    manifest, worker, found = write_manifest(tmp_path, 20_000), MiniWorker(settings), {}
    for name, speed in (("unknown", None), ("slow", 5.0), ("quick", 1000.0)):
        if speed:
            controller.ledger._redis.hset("blip:speeds", "caption demo", speed)
        spec = caption_spec(manifest, tmp_path / name, chunk_rows=None)
        submit(controller.ledger, spec, settings)
        advance(controller, spec.id, lambda state: state.chunks > 0 and state.status == "in_progress", worker)
        found[name] = plan_of(tmp_path / name).chunk_rows
        lifecycle.cancel(controller.ledger, spec.id)
    assert found == {"unknown": 312, "slow": 150, "quick": 312}  # never so large that few workers would have any


def test_jobs_share_by_weight(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    manifest, worker = write_manifest(tmp_path, 5000), MiniWorker(settings)
    controller.ledger.worker_seen("w", {"slots": 8})
    for weight in (1, 3):
        submit(controller.ledger, caption_spec(manifest, tmp_path / f"out-{weight}", weight=weight), settings)
    while not all(state.status == "in_progress" for _, state in controller._unfinished()):
        controller.step()
    done: Counter[float] = Counter()
    deadline = time.monotonic() + 30
    while sum(done.values()) < 240:
        assert time.monotonic() < deadline
        controller.step()
        if hint := worker.take():
            worker.work(hint, 0.03)  # two seconds of it are few chunks, against those that are counted
            spec = controller.ledger.spec(hint.job)
            assert spec is not None
            done[spec.weight] += 1
    assert 2 < done[3] / done[1] < 4.5, done


def test_retry_of_a_job_whose_rows_all_failed(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    spec, worker = caption_spec(write_manifest(tmp_path, 25, lambda _: True), tmp_path / "out"), MiniWorker(settings)
    state = advance(controller, submit(controller.ledger, spec, settings), ended, worker)
    assert state.error is not None
    assert state.error["code"] == "all_rows_failed"
    mend(tmp_path, *range(20))
    assert lifecycle.retry(controller.ledger, settings, spec.id).rows == 25
    state = advance(controller, spec.id, ended, worker)
    assert (state.status, state.completed, state.failed, state.error) == ("completed", 20, 5, None)
    assert verify(str(tmp_path / "out")).ok


def test_a_job_of_another_version_stops_no_other(
    settings: Settings, controller: Controller, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At a rolling upgrade, or back: a field more is left out, and what cannot be read is skipped."""
    ledger, worker, manifest = controller.ledger, MiniWorker(settings), write_manifest(tmp_path, 20)
    later, odd, broken, job = (
        submit(ledger, caption_spec(manifest, tmp_path / name), settings) for name in ("later", "odd", "broken", "job")
    )
    for name, change in ((later, {"priority": 7}), (odd, {"task": "segment"})):
        stored = json.loads(ledger._redis.hget(f"blip:job:{name}", "spec"))
        ledger._redis.hset(f"blip:job:{name}", "spec", json.dumps(stored | change))
    ledger._redis.hset(f"blip:job:{broken}", "spec", "{")
    for name in (job, later):
        assert advance(controller, name, ended, worker).status == "completed"
    views = {view["id"]: view for view in lifecycle.list_jobs(ledger, settings)}
    assert {name: view["status"] for name, view in views.items()} == {
        later: "completed", odd: "validating", broken: "validating", job: "completed",
    }  # fmt: skip
    assert lifecycle.read_status(ledger, settings, odd)["notice"] == views[odd]["notice"]
    assert "cannot be read by this version (task='segment'" in views[odd]["notice"]
    assert "recover OUTPUT" in views[broken]["notice"]
    assert lifecycle.backlog(ledger, settings).chunks == 0
    with pytest.raises(UsageError, match="cannot be read by this version"):
        lifecycle.retry(ledger, settings, odd)
    for name in (odd, broken):
        assert sum(f"job {name}: what is in Redis" in line for line in caplog.messages) == 1
    submit(ledger, caption_spec(manifest, tmp_path / "odd"), settings)  # the same command again
    assert advance(controller, odd, ended, worker).status == "completed"
