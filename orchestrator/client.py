"""The Python client of the HTTP API.

    from orchestrator.client import BlipBatch

    with BlipBatch("http://127.0.0.1:8080", token) as blip:     # or BLIP_API_URL and BLIP_API_TOKEN
        job = blip.submit("s3://photos/rows.jsonl", "caption", "s3://photos/captions", options={"num_beams": 5})
        done = job.wait(lambda now: print(now.rows_done, "of", now.request_counts.total))
        if done.request_counts.failed:
            done = job.retry().wait()
        for record in job.results():                            # from the output, with this machine's credentials
            print(record["image"], record["result"])

What the server refuses is raised as in its own process: UnknownJob, JobConflict, UsageError, …; and Unauthorized for a
token that is not its own, ApiUnavailable where nobody answers. The message is one line.
"""

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from types import TracebackType
from typing import Any, Final, Self

import httpx

from blip_engine.errors import one_line
from blip_engine.requests import DEMO_MODEL

from .api.models import Backlog, JobDetail
from .contract import ENDED
from .errors import (
    ApiUnavailable,
    BlipBatchError,
    JobConflict,
    JobError,
    StorageError,
    Unauthorized,
    UnknownJob,
    UsageError,
)  # fmt: skip
from .lifecycle import Retry
from .plan import load_plan
from .rounds import latest_records
from .settings import load_settings
from .storage import is_uri, open_store

CONNECT_SECONDS: Final = 5.0
FIRST_SECONDS: Final = 3.0  # as long is asked again at an address that has never answered: it may be wrong
PATIENCE_SECONDS: Final = 60.0  # and so long at one that has: it is being restarted
_SILENCE_SECONDS: Final = 45.0  # of a stream of events: the server speaks every 15
_PASSING: Final = frozenset({429, 502, 503, 504})
_KINDS: Final[Mapping[str, type[BlipBatchError]]] = {
    "unknown_job": UnknownJob, "conflict": JobConflict, "unauthorized": Unauthorized, "forbidden": Unauthorized,
    "storage_failed": StorageError, "invalid": UsageError, "malformed": UsageError, "too_large": UsageError,
}  # fmt: skip


