"""The routes of /v1, each a call of `jobs` or `lifecycle`. They run in threads; only the stream of events waits."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from functools import partial
from time import monotonic
from typing import Annotated, Any, Final

from fastapi import FastAPI, Path, Query, Request, Response, Security
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from .. import lifecycle
from ..contract import ENDED, to_line
from ..errors import RedisUnavailable, UnknownJob
from ..jobs import make_spec, submit
from ..ledger import Ledger
from ..settings import Settings
from .models import (
    Backlog,
    BacklogQuery,
    ErrorPage,
    ErrorQuery,
    JobDetail,
    JobPage,
    JobQuery,
    RetryBegun,
    Speed,
    SpeedQuery,
    Submission,
)  # fmt: skip
from .problems import responses

LOOK_SECONDS: Final = 0.5  # between two looks at a job whose events are streamed
HEARTBEAT_SECONDS: Final = 15.0  # proxies close connections that are silent for longer
NDJSON: Final = "application/x-ndjson"
JobId = Annotated[str, Path(description="the job's id")]
#: For the document; `guard` has looked at the token before anything else.
_BEARER: Final = HTTPBearer(auto_error=False, scheme_name="token", description="BLIP_API_TOKEN")


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


#: An event of the stream.
_EVENT: Final = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"const": "job"},
        "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": _reference(JobDetail)},
    },
}


class Routes:
    """The handlers and what they work with."""

    def __init__(self, ledger: Ledger, settings: Settings, stopping: Callable[[], bool]) -> None:
        self._ledger, self._settings, self._stopping = ledger, settings, stopping

    def add_to(self, app: FastAPI) -> None:
        add = partial(app.add_api_route, dependencies=[Security(_BEARER)])
        add("/v1/jobs", self.submit, methods=["POST"], status_code=201, response_model=JobDetail,
            summary="Submit a job",
            responses={200: {"description": "The job is known, and goes on", "model": JobDetail},
                       **responses(400, 409, 413, 422)})  # fmt: skip
        add("/v1/jobs", self.jobs, methods=["GET"], response_model=JobPage, summary="All jobs, the oldest first",
            responses=responses(404, 422))  # fmt: skip
        add("/v1/jobs/{job}", self.job, methods=["GET"], response_model=JobDetail, summary="A job",
            responses=responses(404))  # fmt: skip
        for name, action in (("cancel", self.cancel), ("pause", self.pause), ("resume", self.resume)):
            add(f"/v1/jobs/{{job}}/{name}", action, methods=["POST"], response_model=JobDetail,
                summary=f"{name.capitalize()} a job", responses=responses(404, 409))  # fmt: skip
        add("/v1/jobs/{job}/retry", self.retry, methods=["POST"], response_model=RetryBegun,
            summary="Do the failed rows again, in a new round", responses=responses(404, 409, 422))  # fmt: skip
        add("/v1/jobs/{job}/errors", self.errors, methods=["GET"], response_model=ErrorPage,
            summary="The rows that failed so far",
            responses={200: {"content": {NDJSON: {"schema": {"type": "string"}}}, "description": "a page"},
                       **responses(404, 409, 422)})  # fmt: skip
        add("/v1/jobs/{job}/events", self.events, methods=["GET"], response_class=StreamingResponse,
            summary="The job whenever it changes, until it has ended, as server-sent events",
            responses={200: {"content": {"text/event-stream": {"schema": _EVENT}}, "description": "jobs"},
                       **responses(404)})  # fmt: skip
        add("/v1/backlog", self.backlog, methods=["GET"], response_model=Backlog,
            summary="What is left to do, and the workers for it", responses=responses(422))  # fmt: skip
        add("/v1/speed", self.speed, methods=["GET"], response_model=Speed,
            summary="What one worker does of a task and model", responses=responses(422))  # fmt: skip

    def submit(self, submission: Submission, response: Response) -> dict[str, Any]:
        """Idempotent: the id is made of what is asked for, so the same body again goes on with the same job."""
        spec = make_spec(**submission.model_dump(), remote=self._settings)
        known = self._ledger.state(spec.id) is not None
        job = submit(self._ledger, spec, self._settings)
        response.status_code = 200 if known else 201
        response.headers["Location"] = f"/v1/jobs/{job}"
        return self.job(job)

    def jobs(self, query: Annotated[JobQuery, Query()]) -> dict[str, Any]:
        known, after = self._ledger.jobs(), query.after
        if after is not None and after not in known:
            raise UnknownJob(f"after={after[:80]}: no such job")
        begin = 0 if after is None else known.index(after) + 1
        chosen = known[begin : begin + query.limit]
        more = begin + query.limit < len(known)
        data = lifecycle.list_jobs(self._ledger, self._settings, chosen)
        return {"data": data, "next": chosen[-1] if more else None}

    def job(self, job: JobId) -> dict[str, Any]:
        return lifecycle.read_status(self._ledger, self._settings, job)

    def cancel(self, job: JobId) -> dict[str, Any]:
        """It ends as soon as its workers let go; finished parts stay."""
        lifecycle.cancel(self._ledger, job)
        return self.job(job)

    def pause(self, job: JobId) -> dict[str, Any]:
        """Nothing more is handed out until it is resumed; workers let go of what they have begun."""
        lifecycle.pause(self._ledger, job)
        return self.job(job)

    def resume(self, job: JobId) -> dict[str, Any]:
        """Goes on with a job that is paused, cancelled or failed, from its finished parts."""
        lifecycle.resume(self._ledger, job)
        return self.job(job)

    def retry(self, job: JobId) -> dict[str, Any]:
        """The job must have ended. What has a result is neither fetched nor computed again."""
        begun = lifecycle.retry(self._ledger, self._settings, job)
        return {**asdict(begun), "job": self.job(job)}

    def errors(self, job: JobId, request: Request, query: Annotated[ErrorQuery, Query()]) -> Any:
        """Only a row's latest outcome counts. Go on while `next_row` is not null, also after a short page.

        With `Accept: application/x-ndjson` all of them, one a line; a body that does not end properly is not whole.
        """
        if NDJSON in request.headers.get("accept", ""):
            records = lifecycle.errors(self._ledger, self._settings, job, query.first_row)
            return StreamingResponse(map(to_line, records), media_type=NDJSON)
        data, next_row = lifecycle.error_page(self._ledger, self._settings, job, query.first_row, query.limit)
        return {"data": data, "next_row": next_row}

    def events(self, job: JobId) -> Response:
        """The first event comes at once; then one whenever anything changes, and a comment when nothing does."""
        first = self.job(job)
        return StreamingResponse(
            self._events(job, first), media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )  # fmt: skip

    async def _events(self, job: str, view: dict[str, Any]) -> AsyncIterator[bytes]:
        shown, spoke = view, monotonic()
        yield _event(view)
        while view["status"] not in ENDED and not self._stopping():
            await asyncio.sleep(LOOK_SECONDS)
            try:
                view = await run_in_threadpool(self.job, job)
            except (RedisUnavailable, UnknownJob):  # waited out: a job that Redis lost is rebuilt
                view = shown
            if view != shown:
                shown, spoke = view, monotonic()
                yield _event(view)
            elif monotonic() - spoke >= HEARTBEAT_SECONDS:
                spoke = monotonic()
                yield b": still here\n\n"

    def backlog(self, query: Annotated[BacklogQuery, Query()]) -> dict[str, Any]:
        """For autoscalers: chunks in flight and jobs that are not planned yet count, so it is 0 at the end only."""
        return asdict(lifecycle.backlog(self._ledger, self._settings, query.model, query.without_model))

    def speed(self, query: Annotated[SpeedQuery, Query()]) -> dict[str, Any]:
        """For estimates: rows / (workers * rows_per_second) seconds."""
        return {"rows_per_second": lifecycle.speed(self._ledger, self._settings, query.task, query.model)}


def _event(view: dict[str, Any]) -> bytes:
    return f"event: job\ndata: {json.dumps(view)}\n\n".encode()
