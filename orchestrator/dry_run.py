"""What `blip-batch plan` tells: a manifest read to its end, and nothing written."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from blip_engine.requests import JOB_TASKS, Task

from .contract import FORMATS, BadRow, Chunk, ErrorCode, ManifestFormat, Row
from .errors import BlipBatchError, FetchError, UsageError
from .fetch import ImagePolicy
from .jobs import manifest_uri, models_of
from .manifest import Source, open_manifest, staged, stored_rows
from .plan import Draft, draft_plan
from .rows import checked_columns, parse_rows
from .settings import Settings, load_settings
from .storage import open_object

_SHOWN: Final = 5


@dataclass(frozen=True)
class Known:
    """What an estimate is made of; None: to be found out."""

    model: str | None = None
    rows_per_second: float | None = None  # of one worker
    workers: int = 1
    cost_per_hour: float | None = None  # of one worker


def dry_run(
    manifest: str, task: str, manifest_format: str | None, chunk_rows: int | None, columns: Mapping[str, str],
    known: Known | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Format, rows, chunks, the first rows, the bad ones, and an estimate. Raises UsageError and ManifestError.

    `estimate`: time and cost; None where the speed is not known. `estimate_note`: by which speed, or what is missing.
    """
    if task not in JOB_TASKS:
        raise UsageError(f"unknown task {task!r}; the tasks are: {', '.join(JOB_TASKS)}")
    if manifest_format is not None and manifest_format not in FORMATS:
        raise UsageError(f"unknown manifest format {manifest_format!r}; the formats are: {', '.join(FORMATS)}")
    settings = load_settings()
    known = known or Known()
    speed, note = _speed(task, known, settings)
    report = _read(manifest, task, manifest_format, chunk_rows, columns, settings)
    price = settings.price_per_worker_hour if known.cost_per_hour is None else known.cost_per_hour
    found = None if speed is None else estimate(report["rows"], speed, known.workers, price)
    return {**report, "estimate": found, "estimate_note": note}


def _read(
    manifest: str, task: Task, manifest_format: ManifestFormat | None, chunk_rows: int | None,
    columns: Mapping[str, str], settings: Settings,
) -> dict[str, Any]:  # fmt: skip
    source = open_manifest(manifest_uri(manifest), manifest_format, settings, checked_columns(columns))
    images = replace(ImagePolicy.of(source.uri, source.format == "folder", settings), tells_links=True)
    if not source.staged:
        return _report(source, source, chunk_rows, task, {}, images)
    with staged(source, settings) as rows:
        lines = stored_rows(source, *open_object(str(rows.path), settings))
        return _report(source, lines, chunk_rows, task, rows.skipped, images)


def _report(
    source: Source, lines: Source, chunk_rows: int | None, task: Task, skipped: Mapping[str, int], images: ImagePolicy
) -> dict[str, Any]:
    draft = draft_plan(source, lines, chunk_rows)
    first: list[Row] = []
    bad: list[BadRow] = []
    codes = Counter[str]()
    for row in _rows(draft, lines, task, images):
        if isinstance(row, BadRow):
            codes[row.code] += 1
            if len(bad) < _SHOWN or codes[row.code] == 1:
                bad.append(row)
        elif len(first) < _SHOWN:
            first.append(row)
    return {
        "manifest": source.uri, "format": source.format, "compression": source.compression,
        "rows": draft.header["rows"], "bad_rows": codes.total(), "bad_codes": dict(codes.most_common()),
        "skipped": dict(skipped),
        "chunks": draft.header["chunks"], "chunk_rows": draft.header["chunk_rows"],
        "first_rows": [{"row": row.number, "id": row.id, "image": row.image, "texts": row.texts} for row in first],
        "first_bad_rows": [{"row": row.number, "code": row.code, "message": row.message} for row in bad],
    }  # fmt: skip


def _rows(draft: Draft, lines: Source, task: Task, images: ImagePolicy) -> Iterator[Row | BadRow]:
    """Every row; one whose image may not be read, as far as its name tells, is bad here."""
    first_row = 0
    for number, (start, end, rows) in enumerate(zip(draft.starts, draft.ends, draft.rows, strict=True)):
        data = lines.store.get(lines.key, start, end, etag=lines.etag)
        known = dict[str, str]()
        for row in parse_rows(data, Chunk(number, start, end, first_row, rows), task, lines.format, lines.columns):
            yield row if isinstance(row, BadRow) else _placed(row, images, known)
        first_row += rows


def _placed(row: Row, images: ImagePolicy, known: dict[str, str]) -> Row | BadRow:
    try:
        images.resolve(row.image, known, links=False)  # a look at every file would take hours on a slow disk
    except FetchError as error:
        return BadRow(row.number, cast("ErrorCode", error.code), str(error), row.image, row.id, row.passthrough)
    return row


def estimate(rows: int, rows_per_second: float, workers: int, cost_per_hour: float | None) -> dict[str, Any]:
    """Time and cost from a measured speed: `rows_per_second` and `cost_per_hour` of one worker."""
    seconds = rows / (rows_per_second * workers)
    cost = None if cost_per_hour is None else round(seconds / 3600 * workers * cost_per_hour, 2)
    return {"seconds": round(seconds, 1), "workers": workers, "cost": cost}


def _speed(task: Task, known: Known, settings: Settings) -> tuple[float | None, str]:
    """Rows per second of a worker, None where that is not known; and what to say of it. Raises UsageError.

    Where it is not given it is what the cluster saw that BLIP_API_URL or BLIP_REDIS_URL names. A dry run needs none:
    one that does not answer is no error.
    """
    model = models_of(task, known.model)
    if known.rows_per_second is not None:
        return known.rows_per_second, "by --rows-per-second"
    unknown = f"none: nobody knows how fast {task} with {model} is; give --rows-per-second"
    if not settings.api_url and "redis_url" not in settings.model_fields_set:
        return None, f"{unknown}, or the BLIP_API_URL or BLIP_REDIS_URL of a cluster that has done some"
    from .backends import connected  # noqa: PLC0415 -- most dry runs ask no cluster, and are quick

    try:
        with connected() as cluster:
            speed = cluster.speed(task, model)
    except BlipBatchError as error:
        return None, f"{unknown} ({error})"
    if speed is None:
        return None, f"{unknown} (the cluster has done none yet)"
    return speed, f"by {speed:.1f} rows/s of a worker, as the cluster lately did {task} with {model}"