class Api:
    """Requests to one API: JSON in and out, errors by type, patience with restarts.

    A request that changes nothing, or that can be repeated, is sent again while the server is away; one that cannot be
    only where it was surely not received.
    """

    def __init__(self, url: str, token: str = "", *, timeout: float = 60.0, patience: float = PATIENCE_SECONDS) -> None:
        """`timeout`: seconds for one answer. Raises UsageError for a URL that is none."""
        self.url, self._patience, self._reached = url.rstrip("/"), patience, False
        headers = {"User-Agent": f"blip-batch/{version('blip-batch')}"}
        if token and token != "none":  # noqa: S105 -- the word that means that there is none
            headers["Authorization"] = f"Bearer {token}"
        try:
            if not httpx.URL(self.url).host or not self.url.startswith(("http://", "https://")):
                raise UsageError(f"BLIP_API_URL={url}: write http://host:port or https://host")
            self._http = httpx.Client(
                base_url=self.url, headers=headers, timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS)
            )
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise UsageError(f"BLIP_API_URL={url} or BLIP_API_TOKEN cannot be right: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        self._http.close()

    def submit(self, job: Mapping[str, Any]) -> str:
        """Paths become whole ones of this machine: the orchestrator may see the same files."""
        places = {name: _whole(str(job[name])) for name in ("manifest", "output")}
        if job.get("model"):
            places["model"] = "+".join(map(_whole_model, str(job["model"]).split("+")))
        # With what JSON has no words for (NaN, file names that are no text): the server words the refusal.
        body = json.dumps({**job, **places}).encode()
        made = self._ask("POST", "/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        return str(made["id"])  # sent again it is the same job

    def jobs(self) -> Iterator[dict[str, Any]]:
        after: str | None = None
        while True:
            page = self._ask("GET", "/v1/jobs", params={"limit": 500, **({"after": after} if after else {})})
            yield from page["data"]
            after = page["next"]
            if after is None:
                return

    def status(self, job: str) -> dict[str, Any]:
        return self._ask("GET", f"/v1/jobs/{_safe(job)}")

    def change(self, job: str, change: str) -> None:
        self._ask("POST", f"/v1/jobs/{_safe(job)}/{change}", again=False)

    def retry(self, job: str) -> Retry:
        begun = self._ask("POST", f"/v1/jobs/{_safe(job)}/retry", again=False)
        return Retry(begun["round"], begun["rows"])

    def errors(self, job: str) -> Iterator[dict[str, Any]]:
        next_row: int | None = 0
        while next_row is not None:
            page = self._ask("GET", f"/v1/jobs/{_safe(job)}/errors", params={"first_row": next_row, "limit": 1000})
            yield from page["data"]
            next_row = page["next_row"]

    def backlog(self) -> dict[str, Any]:
        return self._ask("GET", "/v1/backlog")

    def speed(self, task: str, model: str) -> float | None:
        found: float | None = self._ask("GET", "/v1/speed", params={"task": task, "model": model})["rows_per_second"]
        return found

    def events(self, job: str) -> Iterator[dict[str, Any]]:
        """The job at once and whenever it changes, until it has ended; a stream that breaks off is taken up again."""
        seen: dict[str, Any] = self.status(job)  # raises for a job that is not known
        yield seen
        while seen["status"] not in ENDED:
            with suppress(httpx.TransportError):  # `status` then waits until the server is back
                for view in self._stream(job):
                    if view != seen:
                        seen = view
                        yield view
            if seen["status"] not in ENDED:
                time.sleep(random.uniform(0.1, 0.5))
                self.status(job)

    def _stream(self, job: str) -> Iterator[dict[str, Any]]:
        timeout = httpx.Timeout(_SILENCE_SECONDS, connect=CONNECT_SECONDS)
        with self._http.stream("GET", f"/v1/jobs/{_safe(job)}/events", timeout=timeout) as answer:
            if answer.status_code != 200:
                return  # `status` tells why
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def _ask(self, method: str, path: str, *, again: bool = True, **request: Any) -> dict[str, Any]:
        """The JSON of an answer. `again`: may be sent twice. Raises BlipBatchError."""
        began, pause = time.monotonic(), 0.1
        while True:
            try:
                answer = self._http.request(method, path, **request)
            except httpx.TransportError as error:
                sent = not isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
                why = f"{self.url} does not answer ({_reason(error)}); is an orchestrator there? See BLIP_API_URL"
            else:
                self._reached, sent = True, True
                if answer.status_code not in _PASSING:
                    return self._read(answer)
                why = f"{self.url}: {_detail(answer)}"
            patience = self._patience if self._reached else min(FIRST_SECONDS, self._patience)
            if (sent and not again) or time.monotonic() - began + pause > patience:
                raise ApiUnavailable(why)
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, 5.0)

    def _read(self, answer: httpx.Response) -> dict[str, Any]:
        try:
            body = answer.json()
        except ValueError:
            body = None
        if not isinstance(body, dict) or not (answer.is_success or "code" in body):
            raise UsageError(f"{self.url} answers {answer.status_code}, and not as a blip-batch API; see BLIP_API_URL")
        if answer.is_success:
            return body
        code, detail = str(body["code"]), str(body.get("detail", ""))
        if code == "unauthorized":
            raise Unauthorized(f"{self.url}: {detail}; set BLIP_API_TOKEN to the orchestrator's")
        if code == "part_unreadable":
            raise JobError(code, detail)
        raise _KINDS.get(code, BlipBatchError)(detail)


class Job:
    """A job at the API."""

    def __init__(self, api: Api, job: str) -> None:
        self.id, self._api = job, api

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    def status(self) -> JobDetail:
        """How it is now."""
        return JobDetail.model_validate(self._api.status(self.id))

    def wait(
        self, progress: Callable[[JobDetail], None] | None = None, *, timeout: float | None = None, pause: float = 1.0
    ) -> JobDetail:
        """The job once it has ended, as completed, failed or cancelled; `progress` gets every look at it until then.

        Raises TimeoutError after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            now = self.status()
            if progress is not None:
                progress(now)
            if now.status in ENDED:
                return now
            if deadline is not None and time.monotonic() + pause > deadline:
                raise TimeoutError(f"job {self.id} is {now.status} after {timeout} s")
            time.sleep(pause)

    def events(self) -> Iterator[JobDetail]:
        """The job at once and whenever it changes, until it has ended."""
        return map(JobDetail.model_validate, self._api.events(self.id))

    def pause(self) -> Self:
        return self._change("pause")

    def resume(self) -> Self:
        return self._change("resume")

    def cancel(self) -> Self:
        return self._change("cancel")

    def _change(self, change: str) -> Self:
        self._api.change(self.id, change)
        return self

    def retry(self) -> Self:
        """Begins a round of the rows without a result. Raises JobConflict where there are none."""
        self._api.retry(self.id)
        return self

    def errors(self) -> Iterator[dict[str, Any]]:
        """The error records so far, in manifest order."""
        return self._api.errors(self.id)

    def results(self) -> Iterator[dict[str, Any]]:
        """A record of each row, in manifest order; read from the output, with this machine's credentials.

        Raises JobConflict before the job is completed, and StorageError.
        """
        now = self.status()
        if now.status != "completed":
            raise JobConflict(f"job {self.id} is {now.status}: its results are whole once it is completed")
        settings = load_settings()
        plan = load_plan(open_store(now.output, settings), settings)
        if plan is None:
            raise JobConflict(f"job {self.id}: nothing is at {now.output} any more, or not for this machine")
        return latest_records(plan)


class BlipBatch:
    """An orchestrator's API; a context manager. Safe from many threads."""

    def __init__(self, url: str | None = None, token: str | None = None, *, patience: float = PATIENCE_SECONDS) -> None:
        """`url`, `token`: instead of BLIP_API_URL and BLIP_API_TOKEN; `patience`: seconds to wait for a server that is
        away. Touches no network. Raises UsageError without a URL.
        """
        settings = load_settings(api_url=url, api_token=token)
        if not settings.api_url:
            raise UsageError("where is the API? Give BlipBatch a URL, or set BLIP_API_URL")
        self._api = Api(settings.api_url, settings.api_token, patience=patience)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        self._api.close()

    def submit(self, manifest: str | os.PathLike[str], task: str, output: str | os.PathLike[str], **more: Any) -> Job:
        """Submits a job, or goes on with it: the same arguments are the same job.

        `more`: what `POST /v1/jobs` takes besides: model, manifest_format, columns, results, options, chunk_rows,
        max_error_ratio, weight. Raises UsageError, and JobConflict where the output belongs to other work.
        """
        given = {"manifest": os.fspath(manifest), "task": task, "output": os.fspath(output), **more}
        return Job(self._api, self._api.submit(given))

    def job(self, job: str) -> Job:
        """A job by its id. Raises UnknownJob."""
        self._api.status(job)
        return Job(self._api, job)

    def jobs(self) -> Iterator[Job]:
        """All jobs, the oldest first."""
        return (Job(self._api, view["id"]) for view in self._api.jobs())

    def backlog(self) -> Backlog:
        """What is left to do of all jobs, and the workers for it."""
        return Backlog.model_validate(self._api.backlog())


def _whole(place: str) -> str:
    """URIs as they are, also misspelt ones, which the server refuses; paths made absolute; a slash at the end stays."""
    if is_uri(place):
        return place
    path = os.path.abspath(os.path.expanduser(place))  # noqa: PTH100, PTH111
    return path + "/" if place.endswith("/") else path


def _whole_model(model: str) -> str:
    """A local directory by its whole path; a hub repository's name, or `demo`, as it is."""
    local = model != DEMO_MODEL and os.path.isdir(os.path.expanduser(model))  # noqa: PTH111, PTH112
    return _whole(model) if local else model


def _safe(job: str) -> str:
    """An id as a part of a path; what cannot be one is not known."""
    if not job or not job.replace("-", "a").isalnum() or not job.isascii():
        raise UnknownJob(f"job {job[:80]} is not known; blip-batch list shows those that are")
    return job


def _reason(error: httpx.TransportError) -> str:
    return one_line(error) or type(error).__name__


def _detail(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, LookupError, TypeError):  # a proxy's own page
        return f"it answers {answer.status_code}"
