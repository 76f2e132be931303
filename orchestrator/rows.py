"""The bytes of a chunk as rows. A bad row becomes a `BadRow`, and leaves its neighbours alone."""

import csv
import json
import math
from collections.abc import Mapping
from itertools import chain
from typing import Any, Final, NoReturn
from urllib.parse import unquote_plus

from blip_engine.requests import Task

from .contract import BadRow, Chunk, ErrorCode, ManifestFormat, Row
from .errors import ManifestError, UsageError
from .fastjson import Loads, loads_for

#: Longer texts are refused before any tokenizer sees them; BLIP reads 512 tokens at most.
MAX_TEXT: Final = 20_000
MAX_TEXTS: Final = 1_000
MAX_CANDIDATES: Final = 10_000  # VQA's usual list of answers has 3,128
MAX_URI: Final = 4_096
MAX_DEPTH: Final = 200  # lists and objects in each other: far from where Python's JSON gives up, however deep its stack

#: task -> key of one text, key of several
_TEXT_KEYS: Final[dict[Task, tuple[str, str | None]]] = {
    "caption": ("prompt", None),
    "vqa": ("question", "questions"),
    "itm": ("text", "texts"),
    "embed": ("text", None),
    "capfilt": ("text", "texts"),
}
_TEXT_OPTIONAL: Final[frozenset[Task]] = frozenset({"caption", "embed", "capfilt"})

#: The keys of a row that mean something, and that `--column` can give another name.
KEYS: Final = ("image", "id", "prompt", "question", "questions", "answers", "text", "texts")
#: task -> its keys that hold lists. To the others these are keys like any: they pass through.
_LIST_KEYS: Final[dict[Task, tuple[str, ...]]] = {
    "vqa": ("questions", "answers"),
    "itm": ("texts",),
    "capfilt": ("texts",),
}
_STAGED: Final[frozenset[ManifestFormat]] = frozenset({"csv", "tsv", "s3-inventory", "parquet", "folder"})


def checked_columns(columns: Mapping[str, str]) -> dict[str, str]:
    """`columns` (our key -> the manifest's name for it). Raises UsageError for keys that mean nothing."""
    for key, name in columns.items():
        if key not in KEYS or not name:
            raise UsageError(f"--column {key}={name}: write KEY=NAME, where KEY is one of {', '.join(KEYS)}")
    return dict(columns)


