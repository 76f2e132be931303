"""A job that Redis lost, from object storage alone: it goes on, and nothing is done twice."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import FAST
from harness import advance, caption_spec, ended, write_manifest
from mini_worker import MiniWorker
from servers import RedisServer, S3Server
from system import Cluster, simple_job
from test_cli import blip_batch, one_line_error

from orchestrator import lifecycle
from orchestrator.control import Controller
from orchestrator.errors import UnknownJob
from orchestrator.jobs import submit
from orchestrator.recover import recover
from orchestrator.settings import Settings, load_settings
from orchestrator.storage import open_store
from orchestrator.verify import verify


@pytest.fixture
def cluster(redis_server: RedisServer, s3_server: S3Server, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def test_an_empty_redis_and_new_services(cluster: Cluster, redis_server: RedisServer, tmp_path: Path) -> None:
    """Everything dies but the object store; another Redis, orchestrator and worker finish the job."""
    manifest = simple_job(tmp_path / "in", 120)
    worker, orchestrator = cluster.start_worker(), cluster.start_orchestrator()
    spec = cluster.submit(manifest, "s3://blip/out", results="jsonl.gz")
    cluster.until(spec.id, lambda state: state.chunks_done >= 3)
    for process in (worker, orchestrator):
        process.kill()
        process.wait()
    client = redis_server.client()
    client.flushall()
    client.close()
    store = open_store("s3://blip/out")
    before = {info.key: info.etag for info in store.list("results/")}
    cluster.start_orchestrator()
    done = blip_batch("recover", "s3://blip/out", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["id"], found["rows"], found["chunks"], found["round"]) == (spec.id, 120, 12, 0)
    assert found["parts"] == len(before) >= 3
    cluster.start_worker()
    state = cluster.until_ended(spec.id)
    assert (state.status, state.completed) == ("completed", 120)
    assert state.restored >= 30
    assert verify("s3://blip/out").ok
    after = {info.key: info.etag for info in store.list("results/")}
    assert {key: after[key] for key in before} == before


def test_what_is_known_and_complete_stays(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    spec = caption_spec(write_manifest(tmp_path, 25), tmp_path / "out")
    job = submit(controller.ledger, spec, settings)
    advance(controller, job, ended, MiniWorker(settings))
    found = recover(str(tmp_path / "out"), settings)
    assert (found.id, found.parts, found.complete) == (job, 3, True)
    state = controller.ledger.state(job)
    assert state is not None
    assert state.status == "completed"
    text = blip_batch("recover", tmp_path / "out").stdout
    assert text == f"{job}\n3 of 3 parts are there: nothing is left to do\n"


def test_a_job_that_was_never_planned_begins(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    spec = caption_spec(write_manifest(tmp_path, 25), tmp_path / "out")
    advance(controller, submit(controller.ledger, spec, settings), ended, MiniWorker(settings))
    for name in ("plan", "results"):
        shutil.rmtree(tmp_path / "out" / name)
    (tmp_path / "out/summary.json").unlink()
    controller.ledger._redis.flushall()
    found = recover(str(tmp_path / "out"), settings)
    assert (found.id, found.rows, found.complete) == (spec.id, 0, False)
    advance(controller, spec.id, ended, MiniWorker(settings))
    assert verify(str(tmp_path / "out")).ok


def test_mistakes(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    one_line_error(blip_batch("recover", tmp_path), "there is no job.json")
    spec = caption_spec(write_manifest(tmp_path, 5), tmp_path / "out")
    advance(controller, submit(controller.ledger, spec, settings), ended, MiniWorker(settings))
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    one_line_error(blip_batch("recover", tmp_path / "copy"), f"is a copy of the output {tmp_path}/out")
    record = json.loads((tmp_path / "out/job.json").read_text())
    record["spec"]["task"] = "embroider"
    (tmp_path / "out/job.json").write_text(json.dumps(record))
    one_line_error(blip_batch("recover", tmp_path / "out"), "job.json: task")
    (tmp_path / "out/job.json").write_text("[]")
    one_line_error(blip_batch("recover", tmp_path / "out"), "is no job of ours")
    one_line_error(blip_batch("recover", tmp_path / "copy", BLIP_REDIS_URL="redis://127.0.0.1:1/0"), "is a copy")


def test_a_job_that_was_forgotten(redis_server: RedisServer, tmp_path: Path) -> None:
    settings = load_settings(**FAST, job_retention_seconds=0.2)
    controller, worker = Controller(settings), MiniWorker(settings)
    spec = caption_spec(write_manifest(tmp_path, 20, lambda n: n == 3), tmp_path / "out")
    job = submit(controller.ledger, spec, settings)
    advance(controller, job, ended, worker)
    time.sleep(0.3)
    controller._next_forget = 0.0
    controller.step()
    with pytest.raises(UnknownJob, match="recover OUTPUT"):
        lifecycle.read_status(controller.ledger, settings, job)
    assert recover(str(tmp_path / "out"), settings).complete
    advance(controller, job, ended)
    assert len(worker.worked) == 20
    assert lifecycle.retry(controller.ledger, settings, job).rows == 1
    assert advance(controller, job, ended, worker).completed == 19
    assert verify(str(tmp_path / "out")).ok
    controller.close()
