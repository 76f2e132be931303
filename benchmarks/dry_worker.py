"""A worker without loaders and engine, for measuring everything else: `python -m benchmarks.dry_worker`.

Hints, leases, reading and parsing of rows, grouping by image, the rule of what images may be read, results as records,
parts and commits are a worker's own code. Only the time between "this image" and "its result" is left out.
"""

import os
import socket
import sys
import threading
from queue import LifoQueue
from typing import Any

from blip_engine.requests import Answer, Caption, Match, Result, Task
from orchestrator.collector import collect_rarely
from orchestrator.ledger import QUEUE
from orchestrator.settings import Settings, load_settings
from workers import app
from workers.leases import Held
from workers.messages import Checkpoint
from workers.openjob import OpenJob
from workers.pipeline import ChunkRun
from workers.worker import Worker

_RESULTS: dict[Task, Result] = {
    "caption": Caption("a photograph of a dog on a beach", -0.5123, (2023, 1997, 1037, 3899, 2006, 1037, 3509, 102)),
    "vqa": Answer("a dog", -0.25),
    "itm": Match(0.75, 0.5, 1.0),
}


class _DryLane:
    """In place of a thread's share of loaders and engine: every row has the same result, at once."""

    def run(self, chunk: ChunkRun) -> list[dict[str, Any]]:
        result = _RESULTS[chunk.job.task]
        for flight in chunk.flights():
            chunk.finish(flight.rows, dict.fromkeys(flight.texts(), result))
        chunk.check()
        return chunk.records


class DryWorker(Worker):
    """A worker without children."""

    def __init__(self, settings: Settings, name: str) -> None:
        super().__init__(settings, name)
        self._lanes = LifoQueue()
        for _ in range(settings.worker_threads):
            self._lanes.put(_DryLane())  # type: ignore[arg-type]

    def start(self) -> None:
        self.ledger.ping()
        self._keeper.start()

    def _checkpoint(self, job: OpenJob, held: Held) -> Checkpoint:  # noqa: ARG002 -- as the worker's
        if job.checkpoint is None:
            job.report(self.ledger, Checkpoint("dry", "dry", None, "0" * 64, (384, 384)))
            self._presence["models"] = [job.spec.model]
        assert job.checkpoint is not None
        return job.checkpoint


def main() -> int:
    """Work until SIGTERM."""
    settings = load_settings()
    name = f"dry-{socket.gethostname()}-{os.getpid()}"
    worker = DryWorker(settings, name)
    worker.start()
    collect_rarely()
    threading.Thread(target=app._end_when_faulty, args=(worker,), daemon=True).start()
    app._consume(app.make_app(settings, worker), settings, name, [QUEUE])
    worker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
