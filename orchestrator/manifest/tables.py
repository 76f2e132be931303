"""CSV, TSV and Parquet as lines of JSON. A bad row becomes a line that `rows.parse_rows` turns into an error record."""

import base64
import csv
import hashlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from blip_engine.errors import one_line

from ..errors import ManifestError
from ..stopping import go_on
from ..temporary import temporary_file
from .formats import DELIMITERS, check_names, read_header
from .source import Source, StoredFile, opened

if TYPE_CHECKING:
    from hashlib import _Hash

MAX_CELL: Final = 16 * 2**20  # characters; a longer cell is most likely a quote that was left open
_BATCH: Final = 1024  # rows of Parquet in memory at once, of short ones
_BYTES: Final = 8 * 2**20  # bytes of Parquet rows in memory at once, or one row
_LOOKED_AT: Final = 16  # rows that tell how much room repeated values take, which a file holds once
_BUFFER: Final = 2**20  # bytes of each Parquet column read at once
_COPIED: Final = 2**20  # bytes


def bad_line(message: str, line: str | None = None) -> bytes:
    """A row that ends as an error record: an array instead of an object, of a message and what is known of the row."""
    if line is not None:
        line = line[:1000].encode(errors="surrogateescape").decode(errors="replace")
    return json.dumps([message, {"line": line}]).encode() + b"\n"


def csv_lines(source: Source) -> Iterator[bytes]:
    """A CSV's or TSV's rows, quoted newlines and all. Raises ManifestError for a quote that is never closed."""
    csv.field_size_limit(MAX_CELL)
    with opened(source) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        header = read_header(source.uri, text, source.format, source.columns)
    with opened(source) as stream:  # again from the front: the header's reader has read ahead
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=DELIMITERS[source.format], strict=True)
        next(cells for cells in reader if cells)
        yield from _csv_rows(source.uri, reader, header)


def _csv_rows(uri: str, reader: Any, header: Sequence[str]) -> Iterator[bytes]:
    width = len(header)
    while True:
        begins = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error) or "field limit" in str(error):
                raise ManifestError(f"{uri}: line {begins}: a quoted cell is never closed; close its quote") from None
            yield bad_line(f"line {begins}: not CSV: {error}")
            continue
        if len(cells) == width:
            yield _cells_line(begins, header, cells)
        elif cells:
            yield bad_line(f"line {begins}: {len(cells)} cells where the header has {width}", ",".join(cells))


def _cells_line(number: int, header: Sequence[str], cells: Sequence[str]) -> bytes:
    """One row; columns without a name are left out."""
    try:
        row = {name: cell for name, cell in zip(header, cells, strict=True) if name}
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return bad_line(f"line {number}: not UTF-8", ",".join(cells))


@contextmanager
def local_copy(source: Source, digest: "_Hash | None" = None) -> Iterator[Path]:
    """The object's bytes as a temporary file, for readers that seek. Raises ManifestError and StorageError."""
    raw = StoredFile(source.store, source.key, source.etag, source.size, digest)
    with temporary_file("blip-copy-") as file:
        with io.BufferedReader(raw, _COPIED) as stream:
            while block := stream.read(_COPIED):
                go_on()
                file.write(block)
        yield file.path


def parquet_lines(source: Source) -> Iterator[bytes]:
    """A Parquet file's rows. Raises ManifestError when it is damaged or its images are not text."""
    import pyarrow  # noqa: PLC0415 -- only where it is needed: the command line stays quick
    from pyarrow import parquet  # noqa: PLC0415

    if source.compression is not None:
        raise ManifestError(f"{source.uri} is Parquet within {source.compression}; unpack it, it is compressed inside")
    with local_copy(source) as path:
        try:
            with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
                check_names(f"{source.uri}: the schema", file.schema_arrow.names, source.columns)
                _check_image_type(source.uri, file.schema_arrow.field(source.columns.get("image", "image")))
                for batch in _batches(file):
                    yield from map(_row_line, _python_rows(batch))
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            message = one_line(error)[:300]
            raise ManifestError(f"{source.uri}: the Parquet data cannot be read: {message}") from None


def _batches(file: Any) -> Iterator[Any]:
    """A Parquet file's rows in order, few at a time where they are long."""
    for group in range(file.num_row_groups):
        said = file.metadata.row_group(group)
        if said.num_rows == 0:
            continue
        size = _rows_of(said.total_byte_size, said.num_rows)
        first = next(file.iter_batches(min(size, _LOOKED_AT), row_groups=[group]))
        size = min(size, _rows_of(first.nbytes, len(first)))
        for batch in file.iter_batches(size, row_groups=[group]):
            yield from slices(batch, _rows_of(batch.nbytes, len(batch)))


def _rows_of(size: int, rows: int) -> int:
    """How many rows to hold at once, of which `rows` take `size` bytes."""
    return max(1, min(_BATCH, _BYTES * rows // max(1, size)))


def slices(batch: Any, rows: int) -> Iterator[Any]:
    """A batch in pieces of so many rows: as Python values they take many times the room."""
    return (batch.slice(start, rows) for start in range(0, len(batch), rows))


def _python_rows(batch: Any) -> list[dict[str, Any]]:
    """A batch as Python values; times to the microsecond, Python's limit, and in UTC where they have a zone."""
    import pyarrow  # noqa: PLC0415
    from pyarrow import types  # noqa: PLC0415

    schema, zoned = batch.schema, []
    for index, field in enumerate(schema):
        if types.is_timestamp(field.type):
            zoned += [field.name] if field.type.tz else []
            schema = schema.set(index, field.with_type(pyarrow.timestamp("us")))  # needs no database of time zones
        elif types.is_time64(field.type):
            schema = schema.set(index, field.with_type(pyarrow.time64("us")))
        elif types.is_duration(field.type):
            schema = schema.set(index, field.with_type(pyarrow.duration("us")))
    rows: list[dict[str, Any]] = (batch if schema == batch.schema else batch.cast(schema, safe=False)).to_pylist()
    for row in rows if zoned else ():
        row.update({name: row[name].isoformat() + "Z" for name in zoned if row[name] is not None})
    return rows


def _check_image_type(uri: str, field: Any) -> None:
    from pyarrow import types  # noqa: PLC0415

    kind = field.type.value_type if types.is_dictionary(field.type) else field.type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or _is_bytes(kind)):
        raise ManifestError(f"{uri}: column `{field.name}` is {field.type}; images are named by text: a path or an URI")


def _is_bytes(kind: Any) -> bool:
    """Some writers do not mark text as such."""
    from pyarrow import types  # noqa: PLC0415

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _row_line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain).encode() + b"\n"
    except ValueError:  # a NaN or an infinity somewhere, which JSON has not
        return json.dumps(_finite(row), allow_nan=False, default=_plain).encode() + b"\n"


def _plain(value: Any) -> Any:
    """What JSON has no type for."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    if isinstance(value, date | time):  # datetime is a date
        return value.isoformat()
    return value.total_seconds() if isinstance(value, timedelta) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def md5() -> "_Hash":
    return hashlib.md5(usedforsecurity=False)
