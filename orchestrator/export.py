"""`blip-batch export`: an output's parts merged into one file, rows in manifest order, the latest round's."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from blip_engine.requests import Task

from .encoding import CsvWriter, LinesWriter, ParquetWriter, RecordWriter, embedding_size
from .errors import JobError, ObjectNotFound, StorageError, UsageError
from .finalizer import read_summary
from .jobs import read_job, spec_of
from .parts import ALTERED, REDO, PartError
from .plan import Plan, load_plan
from .rounds import merged_chunks, stopped_round
from .settings import Settings, load_settings
from .storage import LocalStore, open_object, open_store

_BLOCK: Final = 1000  # records written at once; in Parquet, a row group
_OURS: Final = ("job.json", "errors.jsonl", "summary.json", "plan/", "results/", "rounds/")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """What was written."""

    file: str
    rows: int
    failed: int  # of them, those with error records


def export(output: str, file: str, settings: Settings | None = None) -> Exported:
    """Writes every row of an output to `file` (.jsonl, .jsonl.gz, .csv or .parquet; a path or s3:// URI).

    The file appears whole, over an older one, or not at all. In memory are the records of a few chunks. Raises
    UsageError for another ending or an output without a job, JobError when rows have no part yet or a part is wrong,
    and StorageError.
    """
    settings = settings or load_settings()
    store = open_store(output, settings)
    plan, record = load_plan(store, settings), read_job(store)
    if plan is None or record is None:
        raise UsageError(f"{output} holds no job: there is no plan/plan.json")
    write = _writer_of(file, plan, spec_of(record, store).task)
    refuse_our_own(store.root, file)
    tell_of_stopped_round(plan)
    rows = failed = 0
    try:
        with _target(file, settings) as path, write(path) as writer:
            for block in _blocks(records_of(plan)):
                writer.write(block)
                rows += len(block)
                failed += sum(1 for row in block if row["error"] is not None)
    except OSError as error:  # the disk is full, say; nothing is left
        raise StorageError(f"{file} cannot be written: {error.strerror or error}") from error
    return Exported(file, rows, failed)


def records_of(plan: Plan) -> Iterator[dict[str, Any]]:
    """Every row's record in manifest order, the latest round's that has one.

    Raises JobError when a row has no part yet, or a part is not the one that the summary tells of.
    """
    written = _checksums(plan)
    try:
        for chunk in merged_chunks(plan, so_far=stopped_round(plan) > 0):
            for _, part in chunk.parts:
                if written.get(part.key, part.info.sha256) != part.info.sha256:
                    raise PartError(f"{plan.store.uri(part.key)}: {ALTERED}")
            yield from chunk.records
    except ObjectNotFound as error:
        raise JobError("incomplete", f"{error}; let the job finish; if it had, {REDO}") from None


def _checksums(plan: Plan) -> dict[str, str]:
    """Of the parts, by key, as the summary has them; of a job that is not complete none are known."""
    try:
        return {part["key"]: part["sha256"] for part in read_summary(plan)["parts"]}
    except ObjectNotFound:
        return {}


def tell_of_stopped_round(plan: Plan) -> None:
    """One line on standard error, unless logging was set up otherwise, where a retry is not done."""
    if number := stopped_round(plan):
        log.warning("round %d, a retry, is not complete: rows that it has not done are as before it", number)


def _blocks(records: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    block: list[dict[str, Any]] = []
    for record in records:
        block.append(record)
        if len(block) == _BLOCK:
            yield block
            block = []
    if block:
        yield block


def _writer_of(file: str, plan: Plan, task: Task) -> Callable[[Path], RecordWriter]:
    """What writes a file of that name. Raises UsageError for an ending that is none of ours."""
    if file.endswith((".jsonl", ".jsonl.gz")):
        return lambda path: LinesWriter(path, zipped=file.endswith(".gz"))
    if file.endswith(".csv"):
        return lambda path: CsvWriter(path, task)
    if file.endswith(".parquet"):  # its schema comes first, so the length of embeddings is looked up before
        return lambda path: ParquetWriter(path, task, embedding_size(records_of(plan)) if task == "embed" else None)
    raise UsageError(f"{file}: the name must end in .jsonl, .jsonl.gz, .csv or .parquet, which says what to write")


def refuse_our_own(root: str, file: str) -> None:
    """Raises UsageError for a file that belongs to the output itself."""
    where = file if "://" in file else os.path.abspath(file)  # noqa: PTH100 - keeps odd names as they are
    inside = where.removeprefix(root + "/")
    if inside != where and inside.startswith(_OURS):
        raise UsageError(f"{file} is part of the output itself; choose another file")


@contextmanager
def _target(file: str, settings: Settings) -> Iterator[Path]:
    """A path to write to; after the block the file is in its place. Beside it when that is local, hidden until then."""
    store, key = open_object(file, settings)
    folder = store.folder if isinstance(store, LocalStore) else None
    if folder is not None and not folder.is_dir():
        raise UsageError(f"{file}: there is no folder {folder}; make it first")
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as temporary:
        path = Path(temporary) / "file"
        yield path
        store.put_file(key, path) if folder is None else _into_place(path, folder / key)


def _into_place(path: Path, target: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    path.replace(target)