class _BadRowError(Exception):
    def __init__(self, code: ErrorCode, message: str, known: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.known = known  # what could be read of a row that is no object


def parse_rows(
    data: bytes, chunk: Chunk, task: Task, fmt: ManifestFormat, columns: Mapping[str, str] | None = None
) -> list[Row | BadRow]:
    """The rows of a chunk's bytes, in order, numbered from `chunk.first_row`; `columns` are our keys' names there.

    Raises ManifestError when their number is not the planned one: the manifest was changed.
    """
    lines = [line for line in data.removeprefix(BOM if chunk.start == 0 else b"").split(b"\n") if line.strip()]
    if len(lines) != chunk.rows:
        raise ManifestError(f"the manifest was changed: {len(lines)} rows where {chunk.rows} were planned")
    if fmt == "ground-truth":
        columns = {"image": "source-ref", **(columns or {})}
    loads = loads_for(data, _strict_loads)
    return [_parse_row(line, number, task, fmt, columns, loads) for number, line in enumerate(lines, chunk.first_row)]


BOM: Final = b"\xef\xbb\xbf"


def _parse_row(
    line: bytes, number: int, task: Task, fmt: ManifestFormat, columns: Mapping[str, str] | None, loads: Loads
) -> Row | BadRow:
    raw: dict[str, Any] | None = None
    try:
        raw = _read_line(line, fmt, loads)
        if columns:
            raw = _renamed(raw, columns)
        if fmt in {"csv", "tsv"}:
            _read_cells(raw, task)
        image = raw.get("image")
        if not isinstance(image, str) or not image.strip():
            raise _BadRowError("row_invalid", _no_image(image))
        if len(image) > MAX_URI:
            raise _BadRowError("row_invalid", f"`image` has more than {MAX_URI} characters")
        row_id = _row_id(raw)
        texts, several = _texts(raw, task)
        candidates = _candidates(raw) if task == "vqa" else ()
    except _BadRowError as error:
        return _bad(number, error, error.known or raw, line)
    return Row(number, image, row_id, texts, several, _passthrough(raw), candidates)


def _no_image(value: object) -> str:
    if value is None or isinstance(value, str):
        return "the row has no `image`"
    return f"`image` must be a string, a path or an s3:// URI, not {json.dumps(value)[:50]}"


def _bad(number: int, error: _BadRowError, raw: dict[str, Any] | None, line: bytes) -> BadRow:
    """`raw`: what was read; None: the line is no row at all, and is the only thing to show."""
    if raw is None:
        raw = {"line": line[:1000].decode(errors="replace").strip()}
    image, row_id = raw.get("image"), raw.get("id", raw.get("custom_id"))
    return BadRow(
        number,
        error.code,
        str(error),
        image if isinstance(image, str) else None,
        row_id if _is_id(row_id) else None,
        _passthrough(raw),
    )


def _read_line(line: bytes, fmt: ManifestFormat, loads: Loads) -> dict[str, Any]:
    if fmt == "list":
        return {"image": _text_of(line).strip()}
    if fmt == "s3-batch":
        return _read_batch_row(_text_of(line).strip())
    try:
        row = loads(line)
        _check_depth(row, line.count(b"[") + line.count(b"{"))
    except RecursionError:
        raise _BadRowError("row_invalid", "the JSON is nested too deeply") from None
    except ValueError as error:
        raise _BadRowError("row_invalid", f"not JSON: {error}") from None
    if isinstance(row, list) and fmt in _STAGED:  # what `manifest.tables.bad_line` wrote
        raise _BadRowError("row_invalid", row[0], row[1])
    if not isinstance(row, dict):
        raise _BadRowError("row_invalid", "not a JSON object")
    return row


def _text_of(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise _BadRowError("row_invalid", f"not UTF-8 at byte {error.start} of the line") from None


def _strict_loads(line: bytes) -> Any:
    return _strict(_text_of(line))


def _strict(text: str) -> Any:
    """JSON without what Python's `json` reads beyond it. Raises ValueError, and RecursionError."""
    return json.loads(text, parse_constant=_no_constant, parse_float=_finite)


def _check_depth(value: Any, brackets: int) -> None:
    """Raises RecursionError for what may not be written, or read again; `brackets`: how many its text has."""
    inner: list[Any] = [[value]] if brackets > MAX_DEPTH else []
    for _ in range(MAX_DEPTH + 1):
        held = chain.from_iterable(child.values() if isinstance(child, dict) else child for child in inner)
        inner = [child for child in held if isinstance(child, dict | list)]
    if inner:
        raise RecursionError


def _read_batch_row(text: str) -> dict[str, Any]:
    """bucket,key[,version] of S3 Batch Operations, whose keys are URL-encoded."""
    try:
        cells = next(csv.reader([text], strict=True, skipinitialspace=True))
        if len(cells) not in {2, 3} or not all(cells[:2]):
            raise _BadRowError("row_invalid", f"{len(cells)} cells; write bucket,key or bucket,key,version")
        uri = f"s3://{cells[0]}/{unquote_plus(cells[1], errors='strict')}"
    except (csv.Error, UnicodeDecodeError) as error:
        raise _BadRowError("row_invalid", f"not a URL-encoded bucket,key: {error}") from None
    return {"image": f"{uri}?versionId={cells[2]}" if cells[2:] and cells[2] else uri}


def _renamed(raw: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under our keys. A row that lacks a renamed column may have it under our key already."""
    found = {key: raw[name] for key, name in columns.items() if name in raw}
    used = {columns[key] for key in found} | set(found)
    return found | {name: value for name, value in raw.items() if name not in used}


def _read_cells(raw: dict[str, Any], task: Task) -> None:
    """A table has text only: an empty cell is no value, and a list that the task reads is written as JSON."""
    for key in KEYS:
        if raw.get(key) == "":
            del raw[key]
    for key in _LIST_KEYS.get(task, ()):
        if isinstance(raw.get(key), str):
            try:
                value = _strict(raw[key])
                _check_depth(value, raw[key].count("[") + raw[key].count("{"))
                raw[key] = value
            except (ValueError, RecursionError):
                raise _BadRowError("row_invalid", f'`{key}` must be a JSON list of strings, as ["a", "b"]') from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is out of range")
    return value


def _is_id(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _row_id(raw: dict[str, Any]) -> str | int | float | None:
    value = raw.get("id", raw.get("custom_id"))
    if value is not None and not _is_id(value):
        raise _BadRowError("row_invalid", "`id` must be a string or a number")
    return value


def _texts(raw: dict[str, Any], task: Task) -> tuple[tuple[str, ...], bool]:
    """The row's texts, and whether they were given as a list."""
    one, many = _TEXT_KEYS[task]
    if many and raw.get(many) is not None:
        if raw.get(one) is not None:
            raise _BadRowError("row_invalid", f"the row has both `{one}` and `{many}`; give one of them")
        texts = raw[many]
        if not isinstance(texts, list) or len(texts) > MAX_TEXTS:
            raise _BadRowError("row_invalid", f"`{many}` must be a list of at most {MAX_TEXTS} strings")
        if not texts:
            raise _BadRowError("text_missing", f"`{many}` is empty")
        return tuple(_text(text, many, task, place) for place, text in enumerate(texts)), True
    return (_text(raw.get(one), one, task),), False


def _candidates(raw: dict[str, Any]) -> tuple[str, ...]:
    """The answers that a question's is to be chosen from; none: it is generated."""
    answers = raw.get("answers")
    if answers is None:
        return ()
    if not isinstance(answers, list) or not 0 < len(answers) <= MAX_CANDIDATES:
        raise _BadRowError(
            "row_invalid",
            f"`answers`, to choose from, must be a list of 1 to {MAX_CANDIDATES} strings; else leave it out",
        )
    return tuple(_text(answer, "answers", "vqa", place) for place, answer in enumerate(answers))


def _text(value: object, key: str, task: Task, place: int | None = None) -> str:
    """`place`: in the list of that key."""
    if value is None and task in _TEXT_OPTIONAL:
        return ""
    name = key if place is None else f"{key}[{place}]"
    if value is None:
        raise _BadRowError("text_missing", f"the row has no `{name}`")
    if not isinstance(value, str):
        raise _BadRowError("row_invalid", f"`{name}` must be a string")
    if not value.strip() and task not in _TEXT_OPTIONAL:
        raise _BadRowError("text_missing", f"`{name}` is blank")
    if len(value) > MAX_TEXT:
        raise _BadRowError("text_too_long", f"`{name}` has more than {MAX_TEXT} characters")
    return value


def _passthrough(raw: dict[str, Any]) -> dict[str, Any]:
    used = {"image", "id" if "id" in raw else "custom_id"}
    return {key: value for key, value in raw.items() if key not in used}
