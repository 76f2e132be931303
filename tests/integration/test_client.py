"""The Python client and the commands over HTTP: the same as through Redis."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from api import TOKEN, at_work, serving
from conftest import make_bucket
from harness import write_manifest
from mini_worker import MiniWorker
from servers import MotoServer, RedisServer, free_port
from test_cli import blip_batch, one_line_error

from orchestrator import client
from orchestrator.client import BlipBatch, Job
from orchestrator.control import Controller
from orchestrator.errors import ApiUnavailable, JobConflict, Unauthorized, UnknownJob, UsageError
from orchestrator.settings import Settings
from orchestrator.storage import open_store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "allowed").mkdir()
    return tmp_path / "allowed"


@pytest.fixture
def url(settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An API that BLIP_API_URL and BLIP_API_TOKEN point at; commands cannot reach Redis."""
    with serving(settings, allowed_folders=(str(folder),)) as url:
        monkeypatch.setenv("BLIP_API_URL", url)
        monkeypatch.setenv("BLIP_API_TOKEN", TOKEN)
        monkeypatch.setenv("BLIP_REDIS_URL", "redis://127.0.0.1:1/0")
        yield url


@pytest.fixture
def blip(url: str) -> Iterator[BlipBatch]:
    with BlipBatch() as blip:
        yield blip


def a_job(blip: BlipBatch, folder: Path, rows: int = 25) -> Job:
    manifest = write_manifest(folder, rows, lambda n: n % 10 == 3)
    return blip.submit(manifest, "caption", folder / "out", model="demo", chunk_rows=10)


def test_a_job_from_its_submission_to_its_results(
    blip: BlipBatch, settings: Settings, controller: Controller, folder: Path
) -> None:
    job, looks = a_job(blip, folder), []
    with pytest.raises(JobConflict, match="its results are whole once it is completed"):
        job.results()
    with at_work(controller, MiniWorker(settings)):
        done = job.wait(looks.append, timeout=30, pause=0.01)
        assert (done.status, done.request_counts.failed, done.errors) == ("completed", 3, {"image_not_found": 3})
        assert looks[-1] == done
        assert {look.status for look in looks} <= {"validating", "in_progress", "finalizing", "completed"}
        assert [record["row"] for record in job.errors()] == [3, 13, 23]
        for n in (3, 13):
            (folder / f"mended-bad-{n}.png").touch()
        done = job.retry().wait(timeout=30, pause=0.01)
    assert (done.round, done.request_counts.completed) == (1, 24)
    records = list(job.results())
    assert [record["row"] for record in records] == list(range(25))
    assert [record["row"] for record in records if record["error"]] == [23]
    assert blip.backlog().model_dump() == {"rows": 0, "chunks": 0, "desired_workers": 0}
    assert [known.id for known in blip.jobs()] == [job.id] == [blip.job(job.id).id]


def test_the_changes_of_a_job(blip: BlipBatch, settings: Settings, controller: Controller, folder: Path) -> None:
    job = a_job(blip, folder)
    with pytest.raises(JobConflict, match="only a job that is in_progress can be paused"):
        job.pause()
    with at_work(controller):
        while job.status().status != "in_progress":
            time.sleep(0.01)
        assert job.pause().status().status == "paused"
        assert job.resume().status().status == "in_progress"
        assert job.cancel().wait(pause=0.01).status == "cancelled"
    with pytest.raises(TimeoutError, match="is validating"):
        job.resume().wait(timeout=0.05, pause=0.01)


def test_events_go_on_when_the_server_is_replaced(settings: Settings, controller: Controller, folder: Path) -> None:
    port = free_port()
    changes = {"allowed_folders": (str(folder),), "api_port": port}
    seen = []
    with BlipBatch(f"http://127.0.0.1:{port}", TOKEN) as blip:
        with serving(settings, **changes):
            job = a_job(blip, folder)
            events = job.events()
            seen.append(next(events).status)
            following = threading.Thread(target=lambda: seen.extend(event.status for event in events))
            following.start()
            time.sleep(0.3)
        time.sleep(0.5)
        assert following.is_alive()
        with serving(settings, **changes), at_work(controller, MiniWorker(settings)):
            following.join(30)
    assert (seen[0], seen[-1]) == ("validating", "completed")


