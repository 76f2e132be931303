"""The orchestrator's metrics: what the ledger knows, read once for many scrapes, and no series for a job."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import advance, caption_spec, ended, write_manifest
from mini_worker import MiniWorker
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from servers import RedisServer

from orchestrator import metrics
from orchestrator.control import Controller
from orchestrator.jobs import submit
from orchestrator.ledger import Ledger
from orchestrator.metrics import FAMILIES, exposition, make_registry
from orchestrator.settings import Settings


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    ledger = Ledger.connect(settings)
    yield ledger
    ledger.close()


@pytest.fixture
def registry(ledger: Ledger, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    monkeypatch.setattr(metrics, "CACHE_SECONDS", 0.0)
    return make_registry(ledger, settings.model_copy(update={"price_per_worker_hour": 2.5}))


def read(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """(name, label values…) -> value of every sample that is ours."""
    text = exposition(registry)[0].decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("blip_")
    }


def run(controller: Controller, folder: Path, rows: int = 25, name: str = "out") -> str:
    """A whole job, of which every tenth image is missing; its id."""
    manifest = write_manifest(folder, rows, bad=lambda n: n % 10 == 0)
    job = submit(controller.ledger, caption_spec(manifest, folder / name), controller.settings)
    advance(controller, job, ended, MiniWorker(controller.settings))
    return job


def test_a_job_from_its_start_to_its_end(controller: Controller, registry: CollectorRegistry, tmp_path: Path) -> None:
    idle = read(registry)
    assert {name for name, *_ in idle} == {family.name for family in FAMILIES} - {
        "blip_oldest_progress_timestamp_seconds"  # of no job
    }
    assert idle["blip_backlog_rows",] == idle["blip_rows_done_total",] == idle["blip_inflight_chunks",] == 0

    manifest = write_manifest(tmp_path, 25, bad=lambda n: n % 10 == 0)
    spec = caption_spec(manifest, tmp_path / "out")
    job = submit(controller.ledger, spec, controller.settings)
    worker = MiniWorker(controller.settings)
    advance(controller, job, lambda state: state.chunks_done == 1, worker)
    begun = read(registry)
    assert begun["blip_jobs", "in_progress"] == 1
    assert begun["blip_backlog_rows",] == 15
    assert begun["blip_rows_done_total",] == 10
    assert begun["blip_inflight_chunks",] == 2
    assert begun["blip_live_workers",] == 1
    assert begun["blip_desired_workers",] >= 1
    assert abs(begun["blip_oldest_progress_timestamp_seconds",] - time.time()) < 60

    advance(controller, job, ended, worker)
    done = read(registry)
    assert done["blip_jobs", "completed"] == 1
    assert done["blip_rows_done_total",] == 25
    assert done["blip_backlog_rows",] == done["blip_desired_workers",] == done["blip_inflight_chunks",] == 0
    assert done["blip_worker_price_per_hour",] == 2.5


def test_rows_done_never_go_back_whatever_becomes_of_jobs(
    controller: Controller, registry: CollectorRegistry, tmp_path: Path
) -> None:
    seen = []
    for round_number in range(2):  # the second one finds the parts of the first in storage: they count once
        job = run(controller, tmp_path)
        seen.append(read(registry)["blip_rows_done_total",])
        if round_number == 0:
            controller.ledger.set_status(job, "validating")
    assert seen == [25, 25]
    run(controller, tmp_path, name="other")
    assert read(registry)["blip_rows_done_total",] == 50


def test_a_part_whose_worker_died_before_it_counted_is_found(
    controller: Controller, registry: CollectorRegistry, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path, 10)
    job = submit(controller.ledger, caption_spec(manifest, tmp_path / "out"), controller.settings)
    advance(controller, job, lambda state: state.status == "in_progress")
    worker, hint = MiniWorker(controller.settings), None
    while hint is None:
        controller.step()
        hint = worker.take()
    worker.start(hint)
    worker.ledger.commit = lambda *_: False  # type: ignore[method-assign]  # it dies here
    worker.finish(hint)
    advance(controller, job, ended)
    found = read(registry)
    assert found["blip_reconciled_chunks_total", "found"] == 1
    assert found["blip_rows_done_total",] == 10


def test_a_lost_hint_is_handed_out_again(controller: Controller, registry: CollectorRegistry, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, 10)
    job = submit(controller.ledger, caption_spec(manifest, tmp_path / "out"), controller.settings)
    worker = MiniWorker(controller.settings)
    advance(controller, job, lambda state: state.status == "in_progress")
    while worker.take() is None:
        controller.step()
    advance(controller, job, ended, worker)
    assert read(registry)["blip_reconciled_chunks_total", "requeued"] >= 1


def test_without_redis_it_says_so_and_nothing_else(registry: CollectorRegistry, redis_server: RedisServer) -> None:
    assert read(registry)["blip_redis_up",] == 1
    redis_server.kill()
    assert read(registry) == {("blip_redis_up",): 0.0}
    redis_server.start()
    assert read(registry)["blip_redis_up",] == 1


def test_redis_near_its_limit(registry: CollectorRegistry, redis_server: RedisServer) -> None:
    assert read(registry)["blip_redis_memory_ratio",] == 0
    client = redis_server.client()
    try:
        client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 1.2))
        full = read(registry)
    finally:
        client.config_set("maxmemory", 0)
        client.close()
    assert full["blip_redis_memory_ratio",] > 0.7
    assert full["blip_feeder_paused",] == 1


def test_redis_is_read_once_for_scrapes_that_come_together(ledger: Ledger, settings: Settings) -> None:
    registry = make_registry(ledger, settings)
    before = exposition(registry)[0]
    ledger.add_total("rows_done", 5)
    ours = [line for line in before.splitlines() if line.startswith(b"blip_")]
    assert [line for line in exposition(registry)[0].splitlines() if line.startswith(b"blip_")] == ours


def test_jobs_add_no_series(controller: Controller, registry: CollectorRegistry, tmp_path: Path) -> None:
    run(controller, tmp_path)
    before = read(registry).keys()
    for number in range(5):
        run(controller, tmp_path, name=f"out-{number}")
    assert read(registry).keys() == before


def test_openmetrics_for_those_who_ask(registry: CollectorRegistry) -> None:
    body, content_type = exposition(registry, "application/openmetrics-text;version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
