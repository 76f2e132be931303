"""Parts: one object per chunk, a record per row, written once. What a part says of itself can always be checked."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from .contract import ERROR_CODES, Chunk, Hint, ResultFormat, to_line
from .encoding import SUFFIXES, decode, encode
from .errors import JobError
from .fetch import ImagePolicy
from .storage import Store

PREFIX: Final = "results/part-"  # of round 0, which holds every row
_KEY: Final = re.compile(r"(?:results|rounds/[1-9]\d*)/part-(\d{8,})(\.jsonl|\.jsonl\.gz|\.parquet)", re.ASCII)
_FORMATS: Final[dict[str, ResultFormat]] = {suffix: results for results, suffix in SUFFIXES.items()}
#: What brings the rows of a part back that is gone.
REDO: Final = "run the job again, or `blip-batch retry JOB` in a cluster, for its rows"
_WAY_OUT: Final = f"delete this part, then {REDO}"
ALTERED: Final = f"its checksum is not the one in summary.json; {_WAY_OUT}"
_FIELDS: Final = {"row", "id", "image", "task", "result", "error", "input"}
_TYPES: Final[dict[str, Any]] = {
    "row": int, "image": str | None, "result": dict | None, "error": dict | None, "input": dict,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PartInfo:
    """What is known of a part that exists."""

    chunk: int
    rows: int
    failed: int  # of these, rows with an error record
    sha256: str
    codes: str = ""  # errors by code, "image_not_found=3,crashed=1"; empty where the part's metadata does not tell


@dataclass(frozen=True, slots=True)
class CheckedPart:
    """A part that was read and found right."""

    key: str
    info: PartInfo
    records: list[dict[str, Any]]
    failures: list[dict[str, Any]]  # those of them that are error records


class PartError(JobError):
    """A part that is not what its chunk needs. Parts are never overwritten, so a person has to decide."""

    def __init__(self, message: str) -> None:
        super().__init__("part_invalid", message)


def part_prefix(round_number: int = 0) -> str:
    """Where the parts of a round are (see `rounds`)."""
    return f"rounds/{round_number}/part-" if round_number else PREFIX


def part_key(chunk: int, round_number: int = 0, results: ResultFormat = "jsonl") -> str:
    return f"{part_prefix(round_number)}{chunk:08d}{SUFFIXES[results]}"


def chunk_of(key: str, results: ResultFormat = "jsonl") -> int | None:
    """The chunk of a part's key, of any round; None for other objects, and for parts of another format."""
    found = _KEY.fullmatch(key)
    if found is None or found[2] != SUFFIXES[results]:
        return None
    return int(found[1]) if f"part-{int(found[1]):08d}." in key else None


def put_part(
    store: Store, hint: Hint, records: Sequence[dict[str, Any]], weights_sha256: str,
    numbers: Sequence[int] | None = None, results: ResultFormat = "jsonl",
) -> PartInfo:  # fmt: skip
    """Writes a chunk's part unless it exists, and returns what is there then: ours, or the one that was first.

    `numbers`: the rows it must hold; None: all of the chunk's.
    Raises PartError for records that are not these rows in order, UsageError where a program for `results` is not
    installed, and StorageError.
    """
    expected = range(hint.first_row, hint.first_row + hint.rows) if numbers is None else numbers
    if [record["row"] for record in records] != list(expected):
        raise PartError(f"chunk {hint.chunk}: its records are not its rows; nothing was written")
    data, records = _encoded(records, results)
    failed = sum(1 for record in records if record["error"] is not None)
    info = PartInfo(hint.chunk, len(records), failed, hashlib.sha256(data).hexdigest(), _codes(records))
    metadata = {
        "rows": str(info.rows), "failed": str(failed), "sha256": info.sha256, "plan": hint.plan,
        "weights": weights_sha256, "codes": info.codes,
    }  # fmt: skip
    key = part_key(hint.chunk, hint.round, results)
    if store.put_new(key, data, metadata=metadata):
        return info
    return describe(store, key, hint.plan) or info


def _encoded(records: Sequence[dict[str, Any]], results: ResultFormat) -> tuple[bytes, Sequence[dict[str, Any]]]:
    """The bytes of a part, and its records: they may have become others."""
    task = records[0]["task"]
    try:
        return encode(records, results, task), records
    except (ValueError, RecursionError):  # the same rows would end so each time, and their chunk never
        records = [_writable(record) for record in records]
        return encode(records, results, task), records


