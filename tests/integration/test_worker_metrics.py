"""What a real worker tells Prometheus: as much as it did, whatever dies, and no series more for hostile input."""

import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from servers import RedisServer, free_port
from system import Cluster, children, records, simple_job, write_images, write_rows

from orchestrator.contract import ERROR_CODES
from orchestrator.ledger import Lease
from orchestrator.settings import Settings
from workers.metrics import CHUNK_OUTCOMES, FAMILIES
from workers.worker import Worker

Samples = dict[tuple[str, ...], float]


@pytest.fixture
def cluster(redis_server: RedisServer, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


class Scraped:
    """A worker with its endpoint."""

    def __init__(self, cluster: Cluster, **environment: str) -> None:
        self.port = free_port()
        self.process = cluster.start_worker(BLIP_METRICS_PORT=str(self.port), **environment)

    def get(self, path: str = "/metrics") -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def read(self) -> Samples:
        """(name, values of its labels in the order of their names) -> value."""
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(self.get()[1])
            for sample in family.samples
            if sample.name.startswith("blip_")
        }

    def until(self, holds: Callable[[Samples], bool], seconds: float = 30) -> Samples:
        deadline, found = time.monotonic() + seconds, Samples()
        while time.monotonic() < deadline:
            try:
                found = self.read()
            except OSError:  # it starts
                time.sleep(0.05)
                continue
            if holds(found):
                return found
            time.sleep(0.05)
        raise AssertionError(found)


