"""Leases, blame, presence and status on a real Redis."""

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from servers import RedisServer

from orchestrator.contract import Hint, JobSpec
from orchestrator.errors import RedisUnavailable, UsageError
from orchestrator.ledger import Lease, Ledger, StaleEpochError
from orchestrator.settings import load_settings

PLAN = "p" * 32
HINT = Hint("job-1", 3, PLAN, 0, 100, 30, 10)


@pytest.fixture
def ledger(redis_server: RedisServer) -> Iterator[Ledger]:
    ledger = Ledger.connect(load_settings(lease_seconds=0.4, renew_seconds=0.1))
    yield ledger
    ledger.close()


def spec(job: str = "job-1", output: str = "/out") -> JobSpec:
    return JobSpec(id=job, task="caption", model="demo", manifest="/m", output=output, created_at=1.0)


def begin(ledger: Ledger, chunks: int = 10) -> str:
    """A job in progress; returns the epoch."""
    assert ledger.create_job(spec())
    epoch = ledger.lead("me", 60)
    assert epoch is not None
    ledger.reset("job-1", epoch, PLAN, chunks, chunks * 10)
    assert ledger.set_status("job-1", "in_progress", epoch=epoch)
    return epoch


def lease_of(ledger: Ledger, worker: str = "w1", hint: Hint = HINT) -> Lease:
    lease = ledger.acquire(hint, worker)
    assert isinstance(lease, Lease)
    return lease


def test_one_holder_at_a_time(ledger: Ledger) -> None:
    begin(ledger)
    lease = lease_of(ledger)
    assert ledger.acquire(HINT, "w1") == "busy"  # the same worker too
    assert ledger.acquire(HINT, "w2") == "busy"
    for _ in range(3):
        time.sleep(0.25)
        assert ledger.renew(lease, 4)
    assert ledger.acquire(HINT, "w2") == "busy"
    progress = ledger.progress("job-1")
    assert progress is not None
    assert (progress.total, progress.done, progress.in_leases) == (100, 4, 4)
    assert ledger.commit(lease, 9, 1)
    assert not ledger.commit(lease, 9, 1)
    assert not ledger.renew(lease, 10)
    assert ledger.acquire(HINT, "w2") == "done"
    progress = ledger.progress("job-1")
    assert progress is not None
    assert (progress.completed, progress.failed, progress.done) == (9, 1, 10)


def test_an_expired_lease_is_taken_over_and_its_holder_fenced(ledger: Ledger) -> None:
    begin(ledger)
    old = lease_of(ledger)
    time.sleep(0.5)
    assert ledger.progress("job-1").in_leases == 0  # type: ignore[union-attr]
    new = lease_of(ledger, "w2")
    assert new.fence > old.fence
    assert (old.attempt, new.attempt) == (1, 2)
    assert not ledger.renew(old, 5)
    assert not ledger.release(old)
    assert not ledger.blame(old, 31)
    assert ledger.renew(new, 1)
    assert ledger.commit(old, 10, 0)  # its part is in storage all the same
    assert not ledger.commit(new, 10, 0)


def test_a_drained_chunk_costs_no_attempt(ledger: Ledger) -> None:
    begin(ledger)
    for _ in range(8):
        lease = lease_of(ledger)
        assert lease.attempt == 1
        assert ledger.release(lease)


def test_a_row_is_blamed_for_the_workers_that_died_at_it(ledger: Ledger) -> None:
    epoch = begin(ledger)
    lease = lease_of(ledger)  # first start: not row by row
    time.sleep(0.45)
    for worker in ("w2", "w3"):
        lease = lease_of(ledger, worker)
        assert ledger.blame(lease, 33)
        assert ledger.blame(lease, 34)
        time.sleep(0.45)
    assert ledger.suspects("job-1", 3) == {34: 1}  # the second death shows when its chunk is given away
    assert ledger.requeue("job-1", epoch, [3]) == [3]
    assert ledger.suspects("job-1", 3) == {34: 2}
    lease = lease_of(ledger, "w4")
    assert lease.attempt == 4
    ledger.blame(lease, 35)
    assert ledger.release(lease)  # a drain is nobody's death
    lease_of(ledger, "w5")
    assert ledger.suspects("job-1", 3) == {34: 2}
    assert ledger.suspects("job-1", 33) == {}


def test_a_group_is_blamed_as_a_row_is(ledger: Ledger) -> None:
    begin(ledger)
    assert ledger.blame(lease_of(ledger), ~33)
    time.sleep(0.45)
    assert ledger.blame(lease_of(ledger, "w2"), 33)
    time.sleep(0.45)
    lease_of(ledger, "w3")
    assert ledger.suspects("job-1", 3) == {~33: 1, 33: 1}


