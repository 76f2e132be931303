"""The HTTP API over real HTTP: every route, the token, the limits, problems, events, outages."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from api import at_work, body, http, problem, serving, started
from harness import advance, caption_spec, ended, write_manifest
from mini_worker import MiniWorker
from servers import MotoServer, RedisServer

from orchestrator.api.server import ApiServer
from orchestrator.control import Controller
from orchestrator.jobs import submit
from orchestrator.service import STALLED_SECONDS, ailing
from orchestrator.settings import Settings
from orchestrator.storage import open_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the API may read and write."""
    (tmp_path / "allowed").mkdir()
    return tmp_path / "allowed"


@pytest.fixture
def url(settings: Settings, folder: Path) -> Iterator[str]:
    with serving(settings, allowed_folders=(str(folder),)) as url:
        yield url


@pytest.fixture
def api(url: str) -> Iterator[httpx.Client]:
    with http(url) as client:
        yield client


def test_a_job_from_its_submission_to_its_end(
    api: httpx.Client, settings: Settings, controller: Controller, folder: Path
) -> None:
    given = body(folder, options={"num_beams": 1}, weight=2)
    made = api.post("/v1/jobs", json=given)
    assert made.status_code == 201
    job = made.json()["id"]
    assert made.headers["location"] == f"/v1/jobs/{job}"
    assert (made.json()["status"], made.json()["weight"], made.json()["options"]) == ("validating", 2, {"num_beams": 1})
    assert api.post("/v1/jobs", json=given).status_code == 200  # the same job, and no other
    advance(controller, job, ended, MiniWorker(settings))
    view = api.get(f"/v1/jobs/{job}").json()
    assert view["status"] == "completed"
    assert view["request_counts"] == {"total": 25, "completed": 22, "failed": 3}
    assert view["errors"] == {"image_not_found": 3}
    assert view["live_workers"]["mini"]["slots"] == 1
    (entry,) = api.get("/v1/jobs").json()["data"]
    assert entry == {name: value for name, value in view.items() if name not in {"errors", "live_workers"}}


def test_jobs_come_in_pages(
    api: httpx.Client, settings: Settings, controller: Controller, folder: Path, tmp_path: Path
) -> None:
    manifest = write_manifest(folder, 3)
    made = []
    for n in range(5):
        made.append(submit(controller.ledger, caption_spec(manifest, tmp_path / str(n)), settings))
        time.sleep(0.002)  # the order is that of the times, in milliseconds
    first = api.get("/v1/jobs", params={"limit": 3}).json()
    assert [entry["id"] for entry in first["data"]] == made[:3]
    rest = api.get("/v1/jobs", params={"limit": 3, "after": first["next"]}).json()
    assert [entry["id"] for entry in rest["data"]] == made[3:]
    assert rest["next"] is None
    problem(api.get("/v1/jobs", params={"after": "nothing"}), 404, "unknown_job")
    problem(api.get("/v1/jobs", params={"limit": 0}), 422, "invalid", "limit='0'")


def test_pause_resume_cancel_and_retry(
    api: httpx.Client, settings: Settings, controller: Controller, folder: Path
) -> None:
    given = body(folder)
    job = api.post("/v1/jobs", json=given).json()["id"]

    def act(name: str) -> httpx.Response:
        return api.post(f"/v1/jobs/{job}/{name}")

    problem(act("pause"), 409, "conflict", "only a job that is in_progress can be paused")
    problem(act("retry"), 409, "conflict", "wait for its end")
    advance(controller, job, lambda state: state.status == "in_progress")
    problem(act("resume"), 409, "conflict", "only one that is paused, cancelled or failed")
    assert act("pause").json()["status"] == "paused"
    assert act("resume").json()["status"] == "in_progress"
    assert act("cancel").json()["status"] == "cancelling"
    problem(api.post("/v1/jobs", json=given), 409, "conflict", f"job {job} is being cancelled; submit it again")
    advance(controller, job, ended)
    problem(act("cancel"), 409, "conflict", "it has ended already")
    assert act("resume").json()["status"] == "validating"
    worker = MiniWorker(settings)
    advance(controller, job, ended, worker)
    for n in (3, 13):
        (folder / f"mended-bad-{n}.png").touch()
    worker.worked.clear()
    begun = act("retry").json()
    assert (begun["round"], begun["rows"], begun["job"]["id"]) == (1, 3, job)
    advance(controller, job, ended, worker)
    assert worker.worked == [3, 13, 23]
    assert api.get(f"/v1/jobs/{job}").json()["request_counts"] == {"total": 25, "completed": 24, "failed": 1}
    for name in ("cancel", "pause", "resume", "retry"):
        problem(api.post(f"/v1/jobs/job-0/{name}"), 404, "unknown_job", "job-0 is not known")


