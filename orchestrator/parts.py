"""Parts: one object per chunk, a record per row, written once. What a part says of itself can always be checked."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .contract import ERROR_CODES, Chunk, Hint, to_line
from .errors import JobError
from .storage import ObjectInfo, Store

PREFIX: Final = "results/part-"
_FIELDS: Final = {"row", "id", "image", "task", "result", "error", "input"}


@dataclass(frozen=True, slots=True)
class PartInfo:
    """What is known of a part that exists."""

    chunk: int
    rows: int
    failed: int  # of these, rows with an error record
    sha256: str


@dataclass(frozen=True, slots=True)
class CheckedPart:
    """A part that was read and found right."""

    info: PartInfo
    failures: list[dict[str, Any]]  # its error records, in order


class PartError(JobError):
    """A part that is not what its chunk needs. Parts are never overwritten, so a person has to decide."""

    def __init__(self, message: str) -> None:
        super().__init__("part_invalid", message)


def part_key(chunk: int) -> str:
    return f"{PREFIX}{chunk:08d}.jsonl"


def chunk_of(key: str) -> int | None:
    """The chunk of a part's key; None for other objects."""
    number = key.removeprefix(PREFIX).removesuffix(".jsonl")
    return int(number) if number.isdecimal() and number.isascii() and key == part_key(int(number)) else None


def put_part(store: Store, hint: Hint, records: Sequence[dict[str, Any]], weights_sha256: str) -> PartInfo:
    """Writes a chunk's part unless it exists, and returns what is there then: ours, or the one that was first.

    Raises PartError for records that are not the chunk's rows in order, and StorageError.
    """
    numbers = [record["row"] for record in records]
    if numbers != list(range(hint.first_row, hint.first_row + hint.rows)):
        raise PartError(f"chunk {hint.chunk}: its records are not its rows; nothing was written")
    data = b"".join(to_line(record) for record in records)
    failed = sum(1 for record in records if record["error"] is not None)
    info = PartInfo(hint.chunk, hint.rows, failed, hashlib.sha256(data).hexdigest())
    metadata = {
        "rows": str(info.rows), "failed": str(failed), "sha256": info.sha256, "plan": hint.plan,
        "weights": weights_sha256,
    }  # fmt: skip
    if store.put_new(part_key(hint.chunk), data, metadata=metadata):
        return info
    return describe(store, part_key(hint.chunk)) or info


def describe(store: Store, key: str) -> PartInfo | None:
    """A part's counts, from its metadata where the store keeps any, else by reading it. None: no such part."""
    head = store.head(key)
    chunk = chunk_of(key)
    if head is None or chunk is None:
        return None
    if {"rows", "failed", "sha256"} <= set(head.metadata):
        meta = head.metadata
        return PartInfo(chunk, int(meta["rows"]), int(meta["failed"]), meta["sha256"])
    data = store.get(key)
    records = list(_records(key, data))
    failed = sum(1 for record in records if record.get("error") is not None)
    return PartInfo(chunk, len(records), failed, hashlib.sha256(data).hexdigest())


def check(store: Store, chunk: Chunk, found: ObjectInfo | None = None) -> CheckedPart:
    """Reads a chunk's part and checks each record against the plan, and the checksum where the store keeps it.

    Raises PartError with the first thing that is wrong, and StorageError.
    """
    key = part_key(chunk.id)
    data = store.get(key, etag=found.etag if found else None)
    digest = hashlib.sha256(data).hexdigest()
    expected = chunk.first_row
    failures = []
    for record in _records(key, data):
        problem = _problem(record, expected)
        if problem:
            raise PartError(f"{store.uri(key)}: {problem}; {_WAY_OUT}")
        if record["error"] is not None:
            failures.append(record)
        expected += 1
    rows = expected - chunk.first_row
    if rows != chunk.rows:
        raise PartError(f"{store.uri(key)}: {rows} rows instead of {chunk.rows}; {_WAY_OUT}")
    return CheckedPart(PartInfo(chunk.id, rows, len(failures), digest), failures)


_WAY_OUT: Final = "delete this part and run the job again"


def _records(key: str, data: bytes) -> Iterator[dict[str, Any]]:
    if data and not data.endswith(b"\n"):
        raise PartError(f"{key}: its last line is cut off; {_WAY_OUT}")
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise PartError(f"{key}, line {number}: not a JSON object; {_WAY_OUT}")
        yield record


def _problem(record: dict[str, Any], expected: int) -> str | None:
    if set(record) != _FIELDS:
        return f"the record of row {expected} has other keys than {', '.join(sorted(_FIELDS))}"
    if record["row"] != expected:
        return f"row {record['row']} where row {expected} belongs"
    if (record["result"] is None) == (record["error"] is None):
        return f"row {expected} has neither result nor error, or both"
    if record["error"] is not None and record["error"].get("code") not in ERROR_CODES:
        return f"row {expected} has an unknown error code"
    return None


def as_manifest_row(failure: dict[str, Any]) -> dict[str, Any]:
    """An error record as a row of errors.jsonl: what the manifest said, and `error` beside it."""
    row = dict(failure["input"])
    if failure["image"] is not None:
        row["image"] = failure["image"]
    if failure["id"] is not None:
        row["id"] = failure["id"]
    return {**row, "error": failure["error"]}


def count_codes(failures: Sequence[dict[str, Any]]) -> Counter[str]:
    return Counter(failure["error"]["code"] for failure in failures)