def test_what_the_server_refuses_has_its_type(blip: BlipBatch, url: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownJob, match="job-0 is not known"):
        blip.job("job-0")
    for odd in ("", "../jobs", "x/y", "jöb"):
        with pytest.raises(UnknownJob):
            blip.job(odd)
    with pytest.raises(UsageError, match="unknown task 'paint'"):
        blip.submit("s3://b/m", "paint", "s3://b/o")
    with pytest.raises(UsageError, match="BLIP_ALLOWED_FOLDERS"):
        blip.submit(write_manifest(tmp_path, 3), "caption", folder / "out")
    a_job(blip, folder)
    with pytest.raises(JobConflict, match="is writing here"):
        blip.submit(folder / "rows.jsonl", "embed", folder / "out", model="demo")
    with BlipBatch(url, "wrong") as stranger, pytest.raises(Unauthorized, match="set BLIP_API_TOKEN") as refused:
        stranger.job("job-0")
    assert "wrong" not in str(refused.value).replace("wrong token", "")


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="BLIP_API_URL"):
        BlipBatch()
    for nonsense in ("ftp://x", "x:80", "http://", "http://x\ny", "http://x:port"):
        with pytest.raises(UsageError, match="BLIP_API_URL"):
            BlipBatch(nonsense)
    monkeypatch.setattr(client, "FIRST_SECONDS", 0.3)
    with BlipBatch(f"http://127.0.0.1:{free_port()}") as blip, pytest.raises(ApiUnavailable, match="does not answer"):
        blip.job("job-1")


def test_another_server_is_told_from_an_api(s3_server: MotoServer) -> None:
    with BlipBatch(s3_server.endpoint) as blip, pytest.raises(UsageError, match="not as a blip-batch API"):
        blip.job("job-1")


def test_a_server_that_is_away_is_waited_for(settings: Settings, folder: Path, redis_server: RedisServer) -> None:
    port = free_port()
    changes = {"allowed_folders": (str(folder),), "api_port": port}
    with BlipBatch(f"http://127.0.0.1:{port}", TOKEN, patience=20) as blip:
        with serving(settings, **changes):
            job = a_job(blip, folder)
        restarted = threading.Event()

        def restart() -> None:
            time.sleep(0.5)
            with serving(settings, **changes):
                restarted.wait(20)

        again = threading.Thread(target=restart)
        again.start()
        assert job.status().status == "validating"  # asked again until it is there
        redis_server.pause()  # a change may have happened: it is not sent twice
        redis_server.resume()
        assert a_job(blip, folder).id == job.id
        restarted.set()
        again.join()


# The commands, as processes that cannot reach Redis.


def test_the_commands_over_http(url: str, settings: Settings, controller: Controller, folder: Path) -> None:
    write_manifest(folder, 25, lambda n: n % 10 == 3)
    given = [
        "submit", folder / "rows.jsonl", "--task", "caption", "--output", folder / "out", "--model", "demo",
        "--chunk-rows", 10, "--option", "num_beams=1", "--weight", 2,
    ]  # fmt: skip
    job = blip_batch(*given).stdout.strip()
    assert re.fullmatch(r"job-[0-9a-f]{20}", job)
    with at_work(controller, MiniWorker(settings)):
        waited = blip_batch(*given, "--wait")
    assert (waited.returncode, waited.stdout, waited.stderr) == (3, f"{job}\n", "")
    _, line = blip_batch("list").stdout.splitlines()
    assert line.split()[:4] == [job, "completed", "caption", "25/25"]
    view = json.loads(blip_batch("status", job, "--json").stdout)
    assert (view["options"], view["weight"], view["errors"]) == ({"num_beams": 1}, 2, {"image_not_found": 3})
    assert "25 of 25" in blip_batch("status", job).stdout
    records = [json.loads(line) for line in blip_batch("errors", job, "--json").stdout.splitlines()]
    assert [record["row"] for record in records] == [3, 13, 23]
    assert [line.split()[1] for line in blip_batch("errors", job, "--limit", 2).stdout.splitlines()] == ["3", "13"]
    watched = blip_batch("watch", job)
    assert watched.returncode == 3
    for text in (job, "completed", "25 of 25", "image_not_found", "worker", "mini"):
        assert text in watched.stdout
    for command in ("pause", "cancel", "resume"):
        one_line_error(blip_batch(command, job), f"job {job} is completed")
    assert blip_batch("retry", job).stdout == f"{job} round 1: 3 rows\n"
    assert blip_batch("cancel", job).stdout == f"{job} cancelling\n"