def test_errors_in_pages_and_as_lines(
    api: httpx.Client, settings: Settings, controller: Controller, folder: Path
) -> None:
    job = api.post("/v1/jobs", json=body(folder, 95)).json()["id"]
    where = f"/v1/jobs/{job}/errors"
    assert api.get(where).json() == {"data": [], "next_row": None}  # not planned yet
    advance(controller, job, ended, MiniWorker(settings))
    rows, next_row = [], 0
    while next_row is not None:
        page = api.get(where, params={"limit": 4, "first_row": next_row}).json()
        assert len(page["data"]) <= 4
        rows += [record["row"] for record in page["data"]]
        next_row = page["next_row"]
    assert rows == [n for n in range(95) if n % 10 == 3]
    assert page["data"][-1]["error"]["code"] == "image_not_found"
    lines = api.get(where, headers={"Accept": "application/x-ndjson"}, params={"first_row": 50})
    assert lines.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line)["row"] for line in lines.text.splitlines()] == [53, 63, 73, 83, 93]
    problem(api.get("/v1/jobs/job-0/errors"), 404, "unknown_job")


def test_errors_are_found_without_reading_what_has_none(
    api: httpx.Client, settings: Settings, controller: Controller, folder: Path
) -> None:
    given = body(folder)
    write_manifest(folder, 60, lambda n: n in {25, 51})
    job = api.post("/v1/jobs", json=given).json()["id"]
    advance(controller, job, ended, MiniWorker(settings))
    for chunk in (0, 1, 3, 4):
        (folder / f"out/results/part-{chunk:08d}.jsonl").write_text("nobody reads this")
    page = api.get(f"/v1/jobs/{job}/errors").json()
    assert [record["row"] for record in page["data"]] == [25, 51]
    (folder / "out/results/part-00000002.jsonl").write_text("but this")
    problem(api.get(f"/v1/jobs/{job}/errors"), 409, "part_unreadable", "part-00000002.jsonl")


def test_events_tell_of_changes_until_the_end(
    api: httpx.Client, settings: Settings, controller: Controller, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.api.routes.LOOK_SECONDS", 0.05)
    monkeypatch.setattr("orchestrator.api.routes.HEARTBEAT_SECONDS", 0.2)
    job = api.post("/v1/jobs", json=body(folder)).json()["id"]
    views, comments = [], 0
    with api.stream("GET", f"/v1/jobs/{job}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines, name = answer.iter_lines(), ""
        for line in lines:
            if line.startswith(":"):
                comments += 1
                if comments == 2:  # nothing has happened so far
                    assert len(views) == 1
                    work = at_work(controller, MiniWorker(settings), 0.1)
                    work.__enter__()
            elif line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                assert name == "job"
                views.append(json.loads(line.removeprefix("data: ")))
    work.__exit__(None, None, None)
    statuses = [view["status"] for view in views]
    assert statuses[0] == "validating"
    assert "in_progress" in statuses
    assert statuses[-1] == "completed"
    assert views[-1]["request_counts"]["failed"] == 3
    problem(api.get("/v1/jobs/job-0/events"), 404, "unknown_job")


def test_events_end_when_the_server_does(settings: Settings, folder: Path) -> None:
    with (
        started(settings, allowed_folders=(str(folder),)) as server,
        http(f"http://127.0.0.1:{server.port}") as api,
    ):
        job = api.post("/v1/jobs", json=body(folder)).json()["id"]
        with api.stream("GET", f"/v1/jobs/{job}/events") as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: job"
            closing = threading.Timer(0.2, server.stop)
            closing.start()
            rest = list(lines)  # ends properly: no error of an incomplete body
            closing.join()
    assert rest[0].startswith("data: ")


def test_two_submissions_with_one_output_never_mix(
    api: httpx.Client, settings: Settings, controller: Controller, folder: Path
) -> None:
    given = body(folder)
    job = api.post("/v1/jobs", json=given).json()["id"]
    other = {**given, "options": {"num_beams": 5}}
    problem(api.post("/v1/jobs", json=other), 409, "conflict", f"job {job} is writing here")
    advance(controller, job, ended, MiniWorker(settings))
    problem(api.post("/v1/jobs", json=other), 409, "conflict", "holds a job with options=")
    again = api.post("/v1/jobs", json={**given, "weight": 9})
    assert (again.status_code, again.json()["id"], again.json()["status"]) == (200, job, "completed")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"task": "paint"}, "unknown task 'paint'; the tasks are: caption, vqa, itm, embed, capfilt"),
        ({"options": {"beams": 3}}, "task 'caption' has no option 'beams'; it has: num_beams"),
        ({"options": {"num_beams": "3"}}, "option 'num_beams' must be a whole number, not '3'"),
        ({"options": {"num_beams": 99}}, "option 'num_beams' must be 1 to 32"),
        ({"results": "xml"}, "unknown format of results 'xml'"),
        ({"manifest_format": "xls"}, "unknown manifest format 'xls'"),
        ({"chunk_rows": 0}, "chunk_rows=0: Input should be greater than or equal to 1"),
        ({"chunk_rows": "10"}, "chunk_rows='10': Input should be a valid integer"),
        ({"weight": 0}, "weight=0: Input should be greater than 0"),
        ({"columns": {"picture": "url"}}, "picture"),
        ({"model": "no such thing"}, "neither an existing directory nor a hub repository"),
        ({"wieght": 2}, "wieght=2: Extra inputs are not permitted"),
        ({"manifest": "ftp://x/y"}, "only s3:// URIs and local paths"),
        ({"manifest": "file:///etc/passwd"}, "only s3:// URIs and local paths"),
        ({"manifest": "s3://"}, "names no bucket"),
        ({"output": "s3:///x"}, "names no bucket"),
        ({"output": "s3://No_Such..Bucket!/x"}, "No_Such..Bucket!"),
        ({"output": "http://x/y"}, "only s3:// URIs and local paths"),
    ],
)
def test_what_cannot_be_right_is_said_in_one_line(
    api: httpx.Client, s3_server: MotoServer, folder: Path, change: dict[str, Any], says: str
) -> None:
    answer = api.post("/v1/jobs", json={**body(folder), **change})
    problem(answer, 422, answer.json()["code"], says)
    assert answer.json()["code"] in {"invalid", "storage_failed"}
    assert api.get("/v1/jobs").json()["data"] == []