def test_blame_with_many_suspects_is_complete(ledger: Ledger) -> None:
    begin(ledger)
    ledger._redis.hset("blip:job:job-1:blame", mapping={f"{chunk}:{chunk}": 1 for chunk in range(2000)})
    assert ledger.suspects("job-1", 3) == {3: 1}


def test_feeding_is_bounded_and_skips_what_is_done(ledger: Ledger) -> None:
    epoch = begin(ledger)
    ledger.mark("job-1", epoch, PLAN, [(0, 10, 0, ""), (2, 9, 1, "crashed=1")])
    assert ledger.feed("job-1", epoch, 3) == [1, 3, 4]
    assert ledger.feed("job-1", epoch, 3) == []
    assert ledger.in_flight("job-1") == (0, 0, 3)
    assert ledger.error_codes("job-1") == {"crashed": 1}
    ledger.commit(HINT, 10, 0)
    assert ledger.feed("job-1", epoch, 100) == [5, 6, 7, 8, 9]
    assert ledger.feed("job-1", epoch, 100) == []


def test_a_huge_job_that_is_nearly_done_is_fed_at_once(ledger: Ledger) -> None:
    epoch = begin(ledger, chunks=20_001)
    for begun in range(0, 20_000, 1000):
        ledger.mark("job-1", epoch, PLAN, [(chunk, 10, 0, "") for chunk in range(begun, begun + 1000)])
    fed = [ledger.feed("job-1", epoch, 64) for _ in range(3)]
    assert fed == [[20_000], [], []]


def test_overdue_hints_and_leases_are_told_apart(ledger: Ledger) -> None:
    epoch = begin(ledger)
    assert ledger.feed("job-1", epoch, 2) == [0, 1]
    lease_of(ledger, hint=Hint("job-1", 1, PLAN, 0, 100, 10, 10))
    assert ledger.due("job-1") == []
    time.sleep(0.45)
    assert sorted(ledger.due("job-1")) == [(0, False), (1, True)]
    assert ledger.requeue("job-1", epoch, [0, 1, 7]) == [0, 1]
    assert ledger.requeue("job-1", epoch, [0, 1]) == []  # another loop did it just now
    assert ledger.due("job-1") == []


def test_a_later_round_is_about_its_chunks_only(ledger: Ledger) -> None:
    epoch = begin(ledger)
    early = lease_of(ledger)
    ledger.reset("job-1", epoch, PLAN, 10, 100, 1)
    for _ in range(2):  # again by a control loop that was killed
        ledger.open("job-1", epoch, PLAN, 1, [(3, 4), (7, 10)])
    state = ledger.state("job-1")
    assert state is not None
    assert (state.round, state.chunks_done, state.completed, state.failed) == (1, 8, 86, 0)
    assert ledger.acquire(HINT, "w2") == "gone"  # hints, leases and parts of the first round count no more
    assert not ledger.commit(early, 10, 0)
    assert not ledger.renew(early, 1)
    assert ledger.feed("job-1", epoch, 64) == [3, 7]
    lease = lease_of(ledger, hint=replace(HINT, round=1, todo=4))
    assert ledger.acquire(replace(HINT, chunk=2, round=1, todo=1), "w2") == "done"
    assert ledger.commit(lease, 3, 1, "crashed=1")
    ledger.mark("job-1", epoch, PLAN, [(3, 3, 1, "crashed=1"), (7, 8, 2, "internal=2")], 1)
    state = ledger.state("job-1")
    assert state is not None
    assert (state.chunks_done, state.completed, state.failed) == (10, 97, 3)
    assert ledger.error_codes("job-1") == {"internal": 2, "crashed": 1}
    with pytest.raises(StaleEpochError):
        ledger.mark("job-1", epoch, PLAN, [(1, 10, 0, "")])  # of another round


def test_what_is_resumed_is_handed_out_at_once(ledger: Ledger) -> None:
    epoch = begin(ledger)
    assert ledger.feed("job-1", epoch, 4) == [0, 1, 2, 3]
    held = lease_of(ledger)  # of chunk 3
    assert ledger.set_status("job-1", "paused")
    assert ledger.set_status("job-1", "in_progress")
    assert ledger.feed("job-1", epoch, 4) == [0, 1, 2]  # but for what a worker still holds
    assert ledger.renew(held, 1)
    assert ledger.feed("job-1", epoch, 6) == [4, 5]


