"""Probes of real workers: one that is deaf, one that is stuck, one that drains."""

import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import RedisServer, free_port
from system import Cluster, children, simple_job

from orchestrator.broker import make_celery, publish
from orchestrator.contract import Hint
from orchestrator.ledger import QUEUE


@pytest.fixture
def cluster(redis_server: RedisServer, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


class Probed:
    """A worker that is asked as Kubernetes asks it."""

    def __init__(self, cluster: Cluster, **environment: str) -> None:
        self.port = free_port()
        self.process = cluster.start("impatient_worker", BLIP_METRICS_PORT=str(self.port), **environment)

    def ask(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode().strip()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode().strip()
        except OSError as error:
            return 0, str(error)

    def until(self, path: str, status: int, text: str, seconds: float = 30) -> None:
        deadline, seen = time.monotonic() + seconds, (0, "")
        while time.monotonic() < deadline:
            seen = self.ask(path)
            if seen[0] == status and re.fullmatch(text, seen[1]):
                return
            time.sleep(0.02)
        raise AssertionError(seen)


def test_a_worker_that_does_not_hear_its_queue_is_unwell_until_it_does(cluster: Cluster) -> None:
    worker = Probed(cluster)
    worker.until("/readyz", 503, "starting")
    worker.until("/readyz", 200, "ok")
    with make_celery(cluster.settings) as app:
        app.control.cancel_consumer(QUEUE)  # as if its connection were half closed
        deadline = time.monotonic() + 20
        while cluster.ledger.queue_length() == 0:  # until one is left lying
            publish(app, [Hint("job-none", 0, "plan", 0, 1000, 0, 10)])
            time.sleep(0.3)
            assert time.monotonic() < deadline
        assert worker.ask("/healthz") == (200, "ok")
        worker.until("/healthz", 503, r"hints wait, and none was taken for \d+ s")
        app.control.add_consumer(QUEUE)
        worker.until("/healthz", 200, "ok")
    assert cluster.ledger.queue_length() == 0


def test_a_worker_whose_work_does_not_move_is_unwell(cluster: Cluster, tmp_path: Path) -> None:
    worker = Probed(cluster, BLIP_ENGINE_TIMEOUT_SECONDS="60")
    cluster.start_orchestrator()
    cluster.submit(simple_job(tmp_path / "job", 3, prompt="order:hang"), tmp_path / "out", chunk_rows=3)
    worker.until("/healthz", 503, r"no row of 1 chunks in hand was done for \d+ s")
    assert worker.ask("/readyz") == (200, "ok")


def test_a_slow_load_of_a_model_is_no_reason_to_end_the_worker_whoever_waits(cluster: Cluster, tmp_path: Path) -> None:
    # Few slots: what the engine holds already is soon done, and then all wait.
    worker = Probed(cluster, BLIP_ENGINE_TIMEOUT_SECONDS="60", BLIP_MODEL_TIMEOUT_SECONDS="60", BLIP_SLOTS="8")
    cluster.start_orchestrator()
    resident = cluster.submit(simple_job(tmp_path / "a", 120, prompt="order:slow"), tmp_path / "a/out", chunk_rows=120)
    cluster.until(resident.id, lambda _: cluster.ledger.in_flight(resident.id)[0] > 0)
    other = cluster.folder / "other"
    other.mkdir()
    order = (other / "order:load slowly", cluster.model / "order:load slowly")
    order[0].touch()
    slow = cluster.submit(simple_job(tmp_path / "b", 3), tmp_path / "b/out", model=str(other))
    well_while_it_loads(worker, other)  # one chunk waits for its model, and the other, whose model is there, too
    order[1].touch()
    (engine,) = children(worker.process.pid, "engine")
    engine.kill()
    order[0].unlink()
    well_while_it_loads(worker, cluster.model)  # both models are loaded anew, and nobody asked for it
    order[1].unlink()
    for job in (resident, slow):
        assert cluster.until_ended(job.id).status == "completed"


def test_a_worker_takes_no_hint_and_is_not_ready_before_its_models_are_resident(
    cluster: Cluster, tmp_path: Path
) -> None:
    order = cluster.model / "order:load slowly"
    order.touch()
    worker = Probed(cluster, BLIP_PRELOAD=f"vqa:absent,caption:{cluster.model}", BLIP_MODEL_TIMEOUT_SECONDS="60")
    cluster.start_orchestrator()
    spec = cluster.submit(simple_job(tmp_path / "job", 20), tmp_path / "out")
    well_while_it_loads(worker, cluster.model)
    assert worker.ask("/readyz") == (503, "starting")
    cluster.until(spec.id, lambda state: state.status == "in_progress")
    assert cluster.ledger.in_flight(spec.id)[1] == 0  # nothing is leased
    order.unlink()
    worker.until("/readyz", 200, "ok")
    assert cluster.until_ended(spec.id).status == "completed"
    log = (cluster.folder / "impatient_worker-0.log").read_text()
    assert "BLIP_PRELOAD=vqa:absent is not loaded: model 'absent': no such directory" in log  # and it goes on


def well_while_it_loads(worker: Probed, model: Path) -> None:
    deadline = time.monotonic() + 30
    while not (model / "loading").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    deadline = time.monotonic() + 2.5  # well above the patience with work that does not move
    while time.monotonic() < deadline:
        assert worker.ask("/healthz") == (200, "ok")
        time.sleep(0.1)


def test_a_worker_that_drains_is_well_and_not_ready(cluster: Cluster, tmp_path: Path) -> None:
    worker = Probed(cluster, BLIP_DRAIN_SECONDS="20")
    cluster.start_orchestrator()
    rows = simple_job(tmp_path / "job", 200, prompt="order:slow")
    spec = cluster.submit(rows, tmp_path / "out", chunk_rows=100)
    deadline = time.monotonic() + 30
    while cluster.ledger.in_flight(spec.id)[0] == 0:  # at work
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker.process.terminate()
    worker.until("/readyz", 503, "draining", seconds=5)
    assert worker.ask("/healthz") == (200, "ok")
    assert worker.process.wait(25) == 0
