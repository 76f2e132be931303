"""The types that cross processes, and the records users read. Names are those of the published contract."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field

from blip_engine.requests import Task

from .errors import UsageError
from .fastjson import dumps

ManifestFormat: TypeAlias = Literal[
    "jsonl",  # one object a line
    "ground-truth",  # SageMaker Ground Truth's augmented manifest: objects with `source-ref`
    "csv",  # with a header
    "tsv",  # with a header
    "s3-batch",  # S3 Batch Operations: headerless bucket,key[,version], keys URL-encoded
    "s3-inventory",  # an S3 Inventory's manifest.json
    "list",  # one image a line
    "parquet",
    "folder",  # or a prefix: every image below it
]
FORMATS: Final[tuple[ManifestFormat, ...]] = get_args(ManifestFormat)

ResultFormat: TypeAlias = Literal["jsonl", "jsonl.gz", "parquet"]
RESULT_FORMATS: Final[tuple[ResultFormat, ...]] = get_args(ResultFormat)

Status: TypeAlias = Literal[
    "validating",  # known; its manifest is being planned, or its state rebuilt from storage
    "in_progress",  # chunks are handed out
    "finalizing",  # every chunk is done; parts are being verified and summed up
    "completed",  # summary.json is there
    "failed",  # stopped by `error`; finished parts stay
    "cancelling",  # asked to stop; workers let go within a lease
    "cancelled",  # stopped on request; finished parts stay
    "paused",  # nothing is handed out until resumed
]
STATUSES: Final[tuple[Status, ...]] = get_args(Status)
ENDED: Final[frozenset[Status]] = frozenset({"completed", "failed", "cancelled"})

ErrorCode: TypeAlias = Literal[
    "image_not_found", "access_denied", "fetch_failed", "fetch_timeout", "image_too_large", "image_unreadable",
    "image_truncated", "unsupported_uri", "uri_not_allowed", "row_invalid", "text_missing", "text_too_long",
    "out_of_memory", "crashed", "internal",
]  # fmt: skip
ERROR_CODES: Final[tuple[ErrorCode, ...]] = get_args(ErrorCode)

#: A hint stays under this many bytes as JSON: rows come from object storage, never through the queue.
HINT_BYTES: Final = 1024


class JobSpec(BaseModel):
    """What a user asked for; frozen, kept in Redis and in the output's job.json. Build it with `jobs.make_spec`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[a-z0-9-]{1,64}$")  # derived from the rest: the same work has the same id
    task: Task
    model: str  # hub repository[@revision], local directory, or "demo"
    manifest: str  # s3:// URI or absolute path
    manifest_format: ManifestFormat | None = None  # None: detected
    columns: dict[str, str] = Field(default_factory=dict)  # our key -> the manifest's name for it
    output: str  # s3:// URI or absolute path of a prefix
    results: ResultFormat = "jsonl"  # what the parts are written as
    options: dict[str, Any] = Field(default_factory=dict)  # as given; `blip_engine.requests.options_for` reads them
    chunk_rows: int | None = Field(default=None, ge=1, le=10_000)  # None: chosen by the planner
    max_error_ratio: float = Field(default=0.5, ge=0, le=1)  # stop above it, once 1,000 rows are done
    weight: float = Field(default=1.0, gt=0, le=1000)  # its share of the workers, against other jobs' weights
    created_at: float  # Unix seconds

    @classmethod
    def stored(cls, content: object) -> "JobSpec":
        """One that was kept as JSON. Fields that a later version added are left out. Raises ValidationError."""
        if isinstance(content, dict):
            content = {name: value for name, value in content.items() if name in cls.model_fields}
        return cls.model_validate(content)

    def identity(self) -> dict[str, Any]:
        """What must agree for two submissions to be the same work on the same output."""
        return self.model_dump(exclude={"id", "created_at", "max_error_ratio", "weight"})


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of rows: the unit that is handed out, leased, and written as one part."""

    id: int  # dense, from 0
    start: int  # first byte in the planned manifest
    end: int  # one past the last byte
    first_row: int  # number of its first row; rows count from 0, blank lines left out
    rows: int


@dataclass(frozen=True, slots=True)
class Hint:
    """The message in the queue. Losing or repeating one is harmless."""

    job: str
    chunk: int
    plan: str  # the plan's hash; a hint of another plan is dropped
    start: int
    end: int
    first_row: int
    rows: int
    round: int = 0  # above 0: only rows without a result are worked on (see `rounds`)
    todo: int = 0  # how many those are; 0 in round 0, which is about all

    @classmethod
    def of(cls, job: str, plan: str, chunk: Chunk, round_number: int = 0, todo: int = 0) -> "Hint":
        return cls(job, chunk.id, plan, chunk.start, chunk.end, chunk.first_row, chunk.rows, round_number, todo)

    def as_chunk(self) -> Chunk:
        return Chunk(self.chunk, self.start, self.end, self.first_row, self.rows)

    def to_message(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_message(cls, message: object) -> "Hint":
        """Raises UsageError for anything but a whole, sane hint: the queue is an input like any other."""
        if not isinstance(message, dict) or set(message) != {known.name for known in fields(cls)}:
            raise UsageError("not a hint: its keys differ")
        for known in fields(cls):
            value = message[known.name]
            if type(value) is not known.type or (isinstance(value, int) and not 0 <= value < 2**53):
                raise UsageError(f"not a hint: {known.name!r} is {str(value)[:40]!r}")
        if len(json.dumps(message)) > HINT_BYTES:
            raise UsageError(f"not a hint: more than {HINT_BYTES} bytes")
        hint = cls(**message)
        if hint.end < hint.start or not 1 <= hint.rows <= hint.end - hint.start:
            raise UsageError("not a hint: its range is empty")
        if (hint.round > 0) != (hint.todo > 0) or hint.todo > hint.rows:
            raise UsageError("not a hint: its round and its rows do not agree")
        return hint


@dataclass(frozen=True, slots=True)
class Row:
    """One usable manifest row."""

    number: int
    image: str  # as written in the manifest; `fetch.resolve_image` says where it is
    id: str | int | float | None
    texts: tuple[str, ...]  # caption: (prompt or "",); vqa: the question(s); itm: the text(s)
    several: bool  # a list was given (`questions`, `texts`), so the result is a list too
    passthrough: dict[str, Any]  # every key but image and id, task texts included: the record's `input`
    candidates: tuple[str, ...] = ()  # vqa: the answers to choose from; none: the answer is generated


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that ends as an error record without any work."""

    number: int
    code: ErrorCode
    message: str
    image: str | None
    id: str | int | float | None
    passthrough: dict[str, Any]  # what could be read of it; {"line": …} when it is no JSON object


