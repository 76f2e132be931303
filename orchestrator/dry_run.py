"""What `blip-batch plan` tells: a manifest read to its end, and nothing written."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from blip_engine.requests import JOB_TASKS, Task

from .contract import FORMATS, BadRow, Chunk, Row
from .errors import UsageError
from .jobs import manifest_uri
from .manifest import Source, open_manifest, staged, stored_rows
from .plan import Draft, draft_plan
from .rows import checked_columns, parse_rows
from .settings import load_settings
from .storage import open_object

_SHOWN: Final = 5


def dry_run(
    manifest: str, task: str, manifest_format: str | None, chunk_rows: int | None, columns: Mapping[str, str]
) -> dict[str, Any]:
    """Format, rows, chunks, the first rows and the bad ones. Raises UsageError and ManifestError."""
    if task not in JOB_TASKS:
        raise UsageError(f"unknown task {task!r}; the tasks are: {', '.join(JOB_TASKS)}")
    if manifest_format is not None and manifest_format not in FORMATS:
        raise UsageError(f"unknown manifest format {manifest_format!r}; the formats are: {', '.join(FORMATS)}")
    settings = load_settings()
    source = open_manifest(manifest_uri(manifest), manifest_format, settings, checked_columns(columns))
    if not source.staged:
        return _report(source, source, chunk_rows, task, {})
    with staged(source, settings) as rows:
        lines = stored_rows(source, *open_object(str(rows.path), settings))
        return _report(source, lines, chunk_rows, task, rows.skipped)


def _report(
    source: Source, lines: Source, chunk_rows: int | None, task: Task, skipped: Mapping[str, int]
) -> dict[str, Any]:
    draft = draft_plan(source, lines, chunk_rows)
    first: list[Row] = []
    bad: list[BadRow] = []
    bad_rows = 0
    for row in _rows(draft, lines, task):
        if isinstance(row, BadRow):
            bad_rows += 1
            bad = bad if len(bad) == _SHOWN else [*bad, row]
        elif len(first) < _SHOWN:
            first.append(row)
    return {
        "manifest": source.uri, "format": source.format, "compression": source.compression,
        "rows": draft.header["rows"], "bad_rows": bad_rows, "skipped": dict(skipped),
        "chunks": draft.header["chunks"], "chunk_rows": draft.header["chunk_rows"],
        "first_rows": [{"row": row.number, "id": row.id, "image": row.image, "texts": row.texts} for row in first],
        "first_bad_rows": [{"row": row.number, "code": row.code, "message": row.message} for row in bad],
    }  # fmt: skip


def _rows(draft: Draft, lines: Source, task: Task) -> Iterator[Row | BadRow]:
    first_row = 0
    for number, (start, end, rows) in enumerate(zip(draft.starts, draft.ends, draft.rows, strict=True)):
        data = lines.store.get(lines.key, start, end, etag=lines.etag)
        yield from parse_rows(data, Chunk(number, start, end, first_row, rows), task, lines.format, lines.columns)
        first_row += rows


def estimate(rows: int, rows_per_second: float, workers: int, cost_per_hour: float | None) -> dict[str, Any]:
    """Time and cost from a measured speed: `rows_per_second` and `cost_per_hour` of one worker."""
    seconds = rows / (rows_per_second * workers)
    cost = None if cost_per_hour is None else round(seconds / 3600 * workers * cost_per_hour, 2)
    return {"seconds": round(seconds, 1), "workers": workers, "cost": cost}