def test_speed_is_a_moving_average(ledger: Ledger) -> None:
    epoch = begin(ledger)
    measure = ("job-1", epoch, 30, 1, "caption demo")
    ledger.measure(*measure)
    assert ledger.state("job-1").rows_per_second is None  # type: ignore[union-attr]
    lease = lease_of(ledger)
    for number in range(3):
        ledger.commit(replace(HINT, chunk=number), 10, 0)
        time.sleep(0.37)
        ledger.renew(lease, number)
        ledger.measure(*measure)  # more often than once a second changes nothing
    state = ledger.state("job-1")
    assert state is not None
    assert state.rows_per_second == pytest.approx(32 / 1.11, rel=0.2)
    assert state.worker_seconds == pytest.approx(1.1, rel=0.2)
    assert ledger.speed("caption demo") == pytest.approx(state.rows_per_second, rel=0.01)
    assert ledger.speed("vqa demo") is None
    with pytest.raises(StaleEpochError):
        ledger.measure("job-1", "1", 30, 1, "x")


@pytest.mark.parametrize("status", ["paused", "cancelling", "failed"])
def test_a_stopped_job_lets_go_of_its_workers_and_keeps_what_they_finish(ledger: Ledger, status: str) -> None:
    epoch = begin(ledger)
    lease = lease_of(ledger)
    assert ledger.set_status("job-1", status)  # type: ignore[arg-type]
    assert not ledger.renew(lease, 1)
    assert ledger.acquire(Hint("job-1", 4, PLAN, 0, 100, 40, 10), "w2") == "gone"
    assert ledger.feed("job-1", epoch, 64) == []
    assert ledger.requeue("job-1", epoch, [3]) == []
    assert ledger.commit(lease, 10, 0)
    assert ledger.state("job-1").completed == 10  # type: ignore[union-attr]


def test_statuses_follow_only_what_they_may(ledger: Ledger) -> None:
    begin(ledger)
    assert not ledger.set_status("job-1", "completed")
    assert ledger.set_status("job-1", "finalizing")
    assert ledger.set_status("job-1", "completed")
    assert not ledger.set_status("job-1", "failed", error={"code": "x", "message": "y"})
    state = ledger.state("job-1")
    assert state is not None
    assert (state.status, state.error) == ("completed", None)
    assert state.created_at <= state.in_progress_at <= state.finalizing_at <= state.completed_at  # type: ignore[operator]
    assert ledger.active_jobs() == []
    assert ledger.jobs() == ["job-1"]


def test_one_output_has_one_working_job(ledger: Ledger) -> None:
    assert ledger.create_job(spec())
    assert not ledger.create_job(spec())
    with pytest.raises(UsageError, match="job job-1 is writing here"):
        ledger.create_job(spec("job-2"))
    assert ledger.create_job(spec("job-3", "/elsewhere"))
    ledger.set_status("job-1", "failed")
    assert ledger.create_job(spec("job-2"))
    assert ledger.spec("job-2") == spec("job-2")
    assert ledger.spec("unknown") is None
    assert ledger.state("unknown") is None


def test_results_never_mix_two_models(ledger: Ledger) -> None:
    begin(ledger)
    assert ledger.report_model("job-1", {"weights_sha256": "aa", "revision": "main"})
    assert ledger.report_model("job-1", {"weights_sha256": "aa"})
    assert not ledger.report_model("job-1", {"weights_sha256": "bb"})
    assert ledger.state("job-1").model == {"weights_sha256": "aa", "revision": "main"}  # type: ignore[union-attr]


def test_only_workers_seen_lately_are_live(ledger: Ledger) -> None:
    ledger.worker_seen("w1", {"slots": 2})
    time.sleep(0.3)
    ledger.worker_seen("w2", {"slots": 4})
    assert ledger.live_workers() == {"w1": {"slots": 2}, "w2": {"slots": 4}}
    assert ledger.live_workers(0.2) == {"w2": {"slots": 4}}


