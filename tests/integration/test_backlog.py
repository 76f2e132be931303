"""`GET /v1/backlog` through the life of jobs: the number that an autoscaler follows."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api import http, serving
from harness import advance, caption_spec, ended, write_manifest
from mini_worker import MiniWorker

from orchestrator import lifecycle
from orchestrator.contract import Hint
from orchestrator.control import Controller
from orchestrator.jobs import make_spec, submit
from orchestrator.ledger import Ledger
from orchestrator.settings import Settings


@pytest.fixture
def api(settings: Settings) -> Iterator[httpx.Client]:
    with serving(settings, backlog_seconds=10.0, max_workers=7) as url, http(url) as client:
        yield client


def numbers(api: httpx.Client, **params: Any) -> tuple[int, int, int]:
    answer = api.get("/v1/backlog", params=params)
    assert answer.status_code == 200
    assert list(answer.json()) == ["rows", "chunks", "desired_workers"]
    return tuple(answer.json().values())  # type: ignore[return-value]


def test_never_zero_while_anything_is_left_and_zero_at_the_end(
    api: httpx.Client, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    assert numbers(api) == (0, 0, 0)
    job = submit(controller.ledger, caption_spec(write_manifest(tmp_path, 200), tmp_path / "out"), settings)
    assert numbers(api) == (1, 1, 1)  # its manifest was not read yet, and a worker is asked for
    advance(controller, job, lambda state: state.status == "in_progress")
    assert numbers(api) == (200, 20, 1)  # planned; the speed is not known
    worker, seen = MiniWorker(settings), []
    for _ in range(20):  # a hint is taken and leased, and worked at: all the while its rows are left
        hint = None
        while hint is None:
            controller.step()
            hint = worker.take()
        lease = worker.start(hint)
        assert not isinstance(lease, str)
        seen.append(numbers(api))
        worker.finish(hint)
    assert [rows for rows, _, _ in seen] == list(range(200, 0, -10))
    assert [chunks for _, chunks, _ in seen] == list(range(20, 0, -1))
    assert all(desired >= 1 for _, _, desired in seen)
    advance(controller, job, ended)
    assert numbers(api) == (0, 0, 0)


def test_the_formula_with_an_observed_speed_and_workers_at_work(
    api: httpx.Client, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    ledger = controller.ledger
    job = submit(ledger, caption_spec(write_manifest(tmp_path, 300), tmp_path / "out"), settings)
    advance(controller, job, lambda state: state.status == "in_progress")
    ledger._redis.hset("blip:speeds", "caption demo", "5")  # rows/s of one slot
    for worker in ("a", "b"):
        ledger.worker_seen(worker, {"slots": 2, "models": [], "only": []})
    assert numbers(api) == (300, 30, 3)  # 300 rows / (5 rows/s x 2 slots) / 10 s
    ledger._redis.hset("blip:speeds", "caption demo", "1")
    assert numbers(api) == (300, 30, 7)  # 15, but BLIP_MAX_WORKERS
    ledger._redis.hset("blip:speeds", "caption demo", "1000")
    assert numbers(api) == (300, 30, 1)
    helpers = [MiniWorker(settings, name) for name in ("a", "b", "c")]
    for helper in helpers:
        controller.step()
        hint = helper.take()
        assert hint is not None
        helper.start(hint)
    assert numbers(api) == (300, 30, 3)  # those who hold chunks stay


def test_what_is_paused_or_cancelled_counts_while_workers_hold_it(
    api: httpx.Client, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    ledger = controller.ledger
    for stop, end in itertools.product((lifecycle.pause, lifecycle.cancel), ("release", "finish")):
        folder = tmp_path / f"{stop.__name__}-{end}"
        folder.mkdir()
        job = submit(ledger, caption_spec(write_manifest(folder, 50), folder / "out"), settings)
        advance(controller, job, lambda state: state.status == "in_progress")
        worker, hint = MiniWorker(settings), None
        while hint is None or hint.job != job:
            controller.step()
            hint = worker.take()
        lease = worker.start(hint)
        assert not isinstance(lease, str)
        stop(ledger, job)
        assert numbers(api) == (10, 1, 1)
        if end == "release":
            ledger.release(lease)
        else:
            worker.finish(hint)
        assert numbers(api) == (0, 0, 0)
        lifecycle.cancel(ledger, job) if stop is lifecycle.pause else None
        advance(controller, job, ended)
    lifecycle.resume(ledger, job)
    assert numbers(api)[2] == 1  # its parts are being counted


def test_pools_ask_for_their_own_jobs(
    api: httpx.Client, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    for model, rows in (("demo", 10), ("owner/a", 20), ("owner/b", 40)):
        folder = tmp_path / model
        folder.mkdir(parents=True)
        submit(controller.ledger, caption_spec(write_manifest(folder, rows), folder / "out", model=model), settings)
    for _ in range(100):
        controller.step()
        if numbers(api)[0] == 70:
            break
    assert numbers(api) == (70, 7, 1)
    assert numbers(api, model=["owner/a"])[:2] == (20, 2)
    assert numbers(api, model=["owner/a", "owner/b"])[:2] == (60, 6)
    assert numbers(api, without_model=["owner/a"])[:2] == (50, 5)
    assert numbers(api, model=["owner/none"]) == (0, 0, 0)


def hold(ledger: Ledger, job: str, *workers: str) -> None:
    """Each of the workers has a lease of the job."""
    state = ledger.state(job)
    assert state is not None
    assert state.plan is not None
    for chunk, worker in enumerate(workers):
        lease = ledger.acquire(Hint(job, chunk, state.plan, 0, 0, 10 * chunk, 10), worker)
        assert not isinstance(lease, str)


def test_busy_workers_are_those_of_the_pool_that_asks(
    api: httpx.Client, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    """Else each of two pools would want the workers of both, and next time those that came of it, up to its bound."""
    ledger = controller.ledger
    for name, only in {"any-1": [], "any-2": [], "a-1": ["owner/a"], "b-1": ["owner/b", "owner/c"]}.items():
        ledger.worker_seen(name, {"slots": 2, "models": [], "only": only})
    job = submit(ledger, caption_spec(write_manifest(tmp_path, 60), tmp_path / "out", model="owner/a"), settings)
    advance(controller, job, lambda state: state.status == "in_progress")
    hold(ledger, job, "any-1", "any-2", "a-1", "b-1")  # `any` began before a worker of the pool was there
    assert numbers(api) == (60, 6, 4)
    assert numbers(api, model=["owner/a"]) == (60, 6, 1)
    assert numbers(api, model=["owner/b+owner/c"]) == (0, 0, 1)
    assert numbers(api, without_model=["owner/a", "owner/b+owner/c"]) == (0, 0, 2)  # they are not taken away


def test_a_worker_that_fell_silent_with_chunks_is_of_the_pool_of_its_job(
    api: httpx.Client, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    ledger = controller.ledger
    ledger.worker_seen("a-1", {"slots": 2, "models": [], "only": ["owner/a"]})
    job = submit(ledger, caption_spec(write_manifest(tmp_path, 60), tmp_path / "out", model="owner/a"), settings)
    advance(controller, job, lambda state: state.status == "in_progress")
    hold(ledger, job, "a-1", "gone-1", "gone-2")
    assert numbers(api, model=["owner/a"]) == (60, 6, 3)
    assert numbers(api, without_model=["owner/a"]) == (0, 0, 0)


def test_a_job_of_two_models_belongs_to_a_pool_with_both(
    api: httpx.Client, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path, 10)
    spec = make_spec(str(manifest), "capfilt", str(tmp_path / "out"), model="owner/a+owner/b")
    submit(controller.ledger, spec, settings)
    for _ in range(100):
        controller.step()
        if numbers(api)[0] == 10:
            break
    assert numbers(api, model=["owner/a+owner/b"])[0] == 10
    assert numbers(api, model=["owner/b", "owner/a", "owner/c"])[0] == 10
    assert numbers(api, model=["owner/a"]) == (0, 0, 0)
    assert numbers(api, without_model=["owner/a", "owner/b"])[0] == 10  # neither pool could do it alone
    assert numbers(api, without_model=["owner/a+owner/b"]) == (0, 0, 0)