def result_row(row: Row, task: Task, result: dict[str, Any]) -> dict[str, Any]:
    """The record of a row that has a result."""
    return _record(row, task, result, None)


def error_row(row: Row | BadRow, task: Task, code: ErrorCode, message: str) -> dict[str, Any]:
    """The record of a row that failed."""
    return _record(row, task, None, {"code": code, "message": message})


def _record(
    row: Row | BadRow, task: Task, result: dict[str, Any] | None, error: dict[str, str] | None
) -> dict[str, Any]:
    return {
        "row": row.number, "id": row.id, "image": row.image, "task": task, "result": result, "error": error,
        "input": row.passthrough,
    }  # fmt: skip


def to_line(record: dict[str, Any]) -> bytes:
    """One record as a line of compact JSON, newline included; UTF-8, and lone surrogates as escapes.

    Raises ValueError for NaN and infinities: they are not JSON.
    """
    return dumps(record) + b"\n"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is, in rows."""

    total: int
    completed: int  # rows with results, in committed parts
    failed: int  # rows with error records, in committed parts
    in_leases: int  # rows finished inside chunks that are still being worked on

    @property
    def done(self) -> int:
        """Rows behind us, the ones inside live leases included; never more than `total`."""
        return min(self.total, self.completed + self.failed + self.in_leases)

    @property
    def error_ratio(self) -> float:
        done = self.completed + self.failed
        return self.failed / done if done else math.nan


@dataclass(frozen=True, slots=True)
class JobState:
    """What the ledger knows of a job. Times are Unix seconds by Redis's clock; None: not yet."""

    id: str
    status: Status
    plan: str | None  # the plan's hash, once planned
    chunks: int
    chunks_done: int
    total: int  # rows
    completed: int
    failed: int
    restored: int = 0  # rows that were in storage already when the job began (again)
    round: int = 0  # 0: all rows; above: only those that had no result before (`retry`)
    rows_per_second: float | None = field(default=None, compare=False)  # lately; None: not measured yet
    worker_seconds: float = field(default=0.0, compare=False)  # spent on it by workers so far
    created_at: float | None = None
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    completed_at: float | None = None
    failed_at: float | None = None
    cancelled_at: float | None = None
    progress_at: float | None = field(default=None, compare=False)  # when a row was last seen to be done
    error: dict[str, str] | None = None  # {code, message} of a failed job
    model: dict[str, Any] | None = None  # what workers reported: revision, weights_sha256, …

    @property
    def ended(self) -> bool:
        return self.status in ENDED
