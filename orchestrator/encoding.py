"""Records as the bytes of a part or an export: JSON Lines, the same gzipped, typed Parquet; as CSV for exports only.

Parquet has a column for each field of a record. `result` is a struct of the task's fields, null where a record has
none; an embedding is a list of fixed size of 32-bit floats. `id` is text, with `id_is_number` beside it; `input`,
which may hold anything, is JSON. Read back, a record is what it was (text that is no Unicode has lost those parts).
"""

import csv
import gzip
import io
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from blip_engine.errors import one_line
from blip_engine.requests import Task

from .contract import ResultFormat, to_line
from .errors import UsageError
from .fastjson import Loads, loads_for

if TYPE_CHECKING:
    import pyarrow as pa

#: What goes on at the end of a name, longest first: `.jsonl.gz` ends in neither of the others.
SUFFIXES: Final[dict[ResultFormat, str]] = {"jsonl": ".jsonl", "jsonl.gz": ".jsonl.gz", "parquet": ".parquet"}

Record = dict[str, Any]

_CAPTION: Final = {"caption": str, "score": float, "tokens": int}
_ANSWER: Final = {"answer": str, "score": float, "ranking": [{"answer": str, "score": float}]}
_MATCH: Final = {"match": float, "similarity": float}
#: Of each task the fields of `result`, in order: a type (bytes: a vector), or a list of what its items are.
_RESULTS: Final[dict[Task, dict[str, Any]]] = {
    "caption": {**_CAPTION, "captions": [_CAPTION]},
    "vqa": {**_ANSWER, "answers": [_ANSWER]},
    "itm": {**_MATCH, "matches": [_MATCH]},
    "embed": {"embedding": bytes, "text_embedding": bytes},
    "capfilt": {"caption": str, "caption_match": float, "text_match": float, "kept": [str], "text_matches": [float]},
}
_KEPT_NULLS: Final = {"text_match"}  # fields that are there even when they are null


def encode(records: Sequence[Record], results: ResultFormat, task: Task) -> bytes:
    """The bytes of a part; the same for the same records. Raises ValueError for NaN and infinities."""
    if results == "parquet":
        buffer = io.BytesIO()
        with ParquetWriter(buffer, task, embedding_size(records)) as writer:
            writer.write(records)
        return buffer.getvalue()
    lines = b"".join(to_line(record) for record in records)
    return gzip.compress(lines, 6, mtime=0) if results == "jsonl.gz" else lines


def decode(data: bytes, results: ResultFormat) -> Iterator[Record]:
    """The records of a part, as far as they can be read. Raises ValueError that says what is wrong."""
    if results == "parquet":
        yield from _from_parquet(data)
        return
    if results == "jsonl.gz":
        data = _unzipped(data)
    if data and not data.endswith(b"\n"):
        raise ValueError("its last line is cut off")
    yield from _from_lines(data)


def _from_lines(data: bytes) -> list[Record]:
    lines, loads = data.split(b"\n")[:-1], loads_for(data)
    try:
        records = [loads(line) for line in lines]
        wrong = next((number for number, record in enumerate(records, 1) if type(record) is not dict), None)
    except ValueError:
        wrong = next(number for number, line in enumerate(lines, 1) if not _is_record(line, loads))
    if wrong is not None:
        raise ValueError(f"line {wrong}: not a JSON object")
    return records


def _is_record(line: bytes, loads: Loads) -> bool:
    try:
        return isinstance(loads(line), dict)
    except ValueError:
        return False


def _unzipped(data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"not gzip, or cut off ({error})") from None


def embedding_size(records: Iterable[Record]) -> int | None:
    """The length of the first embedding; None where there is none."""
    return next((len(r["result"]["embedding"]) for r in records if r["result"] and "embedding" in r["result"]), None)


class RecordWriter(ABC):
    """A file that records are added to. As a context manager, it is whole after the block."""

    @abstractmethod
    def write(self, records: Sequence[Record]) -> None:
        """Add records."""

    @abstractmethod
    def close(self) -> None:
        """Finish the file."""

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LinesWriter(RecordWriter):
    """JSON Lines, gzipped or not."""

    def __init__(self, path: Path, zipped: bool) -> None:
        self._file = gzip.GzipFile(path, "wb", 6) if zipped else path.open("wb")

    def write(self, records: Sequence[Record]) -> None:
        self._file.writelines(to_line(record) for record in records)

    def close(self) -> None:
        self._file.close()


