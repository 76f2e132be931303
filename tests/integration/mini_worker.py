"""A worker without a model, for tests of the orchestrator: it takes real hints and writes real parts.

As a program: `python mini_worker.py NAME SECONDS_PER_CHUNK` works until it is killed.
"""

import sys
import time
from pathlib import Path
from queue import Empty

from orchestrator.broker import QUEUE, make_celery
from orchestrator.contract import BadRow, Hint, JobSpec, Row, error_row, result_row
from orchestrator.errors import JobError, RedisUnavailable
from orchestrator.ledger import Lease, Ledger
from orchestrator.parts import describe, part_key, put_part
from orchestrator.plan import load_plan
from orchestrator.rounds import numbers_to_do
from orchestrator.settings import Settings, load_settings
from orchestrator.storage import open_store

WEIGHTS = "f" * 64


def record(row: Row | BadRow, spec: JobSpec) -> dict[str, object]:
    """Images named `bad…` fail until a file `mended-…` is there, all others have a result that names them."""
    if isinstance(row, BadRow):
        return error_row(row, spec.task, row.code, row.message)
    name = row.image.rpartition("/")[2]
    if name.startswith("bad") and not (Path(spec.manifest).parent / f"mended-{name}").exists():
        return error_row(row, spec.task, "image_not_found", f"{row.image} does not exist")
    return result_row(row, spec.task, {"caption": row.image, "score": -0.5, "tokens": 3})


class MiniWorker:
    """Takes hints one at a time, on the caller's thread."""

    def __init__(self, settings: Settings, name: str = "mini") -> None:
        self.settings, self.name = settings, name
        self.ledger = Ledger.connect(settings)
        self.app = make_celery(settings)
        self.outcomes: list[str] = []  # of each hint: done, busy, gone, or committed
        self.worked: list[int] = []  # numbers of the rows that were computed

    def take(self) -> Hint | None:
        """Pops and acknowledges one hint, if there is one."""
        with self.app.connection_for_read() as connection:
            queue = connection.SimpleQueue(QUEUE)
            try:
                message = queue.get(block=False)
            except Empty:
                return None
            finally:
                queue.close()
            message.ack()
            return Hint.from_message(message.payload[0][0])

    def start(self, hint: Hint) -> Lease | str:
        self.ledger.worker_seen(self.name, {"slots": 1})
        return self.ledger.acquire(hint, self.name)

    def finish(self, hint: Hint) -> bool:
        """HEAD, compute, PUT, commit. True when this call was the one that counted."""
        spec = self.ledger.spec(hint.job)
        assert spec is not None
        store = open_store(spec.output, self.settings)
        plan = load_plan(store, self.settings)
        assert plan is not None
        info = describe(store, part_key(hint.chunk, hint.round, plan.results), hint.plan)
        if info is None:
            self.ledger.report_model(hint.job, {"source": spec.model, "weights_sha256": WEIGHTS})
            rows = plan.read_rows(hint.as_chunk(), spec.task)
            numbers = [row.number for row in rows]
            if hint.round:
                numbers = numbers_to_do(store, hint.as_chunk(), hint.round, hint.todo, plan.results)
            records = [record(row, spec) for row in rows if row.number in numbers]
            self.worked += numbers
            info = put_part(store, hint, records, WEIGHTS, numbers, plan.results)
        return self.ledger.commit(hint, info.rows - info.failed, info.failed, info.codes)

    def work(self, hint: Hint, seconds: float = 0.0) -> None:
        lease = self.start(hint)
        if isinstance(lease, str):
            self.outcomes.append(lease)
            return
        time.sleep(seconds)
        try:
            self.finish(hint)
        except JobError as error:
            self.ledger.set_status(hint.job, "failed", error={"code": error.code, "message": str(error)})
        self.outcomes.append("committed")


def main() -> None:
    worker = MiniWorker(load_settings(), sys.argv[1])
    while True:
        try:
            hint = worker.take()
            if hint is None:
                time.sleep(0.02)
            else:
                worker.work(hint, float(sys.argv[2]))
        except RedisUnavailable:
            time.sleep(0.2)
        except Exception as error:  # kombu's many connection errors: a test worker just tries again
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            time.sleep(0.2)


if __name__ == "__main__":
    main()
