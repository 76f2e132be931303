"""The plan: which bytes of the manifest are which chunk. Written once to the output, then only read.

plan/rows-<sha256>.jsonl         the rows as lines, for manifests that are staged
plan/<hash>/chunks-00000.json    pages of chunk boundaries
plan/plan.json                   written last, by conditional PUT: the planner that is first decides
"""

import hashlib
import json
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Final

from blip_engine.requests import Task

from .contract import FORMATS, RESULT_FORMATS, BadRow, Chunk, JobSpec, ManifestFormat, ResultFormat, Row
from .errors import JobConflict, JobError, ManifestError, ObjectChanged, ObjectNotFound
from .fetch import ImagePolicy
from .manifest import Source, choose_chunk_rows, open_manifest, scan, staged, stored_rows
from .rows import parse_rows
from .settings import Settings
from .stopping import go_on
from .storage import Store, open_object

PLAN_KEY: Final = "plan/plan.json"
PAGE_CHUNKS: Final = 4096
_PAGES_KEPT: Final = 8


@dataclass(frozen=True)
class Plan:
    """An immutable plan, as read from or written to an output."""

    hash: str  # names the plan: of the manifest's version and every boundary
    source: str  # what the user named as the manifest
    format: ManifestFormat
    manifest: str  # URI or path of the rows' lines: `source`, or the staged rows
    etag: str  # the version of `manifest` that was planned
    size: int  # bytes of `manifest`
    rows: int
    chunks: int
    chunk_rows: int  # rows in a chunk; the last one, and chunks of very long rows, have fewer
    store: Store = field(compare=False, repr=False)
    settings: Settings = field(compare=False, repr=False)
    source_etag: str = ""  # the version of `source` that was planned; a folder or prefix has none
    columns: dict[str, str] = field(default_factory=dict, hash=False)  # our key -> the manifest's name for it
    results: ResultFormat = "jsonl"  # what the parts are written as
    _pages: "OrderedDict[int, list[Chunk]]" = field(default_factory=OrderedDict, compare=False, repr=False)

    def chunk(self, number: int) -> Chunk:
        """Raises IndexError beyond the last one, JobError (`plan_invalid`) and StorageError."""
        if not 0 <= number < self.chunks:
            raise IndexError(f"chunk {number} of {self.chunks}")
        return self._page(number // PAGE_CHUNKS)[number % PAGE_CHUNKS]

    def all_chunks(self) -> Iterator[Chunk]:
        for page in range(-(-self.chunks // PAGE_CHUNKS)):
            yield from self._page(page)

    def chunks_from(self, first_row: int) -> Iterator[Chunk]:
        """The chunks from the one that holds this row on; of the pages before it hardly any is read."""
        if first_row >= self.rows:
            return
        number = first_row // self.chunk_rows  # none has more rows, and as a rule none but the last has fewer
        chunk = self.chunk(number)
        if first_row >= chunk.first_row + chunk.rows:
            every = range(self.chunks)
            number = bisect_right(every, first_row, number, key=lambda each: self.chunk(each).first_row) - 1
        for each in range(number, self.chunks):
            yield self.chunk(each)

    def _page(self, number: int) -> list[Chunk]:
        page = self._pages.get(number)
        if page is None:
            page = self._pages[number] = self._load_page(number)
            while len(self._pages) > _PAGES_KEPT:
                self._pages.popitem(last=False)
        return page

    def _load_page(self, number: int) -> list[Chunk]:
        key, first = _page_key(self.hash, number), number * PAGE_CHUNKS
        try:
            page = _read_page(json.loads(self.store.get(key)))
            if page[0].id == first and len(page) == min(PAGE_CHUNKS, self.chunks - first):
                return page
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError):  # told below
            pass
        raise JobError("plan_invalid", f"{self.store.uri(key)} is no page of this plan; choose another output")

    def read_rows(self, chunk: Chunk, task: Task) -> list[Row | BadRow]:
        """The rows of a chunk. Raises JobError (`manifest_changed`) when the manifest is not the planned version."""
        store, key = open_object(self.manifest, self.settings)
        try:
            data = store.get(key, chunk.start, chunk.end, etag=self.etag)
            return parse_rows(data, chunk, task, self.format, self.columns)
        except (ObjectChanged, ObjectNotFound, ManifestError) as error:
            raise self._changed() from error

    def check_manifest(self) -> None:
        """Raises JobError (`manifest_changed`) when the manifest is gone or another version."""
        store, key = open_object(self.manifest, self.settings)
        info = store.head(key)
        if info is None or info.etag != self.etag:
            raise self._changed()

    def check_source(self) -> None:
        """Raises JobConflict when what the user named as the manifest is no longer the version that was planned.

        A folder or prefix has no version. A manifest that is gone is no other one: its rows may lie beside the plan.
        """
        if not self.source_etag:
            return
        store, key = open_object(self.source, self.settings)
        info = store.head(key)
        if info is not None and info.etag != self.source_etag:
            raise JobConflict(
                f"{self.store.root}: the manifest {self.source} was changed since this output was planned from it; "
                "choose another output, or remove this one to begin anew"
            )

    def _changed(self) -> JobError:
        return JobError(
            "manifest_changed",
            f"{self.manifest} was changed or removed after the job was planned; put the planned version back, or start "
            "a new job with another output",
        )

    def image_policy(self) -> ImagePolicy:
        """What the rows' images may point to."""
        return ImagePolicy.of(self.source, self.format == "folder", self.settings)


def load_plan(store: Store, settings: Settings) -> Plan | None:
    """The output's plan; None when it has none yet."""
    try:
        text = store.get(PLAN_KEY)
    except ObjectNotFound:
        return None
    try:
        plan = Plan(**json.loads(text), store=store, settings=settings)
        if _is_sound(plan):
            return plan
    except (ValueError, TypeError, RecursionError):  # told below
        pass
    raise JobError("plan_invalid", f"{store.uri(PLAN_KEY)} is not a plan; choose another output")


def _is_sound(plan: Plan) -> bool:
    """Whether every field is of its kind: someone may have written to plan.json."""
    typed = all(isinstance(getattr(plan, of.name), of.type) for of in fields(plan) if of.type in {str, int})
    named = plan.format in FORMATS and plan.results in RESULT_FORMATS
    return typed and named and min(plan.rows, plan.chunks, plan.chunk_rows) > 0 and isinstance(plan.columns, dict)


def make_plan(spec: JobSpec, store: Store, settings: Settings, worth: int | None = None) -> Plan:
    """The output's plan, made and written if there is none. Raises ManifestError and StorageError.

    `worth`: rows that a chunk of automatic size is to have at most (`scheduling.chunk_rows_for`); None: not known.
    May be killed at any point, and may run twice at once: `plan.json` is written last, and the first one stays.
    """
    found = load_plan(store, settings)
    return found or read_whole(spec, store, settings, worth).write(store, settings, spec.results)


def read_whole(spec: JobSpec, store: Store, settings: Settings, worth: int | None = None) -> "Draft":
    """The plan of a manifest that was read to its end, not written yet. Raises ManifestError and StorageError.

    Rows that are no plain lines are written to `store`, under a name that only they have: they are in nobody's way.
    """
    source = open_manifest(spec.manifest, spec.manifest_format, settings, spec.columns)
    if not source.staged:
        return draft_plan(source, source, spec.chunk_rows, worth)
    with staged(source, settings) as rows:
        key = f"plan/rows-{rows.sha256[:32]}.jsonl"
        store.put_file_new(key, rows.path)  # never again: a plan pins the version that was first
    return draft_plan(source, stored_rows(source, store, key), spec.chunk_rows, worth)


@dataclass(frozen=True)
class Draft:
    """A plan before it is written. Boundaries are arrays: 16 bytes a chunk."""

    header: dict[str, Any]  # the fields of plan.json, but for the hash
    starts: "array[int]"
    ends: "array[int]"
    rows: "array[int]"

    @property
    def hash(self) -> str:
        digest = hashlib.sha256(json.dumps(self.header, sort_keys=True).encode())
        for numbers in (self.starts, self.ends, self.rows):
            digest.update(numbers.tobytes())
        return digest.hexdigest()[:32]

    def write(self, store: Store, settings: Settings, results: ResultFormat = "jsonl") -> Plan:
        name = self.hash
        first_row = 0
        for page, begin in enumerate(range(0, len(self.starts), PAGE_CHUNKS)):
            span = slice(begin, begin + PAGE_CHUNKS)
            rows = self.rows[span].tolist()
            content = {
                "first_chunk": begin, "first_row": first_row, "start": self.starts[begin],
                "ends": self.ends[span].tolist(), "rows": rows,
            }  # fmt: skip
            store.put(_page_key(name, page), json.dumps(content).encode())
            first_row += sum(rows)
        text = json.dumps({"hash": name, **self.header, "results": results}, indent=2)
        store.put_new(PLAN_KEY, text.encode() + b"\n")
        plan = load_plan(store, settings)
        if plan is None:
            raise JobError("plan_invalid", f"{store.uri(PLAN_KEY)} was written and is not there")
        return plan


def draft_plan(source: Source, lines: Source, chunk_rows: int | None, worth: int | None = None) -> Draft:
    """Scans `lines`, which hold the rows of `source`. Raises ManifestError, also when they change meanwhile."""

    def read(start: int, end: int) -> bytes:
        return lines.store.get(lines.key, start, end, etag=lines.etag)

    starts, ends, rows = array("q"), array("q"), array("q")
    try:
        chunk_rows = chunk_rows or choose_chunk_rows(lines.size, read(0, min(lines.size, 2**20)), worth)
        for chunk in scan(read, lines.size, chunk_rows):
            go_on()
            starts.append(chunk.start)
            ends.append(chunk.end)
            rows.append(chunk.rows)
    except ManifestError as error:
        raise ManifestError(f"{source.uri}: {error}") from None
    except ObjectChanged:
        raise ManifestError(f"{lines.uri} was changed while it was being read; run again once it is complete") from None
    if not rows:
        raise ManifestError(f"{source.uri} is empty; a manifest needs at least one row")
    header = {
        "source": source.uri, "source_etag": source.etag, "format": source.format, "columns": dict(source.columns),
        "manifest": lines.uri, "etag": lines.etag, "size": lines.size, "rows": sum(rows), "chunks": len(rows),
        "chunk_rows": chunk_rows,
    }  # fmt: skip
    return Draft(header, starts, ends, rows)


def _page_key(plan: str, page: int) -> str:
    return f"plan/{plan}/chunks-{page:05d}.json"


def _read_page(content: dict[str, Any]) -> list[Chunk]:
    chunks = []
    first_chunk, start, first_row = array("q", [content[name] for name in ("first_chunk", "start", "first_row")])
    ends, counts = array("q", content["ends"]), array("q", content["rows"])  # of whole numbers, else TypeError
    for index, (end, rows) in enumerate(zip(ends, counts, strict=True)):
        chunks.append(Chunk(first_chunk + index, start, end, first_row, rows))
        start, first_row = end, first_row + rows
    return chunks
