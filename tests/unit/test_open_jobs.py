"""The jobs that a worker has open, which its threads share."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.contract import Hint
from orchestrator.settings import load_settings
from workers.openjob import OpenJob
from workers.worker import Worker

HINT = Hint("job-1", 0, "plan", 0, 10, 0, 1)


class Cleared(dict[Any, Any]):
    """Another thread makes room after each look: CPython of today would let it only between calls."""

    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        self.clear()
        return found

    def get(self, key: object, default: Any = None) -> Any:
        found = super().get(key, default)
        self.clear()
        return found


@pytest.fixture
def worker() -> Iterator[Worker]:
    """One that was not started."""
    worker = Worker(load_settings(slots=2), "w")
    yield worker
    worker.close()


def test_a_job_is_open_though_another_thread_makes_room_for_its_own(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenJob, "of", lambda _ledger, hint, _settings: SimpleNamespace(of=hint.job))
    job = worker._open(HINT)
    worker._jobs = Cleared(worker._jobs)
    assert worker._open(HINT) is job


def test_few_jobs_stay_open(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(OpenJob, "of", lambda _ledger, hint, _settings: opened.append(hint.job) or SimpleNamespace())
    for n in (*range(20), 19):
        worker._open(Hint(f"job-{n}", 0, "plan", 0, 10, 0, 1))
    assert opened == [f"job-{n}" for n in range(20)]
    assert len(worker._jobs) == 4