def test_rows_that_are_half_text(
    url: str, blip: BlipBatch, settings: Settings, controller: Controller, folder: Path
) -> None:
    """A lone surrogate is JSON, as an escape: it comes through the API, and no command stumbles over it."""
    rows = [{"image": f"bad-{n}-\ud800-é.png", "note": "\udfff"} for n in range(3)] + [{"image": "img.png"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = blip.submit(folder / "rows.jsonl", "caption", folder / "out", model="demo")
    with at_work(controller, MiniWorker(settings)):
        assert job.wait(timeout=30, pause=0.05).request_counts.failed == 3
    records = list(job.errors())
    assert [record["image"] for record in records] == [row["image"] for row in rows[:3]]
    assert [record["input"] for record in records] == [{"note": "\udfff"}] * 3
    for environment in ({}, {"BLIP_API_URL": "", "BLIP_REDIS_URL": settings.redis_url}):
        lines = blip_batch("errors", job.id, "--json", **environment).stdout.splitlines()
        assert [json.loads(line)["image"] for line in lines] == [row["image"] for row in rows[:3]]
        text = blip_batch("errors", job.id, **environment)
        assert text.returncode == 0
        assert "bad-0-\\ud800-é.png" in text.stdout


def test_the_shell_completes_job_ids_over_http(url: str, blip: BlipBatch, folder: Path) -> None:
    job = a_job(blip, folder).id
    done = blip_batch(
        _BLIP_BATCH_COMPLETE="complete_bash", COMP_WORDS="blip-batch status job", COMP_CWORD="2"
    )  # fmt: skip
    assert done.stdout.split() == [job]


def test_commands_refuse_in_one_line(url: str, folder: Path) -> None:
    one_line_error(blip_batch("status", "job-1"), "job job-1 is not known")
    one_line_error(blip_batch("list", BLIP_API_TOKEN="wrong"), "set BLIP_API_TOKEN")
    one_line_error(blip_batch("list", BLIP_API_TOKEN=""), "set BLIP_API_TOKEN")
    one_line_error(blip_batch("list", BLIP_API_URL="http://127.0.0.1:1"), "does not answer")
    one_line_error(blip_batch("list", BLIP_API_URL="127.0.0.1:80"), "write http://host:port")
    submit = ("submit", "s3://b/m", "--output", "s3://b/o", "--task")
    one_line_error(blip_batch(*submit, "paint"), "unknown task 'paint'; the tasks are: caption")
    one_line_error(blip_batch(*submit, "caption", "--option", "beams=3"), "has no option 'beams'")
    one_line_error(blip_batch(*submit, "caption", "--weight", "0"), "weight=0")
    one_line_error(blip_batch(*submit, "caption", "--option", "length_penalty=NaN"), "must be a finite number")
    one_line_error(blip_batch("submit", "s3://b/\udcff", *submit[2:], "caption"), "is not text in UTF-8")
    one_line_error(blip_batch("submit", "rows.jsonl", "--output", folder, "--task", "vqa"), "BLIP_ALLOWED_FOLDERS")


def test_submit_without_an_api_goes_through_redis(
    settings: Settings, controller: Controller, tmp_path: Path, redis_server: RedisServer
) -> None:
    manifest = write_manifest(tmp_path, 20)
    given = ("submit", manifest, "--task", "caption", "--output", tmp_path / "out", "--model", "demo", "--wait")
    with at_work(controller, MiniWorker(settings)):
        done = blip_batch(*given)
    assert done.returncode == 0, done.stderr
    assert controller.ledger.jobs() == [done.stdout.strip()]
    one_line_error(blip_batch(*given[:-1], "--results", "xml"), "unknown format of results 'xml'")
    one_line_error(blip_batch(*given[:-1], "--option", "length_penalty=NaN"), "must be a finite number")
    one_line_error(blip_batch("submit", "s3://b/\udcff", *given[2:]), "is not text in UTF-8")
    one_line_error(blip_batch(*given[:-1], "--results", "parquet"), "holds a job with")


def of_docstring(url: str) -> str:
    assert client.__doc__ is not None
    found = re.search(r"\n\n((    .*\n|\n)+)", client.__doc__)
    assert found is not None
    code = "\n".join(line[4:] for line in found[1].splitlines())
    return code.replace('"http://127.0.0.1:8080", token', f"{url!r}, {TOKEN!r}")


def of_the_docs(_: str) -> str:
    section = (Path(__file__).parents[2] / "docs/http-api.md").read_text().split("## From Python")[1]
    return section.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("example", [of_docstring, of_the_docs])
def test_the_examples_run(
    url: str, settings: Settings, controller: Controller, s3_server: MotoServer, capsys: pytest.CaptureFixture[str],
    example: Callable[[str], str],
) -> None:  # fmt: skip
    """Word for word."""
    make_bucket("photos")
    store = open_store("s3://photos")
    rows = "".join(json.dumps({"image": f"s3://photos/{'bad' if n == 2 else 'img'}-{n}.png"}) + "\n" for n in range(4))
    store.put("rows.jsonl", rows.encode())
    with at_work(controller, MiniWorker(settings)):
        exec(compile(example(url), "example", "exec"), {})
    said = capsys.readouterr().out
    assert "4 of 4" in said
    assert "s3://photos/img-3.png {'caption': 's3://photos/img-3.png'" in said


def test_the_client_needs_no_server_packages() -> None:
    """FastAPI and uvicorn are of the server alone."""
    code = "import sys, orchestrator.client; print({'fastapi', 'uvicorn', 'celery'} & set(sys.modules) or '')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == ""
