"""The commands that look at and steer jobs, as processes."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from harness import advance, caption_spec, ended, write_manifest
from mini_worker import MiniWorker
from servers import RedisServer
from test_cli import blip_batch, one_line_error

from orchestrator import lifecycle
from orchestrator.contract import STATUSES
from orchestrator.control import Controller
from orchestrator.jobs import submit
from orchestrator.settings import Settings


@pytest.fixture
def job(settings: Settings, controller: Controller, tmp_path: Path) -> str:
    """A job of 95 rows that has ended, ten of them failed."""
    spec = caption_spec(write_manifest(tmp_path, 95, lambda n: n % 10 == 3), tmp_path / "out")
    submit(controller.ledger, spec, settings)
    assert advance(controller, spec.id, ended, MiniWorker(settings)).status == "completed"
    return spec.id


def test_list_and_status(job: str, tmp_path: Path) -> None:
    header, line = blip_batch("list").stdout.splitlines()
    assert header.split() == ["job", "status", "task", "rows", "done", "failed", "speed", "output"]
    assert line.split() == [job, "completed", "caption", "95/95", "10", str(tmp_path / "out")]
    assert header.index("output") == line.index(str(tmp_path))
    assert header.index("failed") + len("failed") == line.index(" 10 ") + len(" 10")
    (entry,) = json.loads(blip_batch("list", "--json").stdout)
    view = json.loads(blip_batch("status", job, "--json", BLIP_PRICE_PER_WORKER_HOUR="2").stdout)
    assert {name: view[name] for name in ("id", "status", "output")} == {
        "id": job, "status": "completed", "output": str(tmp_path / "out"),
    }  # fmt: skip
    assert view["request_counts"] == {"total": 95, "completed": 85, "failed": 10}
    assert view["errors"] == {"image_not_found": 10}
    assert entry["id"] == job
    assert entry["status"] in STATUSES
    assert view["estimated_cost"] >= 0
    assert view["created_at"] <= view["in_progress_at"] <= view["completed_at"]
    text = blip_batch("status", job).stdout
    assert "95 of 95" in text
    assert "image_not_found" in text


def test_errors(job: str) -> None:
    lines = blip_batch("errors", job).stdout.splitlines()
    assert len(lines) == 10
    assert lines[0].split() == ["row", "3", "image_not_found", *["bad-3.png", "does", "not", "exist"]]
    records = [json.loads(line) for line in blip_batch("errors", job, "--json", "--limit", 3).stdout.splitlines()]
    assert [record["row"] for record in records] == [3, 13, 23]
    assert records[0]["error"]["code"] == "image_not_found"


def test_pause_resume_cancel_and_retry(settings: Settings, controller: Controller, job: str, tmp_path: Path) -> None:
    one_line_error(blip_batch("pause", job), "only a job that is in_progress can be paused")
    one_line_error(blip_batch("cancel", job), "it has ended already")
    one_line_error(blip_batch("resume", job), "only one that is paused, cancelled or failed")
    done = blip_batch("retry", job)
    assert (done.returncode, done.stdout) == (0, f"{job} round 1: 10 rows\n")
    one_line_error(blip_batch("retry", job), "wait for its end")
    advance(controller, job, lambda state: state.status == "in_progress")
    assert blip_batch("pause", job).stdout == f"{job} paused\n"
    assert controller.ledger.state(job).status == "paused"  # type: ignore[union-attr]
    assert blip_batch("resume", job).stdout == f"{job} resumed\n"
    assert blip_batch("cancel", job).stdout == f"{job} cancelling\n"
    assert advance(controller, job, ended).status == "cancelled"
    assert blip_batch("resume", job).stdout == f"{job} resumed\n"
    state = advance(controller, job, ended, MiniWorker(settings))
    assert (state.status, state.round, state.failed) == ("completed", 1, 10)
    for n in range(3, 95, 10):
        (tmp_path / f"mended-bad-{n}.png").touch()
    assert blip_batch("retry", job).stdout == f"{job} round 2: 10 rows\n"
    assert advance(controller, job, ended, MiniWorker(settings)).failed == 0
    done = blip_batch("retry", job, "--wait")
    assert (done.returncode, done.stdout) == (0, f"{job}: every row has a result; nothing to retry\n")


def test_what_is_not_known_or_cannot_be_reached_is_one_line(redis_server: RedisServer) -> None:
    for command in ("status", "watch", "errors", "pause", "resume", "cancel", "retry"):
        one_line_error(blip_batch(command, "job-1"), "job job-1 is not known")
    for command in (["list"], ["submit", __file__, "--task", "caption", "--output", "out"]):
        one_line_error(
            blip_batch(*command, BLIP_REDIS_URL="redis://127.0.0.1:1/0"),
            "Connection refused; check BLIP_REDIS_URL, or set BLIP_API_URL to an orchestrator's API; for one machine, "
            "`blip-batch run` needs neither",
        )


def test_watch_shows_the_job_and_ends_with_it(job: str) -> None:
    (look,) = blip_batch("watch", job, "--json").stdout.splitlines()
    assert json.loads(look)["live_workers"]["mini"]["slots"] == 1
    done = blip_batch("watch", job, "--interval", "0.1")
    assert done.returncode == 3  # finished with row errors
    for text in (job, "completed", "95 of 95", "image_not_found", "worker", "mini"):
        assert text in done.stdout


def test_watch_is_live_on_a_terminal(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    spec = caption_spec(write_manifest(tmp_path, 300), tmp_path / "out")
    job, worker = submit(controller.ledger, spec, settings), MiniWorker(settings)
    advance(controller, job, lambda state: state.chunks_done >= 2, worker)
    master, slave = pty.openpty()
    program = Path(sys.executable).parent / "blip-batch"
    with subprocess.Popen(
        [program, "watch", job, "--interval", "0.1"],
        stdout=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ) as watching:
        os.close(slave)
        seen = b""
        while b"in_progress" not in seen:
            seen += os.read(master, 4096)
        advance(controller, job, ended, worker)
        while watching.poll() is None:
            try:
                seen += os.read(master, 4096)
            except OSError:  # it has closed the terminal
                break
        assert watching.wait(10) == 0
    os.close(master)
    assert b"300 of 300" in seen


def test_the_shell_completes_commands_and_job_ids(job: str) -> None:
    def complete(*words: str) -> str:
        line = " ".join(["blip-batch", *words])
        return blip_batch(
            _BLIP_BATCH_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words))
        ).stdout  # fmt: skip

    assert set(complete("re").split()) >= {"resume", "retry"}
    assert complete("status", "job").split() == [job]


def test_lifecycle_is_a_surface_for_programs(settings: Settings, controller: Controller, job: str) -> None:
    """What the HTTP API is to call."""
    (entry,) = lifecycle.list_jobs(controller.ledger, settings)
    view = lifecycle.read_status(controller.ledger, settings, job)
    fields = {
        "id", "task", "model", "manifest", "output", "options", "status", "request_counts", "rows_per_second",
        "eta_seconds", "estimated_cost", "created_at", "in_progress_at", "finalizing_at", "completed_at", "failed_at",
        "cancelled_at", "error",
    }  # fmt: skip
    assert fields <= set(entry) <= set(view)
    assert json.loads(json.dumps(view)) == view
