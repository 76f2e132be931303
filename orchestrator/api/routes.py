"""The routes of /v1, each a call of `jobs` or `lifecycle`. They run in threads; only the stream of events waits."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from time import monotonic
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Query, Request, Response, Security
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from .. import lifecycle
from ..contract import ENDED, to_line
from ..errors import RedisUnavailable, UnknownJob
from ..jobs import check_remote, make_spec, submit
from ..ledger import Ledger
from ..settings import Settings
from .models import Backlog, ErrorPage, JobDetail, JobPage, RetryBegun, Submission
from .problems import responses

LOOK_SECONDS: Final = 0.5  # between two looks at a job whose events are streamed
HEARTBEAT_SECONDS: Final = 15.0  # proxies close connections that are silent for longer
NDJSON: Final = "application/x-ndjson"
_MOST_JOBS: Final = 1000  # of a page

JobId = Annotated[str, Path(description="the job's id")]
#: For the document; `guard` has looked at the token before anything else.
_BEARER: Final = HTTPBearer(auto_error=False, scheme_name="token", description="BLIP_API_TOKEN")


class Routes:
    """The handlers and what they work with."""

    def __init__(self, ledger: Ledger, settings: Settings, stopping: Callable[[], bool]) -> None:
        self._ledger, self._settings, self._stopping = ledger, settings, stopping

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", dependencies=[Security(_BEARER)])
        add = router.add_api_route
        add("/jobs", self.submit, methods=["POST"], status_code=201, response_model=JobDetail, summary="Submit a job",
            responses={200: {"description": "The job is known, and goes on", "model": JobDetail},
                       **responses(409, 413, 422)})  # fmt: skip
        add("/jobs", self.jobs, methods=["GET"], response_model=JobPage, summary="All jobs, the oldest first",
            responses=responses(404, 422))  # fmt: skip
        add("/jobs/{job}", self.job, methods=["GET"], response_model=JobDetail, summary="A job",
            responses=responses(404))  # fmt: skip
        for name, action in (("cancel", self.cancel), ("pause", self.pause), ("resume", self.resume)):
            add(f"/jobs/{{job}}/{name}", action, methods=["POST"], response_model=JobDetail,
                summary=f"{name.capitalize()} a job", responses=responses(404, 409))  # fmt: skip
        add("/jobs/{job}/retry", self.retry, methods=["POST"], response_model=RetryBegun,
            summary="Do the failed rows again, in a new round", responses=responses(404, 409, 422))  # fmt: skip
        add("/jobs/{job}/errors", self.errors, methods=["GET"], response_model=ErrorPage,
            summary="The rows that failed so far",
            responses={200: {"content": {NDJSON: {"schema": {"type": "string"}}}, "description": "error records"},
                       **responses(404, 409, 422)})  # fmt: skip
        add("/jobs/{job}/events", self.events, methods=["GET"], response_class=StreamingResponse,
            summary="The job whenever it changes, until it has ended, as server-sent events",
            responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}},
                             "description": "`event: job`, `data:` a job"}, **responses(404)})  # fmt: skip
        add("/backlog", self.backlog, methods=["GET"], response_model=Backlog,
            summary="What is left to do, and the workers for it", responses=responses(422))  # fmt: skip
        return router

    def submit(self, submission: Submission, response: Response) -> dict[str, Any]:
        """Idempotent: the id is made of what is asked for, so the same body again goes on with the same job."""
        check_remote(submission.manifest, submission.output, submission.model, self._settings)
        spec = make_spec(**submission.model_dump())
        known = self._ledger.spec(spec.id) is not None
        job = submit(self._ledger, spec, self._settings)
        response.status_code = 200 if known else 201
        response.headers["Location"] = f"/v1/jobs/{job}"
        return self.job(job)

    def jobs(
        self,
        after: Annotated[str | None, Query(description="a job's id; the page begins with the next one")] = None,
        limit: Annotated[int, Query(ge=1, le=_MOST_JOBS)] = 100,
    ) -> dict[str, Any]:
        known = self._ledger.jobs()
        if after is not None and after not in known:
            raise UnknownJob(f"after={after[:80]}: no such job")
        begin = 0 if after is None else known.index(after) + 1
        chosen = known[begin : begin + limit]
        more = begin + limit < len(known)
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

    def errors(
        self,
        job: JobId,
        request: Request,
        first_row: Annotated[int, Query(ge=0, lt=2**53)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Any:
        """Only a row's latest outcome counts. Go on while `next_row` is not null, also after a short page.

        With `Accept: application/x-ndjson` all of them, one a line; a body that does not end properly is not whole.
        """
        if NDJSON in request.headers.get("accept", ""):
            records = lifecycle.errors(self._ledger, self._settings, job, first_row)
            return StreamingResponse(map(to_line, records), media_type=NDJSON)
        data, next_row = lifecycle.error_page(self._ledger, self._settings, job, first_row, limit)
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

    def backlog(
        self,
        model: Annotated[
            list[str] | None, Query(description="only jobs that workers with BLIP_MODELS=these take; repeatable")
        ] = None,
        without_model: Annotated[
            list[str] | None,
            Query(description="only jobs that no pool of these (A+B) takes; one for each pool"),
        ] = None,
    ) -> dict[str, Any]:
        """For autoscalers: chunks in flight and jobs that are not planned yet count, so it is 0 at the end only."""
        found = lifecycle.backlog(self._ledger, self._settings, model or (), without_model or ())
        return asdict(found)


def _event(view: dict[str, Any]) -> bytes:
    return f"event: job\ndata: {json.dumps(view)}\n\n".encode()
