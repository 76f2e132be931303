"""What goes over the wire, as OpenAPI tells it."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from blip_engine.requests import JOB_TASKS

from ..contract import FORMATS, RESULT_FORMATS, Status

_Count = Annotated[int, Field(ge=0)]


def _one_of(names: tuple[str, ...]) -> dict[str, Any]:
    """Told in the document, and checked by `jobs.make_spec`, whose message lists them all."""
    return {"enum": list(names)}


class Submission(BaseModel):
    """A job to do. The same one again goes on with it; another one on the same output is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    manifest: str = Field(description="s3:// URI of a manifest, or of a prefix of images (with / at its end)")
    task: str = Field(json_schema_extra=_one_of(JOB_TASKS))
    output: str = Field(description="s3:// prefix for the results; it belongs to this job alone")
    model: str | None = Field(None, description="hub repository[@revision], or demo; left out: the task's default")
    manifest_format: str | None = Field(
        None, description="instead of detection",
        json_schema_extra={"anyOf": [{"type": "string", **_one_of(FORMATS)}, {"type": "null"}]},
    )  # fmt: skip
    columns: dict[str, str] = Field(default_factory=dict, description="our key -> the manifest's name for it")
    results: str = Field(
        "jsonl", description="what the parts are written as", json_schema_extra=_one_of(RESULT_FORMATS)
    )
    options: dict[str, Any] = Field(default_factory=dict, description="of the task")
    chunk_rows: int | None = Field(None, ge=1, le=10_000, description="rows of a part; left out: chosen")
    max_error_ratio: float = Field(0.5, ge=0, le=1, description="the job stops above it, after 1,000 rows")
    weight: float = Field(1.0, gt=0, le=1000, description="its share of the workers, against other jobs' weights")


class RequestCounts(BaseModel):
    """Rows in finished parts."""

    total: _Count
    completed: _Count
    failed: _Count


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class Job(BaseModel):
    """A job. Times are Unix seconds; what is not known (yet) is null."""

    id: str
    task: str
    model: str
    manifest: str
    output: str
    options: dict[str, Any]
    status: Status
    round: _Count = Field(description="0: all rows; above: a retry, of those that had no result before")
    weight: float
    request_counts: RequestCounts
    rows_done: _Count = Field(description="the rows behind us, those inside of chunks at work too")
    rows_per_second: float | None = Field(description="a moving average")
    eta_seconds: float | None
    estimated_cost: float | None = Field(
        description="when done, where a price of workers is set; so far, where no time is left to tell"
    )
    workers: float = Field(description="at work for it")
    created_at: float | None
    in_progress_at: float | None
    finalizing_at: float | None
    completed_at: float | None
    failed_at: float | None
    cancelled_at: float | None
    error: JobError | None
    notice: str | None = Field(description="why it waits, where that is known")


class JobDetail(Job):
    """A job, its failed rows by code, and the workers that are live."""

    errors: dict[str, int]
    live_workers: dict[str, dict[str, Any]]


class JobPage(BaseModel):
    """Some of the jobs, in order of their creation."""

    data: list[Job]
    next: str | None = Field(description="`after` for the next page; null: there is none")


class JobQuery(BaseModel):
    """Which page of the jobs."""

    model_config = ConfigDict(extra="forbid")

    after: str | None = Field(None, description="a job's id; the page begins with the next one")
    limit: int = Field(100, ge=1, le=1000)


class RetryBegun(BaseModel):
    """The round of a retry."""

    round: int = Field(ge=1)
    rows: int | None = Field(ge=1, description="that have no result yet; null: they are being counted")
    job: JobDetail


class RecordError(BaseModel):
    """Why a row failed."""

    code: str
    message: str


class ErrorRecord(BaseModel):
    """A row that failed, as in the results."""

    row: _Count
    id: str | int | float | None
    image: str | None
    task: str
    result: None
    error: RecordError
    input: dict[str, Any]


class ErrorPage(BaseModel):
    """Some of the failed rows, in manifest order. A page may hold fewer than asked for though more follow."""

    data: list[ErrorRecord]
    next_row: int | None = Field(description="`first_row` of the next page; null: that was all")


class ErrorQuery(BaseModel):
    """Which page of the failed rows."""

    model_config = ConfigDict(extra="forbid")

    first_row: int = Field(0, ge=0, lt=2**53)
    limit: int = Field(100, ge=1, le=1000)


class BacklogQuery(BaseModel):
    """Of which jobs. Both are repeatable, and a value may name several models (A+B)."""

    model_config = ConfigDict(extra="forbid")

    model: list[str] = Field(
        default_factory=list,
        description="only jobs that workers with BLIP_MODELS=these take, and of busy workers these",
    )
    without_model: list[str] = Field(
        default_factory=list,
        description="only jobs that no pool of these (A+B) takes, and of busy workers those without BLIP_MODELS; "
        "one for each pool",
    )


class Backlog(BaseModel):
    """What is left to do, in flight or not. 0 only when nothing is left."""

    rows: _Count
    chunks: _Count
    desired_workers: _Count


class SpeedQuery(BaseModel):
    """Of what."""

    model_config = ConfigDict(extra="forbid")

    task: str
    model: str = Field(description="as jobs have it")


class Speed(BaseModel):
    """What a worker does, as last measured."""

    rows_per_second: float | None = Field(description="null: no job of this task and model has run yet")


class Health(BaseModel):
    """`ok`, or what is wrong."""

    status: str


class Problem(BaseModel):
    """RFC 9457. `code` is stable, and `type` the same as a URI; `detail` is one line for people."""

    type: str = Field(examples=["urn:blip-batch:problem:unknown_job"])
    title: str
    status: int
    code: str
    detail: str
