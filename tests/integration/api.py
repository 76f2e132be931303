"""What tests of the HTTP API share: a server of it in this process, and a control loop and a worker beside it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from harness import write_manifest
from mini_worker import MiniWorker

from orchestrator.api.server import ApiServer
from orchestrator.control import Controller
from orchestrator.settings import Settings

TOKEN = "a-token-of-tests"


@contextmanager
def serving(settings: Settings, **changes: object) -> Iterator[str]:
    """The URL of an API of `settings`, on a free port, with the token unless `changes` say otherwise."""
    with started(settings, **changes) as server:
        yield f"http://127.0.0.1:{server.port}"


@contextmanager
def started(settings: Settings, **changes: object) -> Iterator[ApiServer]:
    """The same, as the server."""
    chosen = settings.model_copy(update={"api_port": 0, "api_token": TOKEN, **changes})
    server = ApiServer(chosen, lambda: None)
    server.start()
    try:
        yield server
    finally:
        server.close()


def http(url: str, token: str | None = TOKEN) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"} if token else {}, timeout=30)


def body(folder: Path, rows: int = 25, **more: Any) -> dict[str, Any]:
    """A submission; rows whose number ends with 3 fail."""
    manifest = write_manifest(folder, rows, lambda n: n % 10 == 3)
    return {
        "manifest": str(manifest), "task": "caption", "output": str(folder / "out"), "model": "demo", "chunk_rows": 10,
        **more,
    }  # fmt: skip


def problem(answer: httpx.Response, status: int, code: str, says: str = "") -> None:
    """The answer is problem+json as RFC 9457 has it, in one line."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    body = answer.json()
    assert (body["status"], body["code"], body["type"]) == (status, code, f"urn:blip-batch:problem:{code}")
    assert body["title"]
    assert says in body["detail"]
    assert len(body["detail"].splitlines()) == 1


@contextmanager
def at_work(controller: Controller, worker: MiniWorker | None = None, pause: float = 0.0) -> Iterator[None]:
    """The control loop steps, and the worker works, on a thread of their own while the block runs."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            controller.step()
            hint = worker.take() if worker else None
            if worker and hint:
                worker.work(hint, pause)
            stop.wait(0.005)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