@pytest.mark.parametrize("hours", [2, -2])
def test_a_worker_s_clock_does_not_matter(ledger: Ledger, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    real, epoch = time.time, begin(ledger)
    monkeypatch.setattr(time, "time", lambda: real() + hours * 3600)
    monkeypatch.setattr(time, "monotonic", lambda: real() + hours * 3600)
    lease = lease_of(ledger)
    assert ledger.renew(lease, 2)
    monkeypatch.undo()
    assert ledger.acquire(HINT, "w2") == "busy"
    assert ledger.due("job-1") == []
    assert abs(ledger.state("job-1").created_at - real()) < 60  # type: ignore[union-attr, operator]
    time.sleep(0.45)
    assert ledger.due("job-1") == [(3, True)]
    assert ledger.lead("other", 1) is None
    assert ledger.lead("me", 1) == epoch


def test_no_redis_is_one_clear_error(redis_server: RedisServer, ledger: Ledger) -> None:
    redis_server.kill()
    with pytest.raises(RedisUnavailable, match="BLIP_REDIS_URL"):
        ledger.jobs()
    redis_server.start()
    assert ledger.jobs() == []  # and it is found again
    with pytest.raises(UsageError, match="BLIP_REDIS_URL"):
        Ledger.connect(load_settings(redis_url="http://x"))


def test_a_full_redis_is_unavailable_not_a_crash(redis_server: RedisServer, ledger: Ledger) -> None:
    begin(ledger)
    admin = redis_server.client()
    admin.config_set("maxmemory", "1mb")
    try:
        assert ledger.memory_ratio() > 0.3
        admin.config_set("maxmemory", "1")
        with pytest.raises(RedisUnavailable):
            ledger.acquire(HINT, "w1")
    finally:
        admin.config_set("maxmemory", "0")
        admin.close()
    lease_of(ledger)
    assert ledger.memory_ratio() == 0


def test_scripts_survive_their_loss(redis_server: RedisServer, ledger: Ledger) -> None:
    begin(ledger)
    admin = redis_server.client()
    admin.script_flush()
    admin.close()
    lease_of(ledger)


def keys(ledger: Ledger) -> set[str]:
    return {key.removeprefix("blip:job:") for key in ledger._redis.keys("blip:job:*")}


def test_a_job_that_ended_keeps_only_what_is_told_of_it(ledger: Ledger) -> None:
    begin(ledger, chunks=2)
    assert ledger.commit(replace(HINT, chunk=0), 10, 0)
    lease = lease_of(ledger, hint=replace(HINT, chunk=1))
    assert ledger.blame(lease, 12)
    assert keys(ledger) == {
        "job-1",
        *(f"job-1:{name}" for name in ("done", "inflight", "leases", "attempts", "cursor")),
    }
    assert ledger.commit(lease, 9, 1, "crashed=1")
    ledger.set_status("job-1", "finalizing")
    ledger.set_status("job-1", "completed")
    assert keys(ledger) == {"job-1", "job-1:codes"}
    assert not ledger.commit(lease, 9, 1, "crashed=1")  # late, and counted before
    state = ledger.state("job-1")
    assert state is not None
    assert (state.completed, state.failed, state.chunks_done) == (19, 1, 2)


def test_jobs_that_ended_long_ago_are_forgotten(ledger: Ledger) -> None:
    epoch = ledger.lead("me", 60)
    assert epoch is not None
    for name in ("job-1", "job-2", "job-3", "job-4"):
        assert ledger.create_job(spec(name, f"/{name}"))
    ledger._redis.hset("blip:job:job-4", "spec", "{")
    for name in ("job-1", "job-3", "job-4"):
        ledger.set_status(name, "failed")
    assert ledger.forget_ended(epoch, 60) == 0
    time.sleep(0.3)
    ledger.set_status("job-3", "validating")
    ledger.set_status("job-3", "failed")  # again, only just
    assert ledger.forget_ended(epoch, 0.25) == 2
    assert ledger.jobs() == ["job-2", "job-3"]
    assert keys(ledger) == {"job-2", "job-3"}
    assert sorted(ledger._redis.hkeys("blip:outputs")) == ["/job-2", "/job-3", "/job-4"]  # the last one's is not known
    assert ledger.report_model("job-1", {"weights_sha256": "aa"})  # a worker that comes late
    assert ledger.state("job-1") is None
    assert keys(ledger) == {"job-2", "job-3"}
    assert ledger.create_job(spec("job-1", "/job-1"))
    with pytest.raises(StaleEpochError):
        ledger.forget_ended("1", 0)


def test_failed_rows_of_restored_chunks_are_counted_once(ledger: Ledger) -> None:
    epoch = begin(ledger)
    ledger.restore("job-1", epoch, PLAN, [(2, 10), (3, 10), (4, 10)])
    ledger.restore("job-1", epoch, PLAN, [(3, 10)])
    assert ledger.acquire(HINT, "w1") == "done"
    assert not ledger.commit(HINT, 10, 0)
    assert ledger.uncounted("job-1", 2) == [2, 3]
    for _ in range(2):  # the second time as after an answer that was lost
        ledger.count("job-1", epoch, PLAN, [(2, 1, "crashed=1"), (3, 4, "crashed=1,internal=3")])
    state = ledger.state("job-1")
    assert state is not None
    assert (state.chunks_done, state.completed, state.failed) == (3, 25, 5)
    assert ledger.error_codes("job-1") == {"internal": 3, "crashed": 2}
    assert ledger.uncounted("job-1", 9) == [4]
    for late in (
        lambda: ledger.count("job-1", "0", PLAN, [(4, 1, "")]),
        lambda: ledger.restore("job-1", "0", PLAN, []),
    ):
        with pytest.raises(StaleEpochError):
            late()
    ledger.reset("job-1", epoch, PLAN, 10, 100)
    assert ledger.uncounted("job-1", 9) == []
