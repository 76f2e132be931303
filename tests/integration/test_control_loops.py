"""Control loops that take over from each other, and jobs that several people change at once."""

import shutil
import time
from pathlib import Path

import pytest
from conftest import FAST
from harness import advance, caption_spec, ended, write_manifest
from mini_worker import MiniWorker
from servers import RedisServer

from orchestrator import lifecycle
from orchestrator.control import Controller
from orchestrator.errors import JobConflict
from orchestrator.jobs import submit
from orchestrator.ledger import QUEUE, Ledger
from orchestrator.recover import recover
from orchestrator.roster import Roster
from orchestrator.scheduling import LEAST_IN_FLIGHT, queue_of
from orchestrator.settings import Settings, load_settings


def follow(leader: Controller, other: Controller) -> None:
    """`leader` keeps the lead while the other one looks."""
    assert leader.step()
    assert not other.step()


def test_a_loop_that_led_once_does_not_bring_back_what_was_cancelled(redis_server: RedisServer, tmp_path: Path) -> None:
    settings = load_settings(**{**FAST, "lead_seconds": 5.0})
    first, second = Controller(settings), Controller(settings)
    gone, kept = (
        submit(first.ledger, caption_spec(write_manifest(tmp_path, 20), tmp_path / name), settings)
        for name in ("gone", "kept")
    )
    advance(first, kept, lambda state: state.status == "in_progress")
    lifecycle.pause(first.ledger, kept)
    follow(first, second)
    redis_server.client().hset("blip:control", "deadline", 0)  # as if the first had been silent
    lifecycle.cancel(second.ledger, gone)
    advance(second, gone, ended)
    lifecycle.resume(second.ledger, kept)
    follow(second, first)
    redis_server.client().flushall()
    advance(first, kept, ended, MiniWorker(settings))  # neither paused nor lost
    assert first.ledger.jobs() == [kept]
    first.close()
    second.close()


def test_a_loop_that_never_led_rebuilds_what_it_saw(redis_server: RedisServer, tmp_path: Path) -> None:
    settings = load_settings(**{**FAST, "lead_seconds": 5.0})
    first, second = Controller(settings), Controller(settings)
    job = submit(first.ledger, caption_spec(write_manifest(tmp_path, 20), tmp_path / "out"), settings)
    follow(first, second)
    first.close()
    redis_server.client().flushall()
    assert advance(second, job, ended, MiniWorker(settings)).status == "completed"
    second.close()


def test_a_lost_job_whose_output_was_taken_meanwhile(
    redis_server: RedisServer, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path, 20)
    first = caption_spec(manifest, tmp_path / "out")
    other = caption_spec(manifest, tmp_path / "out", options={"num_beams": 1})
    advance(controller, submit(controller.ledger, first, settings), lambda state: state.status == "in_progress")
    redis_server.client().flushall()
    assert controller.ledger.create_job(other)
    state = advance(controller, other.id, ended)  # the output says whose it is
    assert state.error is not None
    assert state.error["code"] == "output_taken"
    assert controller.ledger.jobs() == [other.id]