class CsvWriter(RecordWriter):
    """CSV with a header: a column for each field of `result`; lists and `input` as JSON."""

    def __init__(self, path: Path, task: Task) -> None:
        self._file = path.open("w", encoding="utf-8", errors="replace", newline="")
        self._fields = list(_RESULTS[task])
        self._rows = csv.writer(self._file, lineterminator="\n")
        self._rows.writerow(["row", "id", "image", *self._fields, "error_code", "error_message", "input"])

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            result, error = record["result"] or {}, record["error"] or {}
            self._rows.writerow([
                record["row"], record["id"], record["image"], *(_cell(result.get(field)) for field in self._fields),
                error.get("code"), error.get("message"), _cell(record["input"]),
            ])  # fmt: skip

    def close(self) -> None:
        self._file.close()


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


class ParquetWriter(RecordWriter):
    """Parquet, a row group for each `write`."""

    def __init__(self, target: Path | IO[bytes], task: Task, size: int | None) -> None:
        """`size`: the length of embeddings; None where there are none. Raises UsageError without pyarrow."""
        self._schema = schema_of(task, size)
        import pyarrow.parquet as pq  # noqa: PLC0415 - heavy, and only Parquet needs it

        self._writer = pq.ParquetWriter(target, self._schema, compression="zstd")

    def write(self, records: Sequence[Record]) -> None:
        import pyarrow as pa  # noqa: PLC0415 - as above

        if records:
            self._writer.write_table(pa.Table.from_pylist([_typed(r) for r in records], schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def schema_of(task: Task, size: int | None) -> "pa.Schema":
    """The columns of a task's records. Raises UsageError without pyarrow."""
    try:
        import pyarrow as pa  # noqa: PLC0415 - heavy, and only Parquet needs it
    except ImportError:
        raise UsageError("Parquet needs pyarrow; install it, or take jsonl or jsonl.gz") from None

    vector = pa.list_(pa.float32(), size) if size else pa.list_(pa.float32())
    kinds = {str: pa.string(), float: pa.float64(), int: pa.int64(), bytes: vector}

    def type_of(shape: Any) -> Any:
        if isinstance(shape, list):
            return pa.list_(type_of(shape[0]))
        if isinstance(shape, dict):
            return pa.struct([(name, type_of(inner)) for name, inner in shape.items()])
        return kinds[shape]

    return pa.schema([
        pa.field("row", pa.int64(), nullable=False), ("id", pa.string()), ("id_is_number", pa.bool_()),
        ("image", pa.string()), ("task", pa.string()), ("result", type_of(_RESULTS[task])),
        ("error", type_of({"code": str, "message": str})), ("input", pa.string()),
    ])  # fmt: skip


def _typed(record: Record) -> Record:
    number = isinstance(record["id"], int | float)
    return {
        **record,
        "id": json.dumps(record["id"]) if number else _unicode(record["id"]),
        "id_is_number": None if record["id"] is None else number,
        "image": _unicode(record["image"]),
        "result": _unicode(record["result"]),
        "error": _unicode(record["error"]),
        "input": json.dumps(record["input"], allow_nan=False),
    }


def _unicode(value: Any) -> Any:
    """Without lone surrogates, which a Parquet string cannot hold."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {name: _unicode(inner) for name, inner in value.items()}
    if isinstance(value, list) and not (value and isinstance(value[0], float)):
        return [_unicode(inner) for inner in value]
    return value


def _from_parquet(data: bytes) -> Iterator[Record]:
    import pyarrow as pa  # noqa: PLC0415 - heavy, and only Parquet needs it
    import pyarrow.parquet as pq  # noqa: PLC0415 - as above

    try:
        # Without pyarrow's threads, which a part is too small for: a process that ends while they start is aborted.
        rows = pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False).to_pylist()
        for row in rows:
            number = row.pop("id_is_number")
            row["id"] = json.loads(row["id"]) if number else row["id"]
            row["input"] = json.loads(row["input"])
            row["result"] = _without_nulls(row["result"])
            yield row
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        raise ValueError(f"not our Parquet, or damaged ({one_line(error)})") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {name: inner for name, inner in value.items() if inner is not None or name in _KEPT_NULLS}
        return {name: _vector(v) if name in _RESULTS["embed"] else _without_nulls(v) for name, v in kept.items()}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _vector(values: list[float]) -> list[float]:
    """32-bit floats to the nine digits that tell them apart, as the engine gives them."""
    return [float(f"{value:.8e}") for value in values]