def _writable(record: dict[str, Any]) -> dict[str, Any]:
    """The record, or an error record in place of one whose `input` is no JSON."""
    try:
        to_line({"input": record["input"]})
    except (ValueError, RecursionError) as error:
        message = f"what the row passes through cannot be written: {error}"
        return {**record, "result": None, "error": {"code": "row_invalid", "message": message}, "input": {}}
    return record


def describe(store: Store, key: str, plan: str) -> PartInfo | None:
    """A part's counts, from its metadata where the store keeps any, else by reading it. None: no such part.

    Raises PartError for a part of another plan than `plan`, where metadata tells.
    """
    head, named = store.head(key), _KEY.fullmatch(key)
    if head is None or named is None:
        return None
    chunk = int(named[1])
    if head.metadata.get("plan", plan) != plan:
        raise PartError(f"{store.uri(key)}: a part of another plan; {_WAY_OUT}")
    if {"rows", "failed", "sha256"} <= set(head.metadata):
        meta = head.metadata
        return PartInfo(chunk, int(meta["rows"]), int(meta["failed"]), meta["sha256"], meta.get("codes", ""))
    records, digest = read_part(store, key)
    failed = sum(1 for record in records if record.get("error") is not None)
    return PartInfo(chunk, len(records), failed, digest, _codes(records))


def read_part(store: Store, key: str) -> tuple[list[dict[str, Any]], str]:
    """A part's records, and the checksum of its bytes. Raises PartError for what are no records, and StorageError."""
    data, named = store.get(key), _KEY.fullmatch(key)
    try:
        records = list(decode(data, _FORMATS[named[2]] if named else "jsonl"))
        for number, record in enumerate(records, 1):
            _check_shape(number, record)
    except ValueError as error:
        raise PartError(f"{store.uri(key)}: {error}; {_WAY_OUT}") from None
    return records, hashlib.sha256(data).hexdigest()


def check(
    store: Store, chunk: Chunk, round_number: int = 0, numbers: Sequence[int] | None = None,
    results: ResultFormat = "jsonl",
) -> CheckedPart:  # fmt: skip
    """Reads a chunk's part and checks each record: `numbers` are its rows, or, when None, the chunk's by the plan.

    Raises PartError with the first thing that is wrong, and StorageError.
    """
    key = part_key(chunk.id, round_number, results)
    records, digest = read_part(store, key)
    expected = range(chunk.first_row, chunk.first_row + chunk.rows) if numbers is None else numbers
    problem = next(filter(None, map(_problem, records, expected)), None)
    if problem is None and len(records) != len(expected):
        problem = f"{len(records)} rows instead of {len(expected)}"
    if problem:
        raise PartError(f"{store.uri(key)}: {problem}; {_WAY_OUT}")
    failures = [record for record in records if record["error"] is not None]
    info = PartInfo(chunk.id, len(records), len(failures), digest, _codes(failures))
    return CheckedPart(key, info, records, failures)


def _check_shape(number: int, record: dict[str, Any]) -> None:
    """Raises ValueError unless it is a record as readers of results rely on."""
    if record.keys() != _FIELDS:
        raise ValueError(f"record {number} has other keys than {', '.join(sorted(_FIELDS))}")
    for name, kind in _TYPES.items():
        if not isinstance(record[name], kind):
            raise ValueError(f"record {number}: `{name}` is {type(record[name]).__name__}")
    if record["error"] is not None and record["error"].get("code") not in ERROR_CODES:
        raise ValueError(f"record {number} has an unknown error code")


def _problem(record: dict[str, Any], expected: int) -> str | None:
    if record["row"] != expected:
        return f"row {record['row']} where row {expected} belongs"
    if (record["result"] is None) == (record["error"] is None):
        return f"row {expected} has neither result nor error, or both"
    return None


def as_manifest_row(failure: dict[str, Any], images: ImagePolicy) -> dict[str, Any]:
    """An error record as a row of errors.jsonl: what the manifest said, and `error` beside it.

    The image is named so that a manifest at any place may name it.
    """
    row = dict(failure["input"])
    if failure["image"] is not None:
        row["image"] = images.absolute(failure["image"])
    if failure["id"] is not None:
        row["id"] = failure["id"]
    return {**row, "error": failure["error"]}


def _codes(records: Sequence[dict[str, Any]]) -> str:
    counts = count_codes([record for record in records if record.get("error") is not None])
    return ",".join(f"{code}={rows}" for code, rows in sorted(counts.items()))


def count_codes(failures: Sequence[dict[str, Any]]) -> Counter[str]:
    return Counter(failure["error"]["code"] for failure in failures)