def test_of_two_who_resume_at_once_one_does(
    settings: Settings, controller: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, worker = controller.ledger, MiniWorker(settings)
    spec = caption_spec(write_manifest(tmp_path, 60), tmp_path / "out")
    job = submit(ledger, spec, settings)
    advance(controller, job, lambda state: state.chunks_done == 2, worker)
    ledger.set_status(job, "failed")
    seen = ledger.state(job)
    lifecycle.resume(ledger, job)
    advance(controller, job, lambda state: state.status == "in_progress")
    other = MiniWorker(settings).ledger
    monkeypatch.setattr(other, "state", lambda _: seen)  # the second one looked before the first one acted
    with pytest.raises(JobConflict, match="it is at work"):
        lifecycle.resume(other, job)
    with pytest.raises(JobConflict, match="it is at work"):
        lifecycle.retry(other, settings, job)
    submit(other, spec, settings)
    state = ledger.state(job)
    assert state is not None
    assert state.status == "in_progress"


def test_a_job_that_is_being_cancelled_is_not_submitted_again(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    ledger, worker = controller.ledger, MiniWorker(settings)
    spec = caption_spec(write_manifest(tmp_path, 60), tmp_path / "out")
    job = submit(ledger, spec, settings)
    advance(controller, job, lambda state: state.chunks_done == 2, worker)
    lifecycle.cancel(ledger, job)
    again = spec.model_copy(update={"weight": 7.0})
    for ask in (lambda: submit(ledger, again, settings), lambda: recover(spec.output, settings)):
        with pytest.raises(JobConflict, match=f"job {job} is being cancelled; submit it again once it has ended"):
            ask()
    with pytest.raises(JobConflict, match="is cancelling: wait for its end"):
        lifecycle.retry(ledger, settings, job)
    assert ledger.spec(job) == spec  # nothing of it was taken over
    assert advance(controller, job, ended).status == "cancelled"
    submit(ledger, again, settings)
    assert advance(controller, job, ended, worker).status == "completed"


def test_a_job_that_is_cancelled_while_it_is_submitted_again(
    settings: Settings, controller: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = caption_spec(write_manifest(tmp_path, 60), tmp_path / "out")
    job = submit(controller.ledger, spec, settings)
    advance(controller, job, lambda state: state.status == "in_progress")
    lifecycle.pause(controller.ledger, job)
    other = MiniWorker(settings).ledger
    monkeypatch.setattr(other, "update_spec", lambda _: lifecycle.cancel(controller.ledger, job))
    with pytest.raises(JobConflict, match="is being cancelled"):
        submit(other, spec, settings)


def test_a_removed_output_may_be_done_with_another_model(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    ledger, worker = controller.ledger, MiniWorker(settings)
    spec = caption_spec(write_manifest(tmp_path, 20), tmp_path / "out")
    job = submit(ledger, spec, settings)
    advance(controller, job, lambda state: state.chunks_done == 1, worker)
    ledger.set_status(job, "failed")
    lifecycle.resume(ledger, job)
    advance(controller, job, lambda state: state.status == "in_progress")
    assert not ledger.report_model(job, {"weights_sha256": "e" * 64})  # some of its results are another one's
    advance(controller, job, ended, worker)
    shutil.rmtree(tmp_path / "out")
    submit(ledger, spec, settings)
    advance(controller, job, lambda state: state.status == "in_progress")
    assert ledger.report_model(job, {"weights_sha256": "e" * 64})


@pytest.mark.parametrize("leads", [True, False])
def test_after_flushall_hints_go_to_the_workers_of_their_model_before_these_have_reported_again(
    redis_server: RedisServer, settings: Settings, controller: Controller, tmp_path: Path, leads: bool
) -> None:
    """Also where the loop that takes over had only followed."""
    ledger, other = controller.ledger, Controller(settings)
    job = submit(ledger, caption_spec(write_manifest(tmp_path, 300), tmp_path / "out"), settings)
    pool = {"slots": 2, "only": ["demo"]}
    ledger.worker_seen("pool", pool)
    advance(controller, job, lambda _: ledger.queue_length(queue_of("demo")) == LEAST_IN_FLIGHT)
    assert not other.step()
    redis_server.client().flushall()
    loop = controller if leads else other
    advance(loop, job, lambda _: ledger.queue_length(queue_of("demo")) + ledger.queue_length(QUEUE) > 0)
    assert (ledger.queue_length(queue_of("demo")), ledger.queue_length(QUEUE)) == (LEAST_IN_FLIGHT, 0)
    other.close()


def test_workers_that_do_not_report_again_are_not_waited_for(
    redis_server: RedisServer, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger.connect(settings)
    found = Roster(ledger)
    ledger.worker_seen("gone", {"slots": 2})
    assert list(found.look()) == ["gone"]
    redis_server.client().flushall()
    assert list(found.look()) == []
    found.recall()
    ledger.worker_seen("new", {"slots": 1})
    assert sorted(found.look()) == ["gone", "new"]
    now = time.monotonic()
    monkeypatch.setattr("orchestrator.roster.monotonic", lambda: now + 11)
    assert list(found.look()) == ["new"]
    ledger.close()
