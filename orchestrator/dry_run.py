"""What `blip-batch plan` tells: a manifest read to its end, and nothing written."""

from collections.abc import Iterator
from typing import Any, Final

from blip_engine.requests import TASKS, Task

from .contract import FORMATS, BadRow, Chunk, ManifestFormat, Row
from .errors import UsageError
from .jobs import manifest_uri
from .manifest import is_folder, staged_listing
from .plan import Draft, draft_plan
from .rows import parse_rows
from .settings import load_settings
from .storage import open_object

_SHOWN: Final = 5


def dry_run(manifest: str, task: str, manifest_format: str | None, chunk_rows: int | None) -> dict[str, Any]:
    """Format, rows, chunks, the first rows and the bad ones. Raises UsageError and ManifestError."""
    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}; the tasks are: {', '.join(TASKS)}")
    if manifest_format is not None and manifest_format not in FORMATS:
        raise UsageError(f"unknown manifest format {manifest_format!r}; the formats are: {', '.join(FORMATS)}")
    uri, settings = manifest_uri(manifest), load_settings()
    if is_folder(uri, manifest_format):
        with staged_listing(uri, settings) as (path, _):
            draft = draft_plan(str(path), "jsonl", chunk_rows, settings)
            return _report(uri, "folder", draft, task)
    draft = draft_plan(uri, manifest_format, chunk_rows, settings)
    return _report(uri, draft.header["format"], draft, task)


def _report(uri: str, fmt: ManifestFormat, draft: Draft, task: Task) -> dict[str, Any]:
    first: list[Row] = []
    bad: list[BadRow] = []
    bad_rows = 0
    for row in _rows(draft, task):
        if isinstance(row, BadRow):
            bad_rows += 1
            bad = bad if len(bad) == _SHOWN else [*bad, row]
        elif len(first) < _SHOWN:
            first.append(row)
    return {
        "manifest": uri, "format": fmt, "rows": draft.header["rows"], "bad_rows": bad_rows,
        "chunks": draft.header["chunks"], "chunk_rows": draft.header["chunk_rows"],
        "first_rows": [{"row": row.number, "id": row.id, "image": row.image, "texts": row.texts} for row in first],
        "first_bad_rows": [{"row": row.number, "code": row.code, "message": row.message} for row in bad],
    }  # fmt: skip


def _rows(draft: Draft, task: Task) -> Iterator[Row | BadRow]:
    store, key = open_object(draft.header["manifest"])
    first_row = 0
    for number, (start, end, rows) in enumerate(zip(draft.starts, draft.ends, draft.rows, strict=True)):
        data = store.get(key, start, end, etag=draft.header["etag"])
        yield from parse_rows(data, Chunk(number, start, end, first_row, rows), task, draft.header["format"])
        first_row += rows


def estimate(rows: int, rows_per_second: float, workers: int, cost_per_hour: float | None) -> dict[str, Any]:
    """Time and cost from a measured speed: `rows_per_second` and `cost_per_hour` of one worker."""
    seconds = rows / (rows_per_second * workers)
    cost = None if cost_per_hour is None else round(seconds / 3600 * workers * cost_per_hour, 2)
    return {"seconds": round(seconds, 1), "workers": workers, "cost": cost}
