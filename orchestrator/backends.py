"""The two ways to reach the jobs of a cluster: its Redis, or an orchestrator's HTTP API. Commands know of neither."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeAlias

from . import lifecycle
from .client import Api
from .jobs import make_spec, submit
from .ledger import Ledger
from .lifecycle import Retry
from .settings import Settings, load_settings

Change: TypeAlias = Literal["pause", "resume", "cancel"]


class Backend(Protocol):
    """What can be done with jobs. Methods raise BlipBatchError; a job is a mapping, as of `lifecycle.read_status`."""

    def submit(self, job: Mapping[str, Any]) -> str:
        """Submits what `jobs.make_spec` is given, by name; the job's id."""

    def jobs(self) -> Iterator[dict[str, Any]]:
        """All jobs, the oldest first, without `errors` and `live_workers`."""

    def status(self, job: str) -> dict[str, Any]: ...

    def change(self, job: str, change: Change) -> None: ...

    def retry(self, job: str) -> Retry: ...

    def errors(self, job: str) -> Iterator[dict[str, Any]]:
        """The error records so far, in manifest order."""

    def speed(self, task: str, model: str) -> float | None:
        """Rows per second of one worker, as last measured; None: never."""


class RedisBackend:
    """Talks to Redis and to the outputs itself."""

    def __init__(self, ledger: Ledger, settings: Settings) -> None:
        self._ledger, self._settings = ledger, settings

    def submit(self, job: Mapping[str, Any]) -> str:
        return submit(self._ledger, make_spec(**job), self._settings)

    def jobs(self) -> Iterator[dict[str, Any]]:
        return iter(lifecycle.list_jobs(self._ledger, self._settings))

    def status(self, job: str) -> dict[str, Any]:
        return lifecycle.read_status(self._ledger, self._settings, job)

    def change(self, job: str, change: Change) -> None:
        {"pause": lifecycle.pause, "resume": lifecycle.resume, "cancel": lifecycle.cancel}[change](self._ledger, job)

    def retry(self, job: str) -> Retry:
        return lifecycle.retry(self._ledger, self._settings, job)

    def errors(self, job: str) -> Iterator[dict[str, Any]]:
        return lifecycle.errors(self._ledger, self._settings, job)

    def speed(self, task: str, model: str) -> float | None:
        return lifecycle.speed(self._ledger, self._settings, task, model)


@contextmanager
def connected() -> Iterator[Backend]:
    """The back end that the settings name: the API at BLIP_API_URL, else Redis."""
    settings = load_settings()
    if settings.api_url:
        with Api(settings.api_url, settings.api_token) as api:
            yield api
        return
    ledger = Ledger.connect(settings)
    try:
        yield RedisBackend(ledger, settings)
    finally:
        ledger.close()