def test_an_outage_of_redis_is_503_and_passes(api: httpx.Client, redis_server: RedisServer) -> None:
    redis_server.kill()
    try:
        for path in ("/v1/jobs", "/v1/jobs/job-1", "/v1/backlog", "/readyz"):
            answer = api.get(path)
            problem(answer, 503, "redis_unavailable", "check BLIP_REDIS_URL")
            assert int(answer.headers["retry-after"]) > 0
        assert api.get("/healthz").status_code == 200  # this process is well
    finally:
        redis_server.start()
    assert api.get("/readyz").status_code == 200


def test_a_control_loop_that_is_stuck_is_told(settings: Settings, controller: Controller) -> None:
    for silent, status in ((0.0, 200), (STALLED_SECONDS - 5, 200), (STALLED_SECONDS + 5, 503)):
        controller.stepped_at = time.monotonic() - silent
        server = ApiServer(settings.model_copy(update={"api_port": 0}), lambda: ailing(controller))
        server.start()
        answer = httpx.get(f"http://127.0.0.1:{server.port}/healthz")
        server.close()
        assert answer.status_code == status
    problem(answer, 503, "unhealthy", "the control loop has been stuck for")


@pytest.mark.parametrize("again", range(3))
def test_submissions_at_the_same_moment_never_mix(url: str, controller: Controller, folder: Path, again: int) -> None:
    given = [{**body(folder), "options": {"num_beams": beams}} for beams in (1, 2)] * 6
    together = threading.Barrier(len(given))

    def post(one: dict[str, Any]) -> httpx.Response:
        with http(url) as api:
            together.wait()
            return api.post("/v1/jobs", json=one)

    with ThreadPoolExecutor(len(given)) as pool:
        answers = list(pool.map(post, given))
    accepted = {answer.json()["id"] for answer in answers if answer.is_success}
    assert len(accepted) == 1
    assert controller.ledger.jobs() == list(accepted)
    assert sorted(answer.status_code for answer in answers if not answer.is_success) == [409] * 6


def test_an_output_that_cannot_be_reached(api: httpx.Client, rclone_s3: object, folder: Path) -> None:
    answer = api.post("/v1/jobs", json={**body(folder), "output": "s3://no-such-bucket/x"})
    assert answer.status_code in {201, 422}  # what a store says of a bucket that is not there differs
    store = open_store("s3://blip/taken")
    store.put("job.json", b"not ours")
    answer = api.post("/v1/jobs", json={**body(folder), "output": "s3://blip/taken"})
    problem(answer, 409, "conflict", "is no job of ours")


def test_sigterm_ends_the_orchestrator_cleanly(redis_server: RedisServer, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator"], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "BLIP_API_PORT": "0"},
    )  # fmt: skip
    assert process.stderr is not None
    url = ""
    for line in process.stderr:
        if "API at http" in line:
            url = next(word for word in line.replace('"', " ").replace(",", " ").split() if word.startswith("http"))
            break
    with http(url, None) as api:
        assert api.get("/healthz").status_code == 200
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=20)[1]
    assert process.returncode == 0
    assert "Traceback" not in rest


def test_healthz_answers_while_everybody_waits_for_a_silent_redis(
    api: httpx.Client, url: str, redis_server: RedisServer
) -> None:
    assert api.get("/readyz").status_code == 200
    redis_server.pause()
    with ThreadPoolExecutor(50) as callers:  # more than the server has threads
        try:
            answers = [callers.submit(httpx.get, f"{url}/readyz", timeout=60) for _ in range(50)]
            time.sleep(1)  # they are in
            assert api.get("/healthz", timeout=8).status_code == 200  # Redis' own time-out is 10 s, and tried again
            assert not any(answer.done() for answer in answers)
        finally:
            redis_server.resume()
        assert {answer.result().status_code for answer in answers} == {200}