def until_ready(worker: Scraped, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if worker.get("/readyz")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError("never ready")


def no_counter_fell(before: Samples, after: Samples) -> None:
    fell = {
        key: (value, after.get(key))
        for key, value in before.items()
        if key[0].endswith(("_total", "_count", "_sum", "_bucket")) and after.get(key, 0.0) < value
    }
    assert not fell


def test_they_are_equal_to_what_the_job_did(cluster: Cluster, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 20)
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    rows: list[dict[str, object]] = [{"image": f"images/{n}.png", "id": n} for n in range(20)]
    rows += [
        {"image": "images/absent.png"},
        {"image": "images/absent-2.png"},
        {"image": "images/broken.png"},
        {"id": 1},
    ]
    manifest = write_rows(tmp_path / "rows.jsonl", rows)  # type: ignore[arg-type]
    cluster.start_orchestrator()
    worker = Scraped(cluster)
    spec = cluster.submit(manifest, tmp_path / "out", "caption", chunk_rows=5)
    state = cluster.until_ended(spec.id)
    assert (state.completed, state.failed) == (20, 4)

    found = worker.until(lambda found: found["blip_chunks_total", "committed"] == 5)
    assert found["blip_rows_total", "completed", "caption"] == 20
    assert found["blip_rows_total", "failed", "caption"] == 4
    errors = {key[1]: value for key, value in found.items() if key[0] == "blip_row_errors_total" and value}
    assert errors == cluster.ledger.error_codes(spec.id)
    assert found["blip_chunk_seconds_count",] == 5
    assert found["blip_fetch_seconds_count",] == 23  # the row without an image asks for none
    assert found["blip_decode_seconds_count",] == 21
    sizes = sum(path.stat().st_size for path in (tmp_path / "images").iterdir())
    assert found["blip_fetch_bytes_total",] == sizes
    assert found["blip_batch_rows_sum", "caption"] == 20
    assert found["blip_engine_seconds_count", "vision", "caption"] == found["blip_batch_rows_count", "caption"] >= 1
    assert found["blip_engine_queue_rows",] == found["blip_worker_chunks",] == 0
    assert found["blip_engine_restarts_total",] == found["blip_loader_restarts_total",] == 0
    assert abs(found["blip_last_progress_timestamp_seconds",] - time.time()) < 60
    assert [key for key in found if key[0] == "blip_worker_info"] == [("blip_worker_info", *_info(worker))]


def _info(worker: Scraped) -> list[str]:
    (family,) = (f for f in text_string_to_metric_families(worker.get()[1]) if f.name == "blip_worker_info")
    labels = family.samples[0].labels
    assert {"device": "auto", "precision": "auto", "models": ""}.items() <= labels.items()
    return list(labels.values())


def test_killed_children_take_no_counts_along(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_orchestrator()
    worker = Scraped(cluster)
    manifest = simple_job(tmp_path, 120, prompt="order:slow")
    spec = cluster.submit(manifest, tmp_path / "out", chunk_rows=10)
    before = worker.until(lambda found: found["blip_chunks_total", "committed"] >= 1)
    for what, counter in (("engine", "blip_engine_restarts_total"), ("loader", "blip_loader_restarts_total")):
        for child in children(worker.process.pid, what):
            child.send_signal(signal.SIGKILL)
        now = worker.until(lambda found, counter=counter: found[counter,] >= 1)  # type: ignore[misc]
        no_counter_fell(before, now)
        before = now
    state = cluster.until_ended(spec.id)
    assert state.completed == 120
    after = worker.until(lambda found: found["blip_rows_total", "completed", "caption"] == 120)
    no_counter_fell(before, after)
    assert after["blip_batch_rows_sum", "caption"] >= 120  # some were computed twice


def test_hostile_input_adds_no_series(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_orchestrator()
    worker = Scraped(cluster)
    first = cluster.submit(simple_job(tmp_path, 5), tmp_path / "first")
    cluster.until_ended(first.id)
    before = worker.until(lambda found: found["blip_chunks_total", "committed"] >= 1).keys()

    for number in range(3):
        folder = tmp_path / f'job{number}"}} 1\nblip_evil{{x="'
        rows = [
            {"image": f'{n}\n".png', "id": f'{{code="{n}"}}', "prompt": f"\x00{n}" * 10, "custom": "x" * 1000}
            for n in range(20)
        ]
        folder.mkdir()
        write_images(folder, 3)
        rows += [{"image": f"{n}.png", "id": n, "prompt": "order:raise"} for n in range(3)]
        manifest = write_rows(folder / "rows.jsonl", rows)
        model = cluster.model / f'{number}"}}'
        model.mkdir()
        spec = cluster.submit(manifest, folder / "out", chunk_rows=4, model=str(model))
        cluster.until_ended(spec.id)
        records(folder / "out")
    after = worker.until(lambda found: found["blip_row_errors_total", "internal"] >= 9).keys()
    assert after == before
    assert len(after) < 150


def test_a_part_of_strangers_adds_no_series() -> None:
    from orchestrator.parts import PartInfo  # noqa: PLC0415
    from orchestrator.settings import load_settings  # noqa: PLC0415
    from workers.metrics import WorkerMetrics  # noqa: PLC0415

    metrics = WorkerMetrics(load_settings())
    before = {(s.name, *s.labels.values()) for m in metrics.registry.collect() for s in m.samples}
    metrics.committed("caption", PartInfo(0, 9, 9, "0" * 64, 'evil=3,image_not_found=x,fetch_failed=2,"=4,=,,a'), 1.0)
    found = {(s.name, *s.labels.values()): s.value for m in metrics.registry.collect() for s in m.samples}
    assert found.keys() == before
    assert found["blip_row_errors_total", "fetch_failed"] == 2
    assert found["blip_row_errors_total", "internal"] == 3 + 4


def test_progress_is_that_of_the_chunk_that_stands_still(settings: Settings) -> None:
    worker = Worker(settings, "w")
    try:
        leases = [Lease("job-1", chunk, "plan", 0, 1, 1, "w") for chunk in range(2)]
        with worker._keeper.holding(leases[0], 0.0) as stuck, worker._keeper.holding(leases[1], 0.0) as moving:
            stuck.moved -= 700
            moving.done(5)
            worker.metrics.chunk("dropped")
            assert _progress(worker) == pytest.approx(time.time() - 700, abs=60)
            stuck.done(1)
            assert _progress(worker) == pytest.approx(time.time(), abs=60)
        assert _progress(worker) == pytest.approx(time.time(), abs=60)  # idle: when it was last told something
    finally:
        worker.close()


def _progress(worker: Worker) -> float:
    value = worker.metrics.registry.get_sample_value("blip_last_progress_timestamp_seconds")
    assert value is not None
    return value


def test_every_family_but_those_of_a_gpu_is_there_from_the_start(cluster: Cluster) -> None:
    worker = Scraped(cluster)
    until_ready(worker)
    text = worker.get()[1]
    for family in FAMILIES:
        there = f"# TYPE {family.name.removesuffix('_total')}" in text
        assert there == (not family.name.startswith("blip_gpu_")), family.name
    found = worker.read()
    for code in ERROR_CODES:
        assert found["blip_row_errors_total", code] == 0
    for outcome in CHUNK_OUTCOMES:
        assert found["blip_chunks_total", outcome] == 0


def test_probes_and_strange_paths(cluster: Cluster) -> None:
    worker = Scraped(cluster)
    until_ready(worker)
    assert worker.get("/healthz") == (200, "ok\n")
    assert worker.get("/readyz?verbose=1") == (200, "ok\n")
    assert worker.get("/../etc/passwd")[0] == 404
    assert worker.get("/")[0] == 404


def test_it_listens_on_addresses_of_both_kinds(cluster: Cluster) -> None:
    worker = Scraped(cluster, BLIP_METRICS_HOST="::")
    until_ready(worker)  # by 127.0.0.1
    with urllib.request.urlopen(f"http://[::1]:{worker.port}/healthz", timeout=5) as answer:
        assert answer.read() == b"ok\n"


def test_a_port_that_is_taken_is_one_line(cluster: Cluster) -> None:
    worker = Scraped(cluster)
    until_ready(worker)
    other = cluster.start_worker(BLIP_METRICS_PORT=str(worker.port))
    assert other.wait(30) == 1
    (line,) = (cluster.folder / "workers-1.log").read_text().splitlines()
    assert f"BLIP_METRICS_PORT={worker.port}" in line


def test_logs_of_a_worker_and_its_children(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start_orchestrator()
    cluster.start_worker(BLIP_LOG_FORMAT="json", BLIP_API_TOKEN="a-token-that-is-secret")
    spec = cluster.submit(simple_job(tmp_path, 60), tmp_path / "out", chunk_rows=20)
    cluster.until_ended(spec.id)
    process = psutil.Process(cluster.processes[-1].pid)
    process.send_signal(signal.SIGTERM)
    cluster.processes[-1].wait(20)
    text = (cluster.folder / "workers-1.log").read_text()
    # On standard output Celery says a word of its own when it is told to stop; the log is standard error.
    lines = [json.loads(line) for line in text.splitlines() if line and not line.startswith("worker: ")]
    chunks = [line for line in lines if "chunk" in line]
    assert sorted(line["chunk"] for line in chunks) == [0, 1, 2]
    for line in chunks:
        assert line.items() >= {"job": spec.id, "attempt": 1, "rows": 20, "failed": 0, "level": "info"}.items()
    assert len(lines) < 15  # none per row
    assert "a-token-that-is-secret" not in text


def test_logs_of_an_orchestrator(cluster: Cluster, tmp_path: Path) -> None:
    cluster.start("orchestrator", BLIP_LOG_FORMAT="json")
    (tmp_path / "empty.jsonl").touch()
    spec = cluster.submit(tmp_path / "empty.jsonl", tmp_path / "out")
    assert cluster.until_ended(spec.id).status == "failed"
    lines = [json.loads(line) for line in (cluster.folder / "orchestrator-0.log").read_text().splitlines()]
    (failed,) = [line for line in lines if line["level"] == "error"]
    assert failed["job"] == spec.id
    assert "empty.jsonl" in failed["message"]
