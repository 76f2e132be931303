"""Rounds: the first pass over all rows is round 0; each `retry` is a further one, of the rows without a result.

results/part-00000042.jsonl      round 0: every row of chunk 42
rounds/1/wanted                  where finding those chunks takes long: the round was asked for, and is to be begun
rounds/1/round.json              the chunks with rows to do again, and how many; its presence begins the round
rounds/1/part-00000042.jsonl     those rows of chunk 42

Nothing is ever overwritten. A row's outcome is its record in the latest round that has one, so which rows a round is
about follows from the parts before it, for every process alike.
"""

import json
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, groupby, islice
from typing import Any, Final, TypeVar

from .contract import Chunk, ResultFormat
from .errors import JobError, ObjectNotFound
from .parts import CheckedPart, PartError, PartInfo, check, chunk_of, describe, part_key, part_prefix, read_part
from .plan import Plan
from .stopping import as_here
from .storage import LocalStore, Store

T = TypeVar("T")

SUMMARY_KEY: Final = "summary.json"  # what `finalizer` writes once every part is there
_READERS: Final = 8
_LOOKS: Final = 16  # parts asked for at once
_WINDOW: Final = 2 * _READERS  # chunks held in memory at once
_FEW: Final = 2000  # parts that can be asked one by one while someone waits for the answer
_BLOCK: Final = 10_000  # chunks that share all but the last four digits of their parts' names: listed together


@dataclass(frozen=True, slots=True)
class Round:
    """A round after the first: which chunks have rows without a result."""

    number: int  # from 1
    chunks: "array[int]"  # ascending
    rows: "array[int]"  # of each, how many

    def rows_of(self, chunk: int) -> int:
        """How many rows of the chunk belong to the round; 0: none."""
        at = bisect_left(self.chunks, chunk)
        return self.rows[at] if at < len(self.chunks) and self.chunks[at] == chunk else 0


@dataclass(frozen=True, slots=True)
class MergedChunk:
    """A chunk's outcome: one record per row, the latest round's."""

    parts: list[tuple[int, CheckedPart]]  # (round, part), the first round first
    records: list[dict[str, Any]]

    @property
    def failures(self) -> list[dict[str, Any]]:
        """The error records, in order."""
        return [record for record in self.records if record["error"] is not None]


class PartMissing(ObjectNotFound):
    """A part of the plan, or of a round, is not there: not yet, or no more."""

    def __init__(self, plan: Plan, chunk: Chunk, number: int, rows: int) -> None:
        which = f"rows {chunk.first_row} to {chunk.first_row + chunk.rows - 1}"
        which = which if rows == chunk.rows else f"{rows} rows of round {number}"
        super().__init__(f"{plan.store.uri(part_key(chunk.id, number, plan.results))} is missing: {which}")


def round_key(number: int) -> str:
    return f"rounds/{number}/round.json"


def wanted_key(number: int) -> str:
    return f"rounds/{number}/wanted"


def load_rounds(plan: Plan) -> list[Round]:
    """The rounds after the first that were begun, oldest first. Raises JobError and StorageError."""
    found: list[Round] = []
    for number in count(1):
        try:
            text = plan.store.get(round_key(number))
        except ObjectNotFound:
            return found
        found.append(_read_round(plan, number, text))
    raise AssertionError  # `count` does not end


def _read_round(plan: Plan, number: int, text: bytes) -> Round:
    try:
        content = json.loads(text)
        this = Round(number, array("q", content["chunks"]), array("q", content["rows"]))
        if content["plan"] == plan.hash and len(this.chunks) == len(this.rows) > 0:
            return this
    except (ValueError, TypeError, KeyError, RecursionError):  # told below
        pass
    uri = plan.store.uri(round_key(number))
    raise JobError("round_invalid", f"{uri} is no round of this plan; delete rounds/{number}/ and retry again")


def begin_round(plan: Plan, rounds: Sequence[Round]) -> Round | None:
    """Begins the round after `rounds`, or finds it begun; None when every row has a result.

    May be killed at any point, and run twice at once: the first `round.json` stays. Raises StorageError.
    """
    chunks, rows = array("q"), array("q")
    for chunk, left in _unresolved(plan, rounds):
        if left:
            chunks.append(chunk)
            rows.append(left)
    if not chunks:
        return None
    number = len(rounds) + 1
    content = {"round": number, "plan": plan.hash, "chunks": chunks.tolist(), "rows": rows.tolist()}
    plan.store.put_new(round_key(number), json.dumps(content).encode() + b"\n")
    return load_rounds(plan)[number - 1]


def is_begun_soon(plan: Plan, rounds: Sequence[Round]) -> bool:
    """Whether `begin_round` takes seconds: each part need not be asked, or they are few."""
    return plan.chunks <= _FEW or bool(_summed_up(plan, len(rounds)))


def ask_for_round(plan: Plan, rounds: Sequence[Round]) -> int:
    """Leaves the round after `rounds` to be begun by `begin_wanted`; its number. Raises StorageError."""
    number = len(rounds) + 1
    plan.store.put_new(wanted_key(number), b"asked for; round.json begins it\n")
    return number


def begin_wanted(plan: Plan) -> list[Round]:
    """As `load_rounds`, after a round is begun if one was asked for, or if parts before the last round are gone.

    Takes minutes then. Parts of the last round that are gone need no other one.
    """
    rounds = load_rounds(plan)
    wanted = plan.store.head(wanted_key(len(rounds) + 1)) is not None
    wanted = wanted or (bool(rounds) and any(number < len(rounds) for number in _lost(plan, rounds)))
    begun = begin_round(plan, rounds) if wanted else None
    return rounds if begun is None else [*rounds, begun]


def _unresolved(plan: Plan, rounds: Sequence[Round]) -> Iterator[tuple[int, int]]:
    """Each chunk and its rows without a result: the failed ones of its last part, all where it lacks a part.

    The summary of a job that was complete tells them; parts that it does not know are asked one by one.
    """
    known, present = _summed_up(plan, len(rounds)), [present_chunks(plan, n) for n in range(len(rounds) + 1)]

    def look(chunk: Chunk) -> tuple[int, int]:
        needed = _needed(chunk, rounds)
        if any(chunk.id not in present[number] for number, _ in needed):
            return chunk.id, chunk.rows  # which of them had a result cannot be told
        key = part_key(chunk.id, needed[-1][0], plan.results)
        if key in known:
            return chunk.id, known[key]
        part = describe(plan.store, key, plan.hash)
        return chunk.id, chunk.rows if part is None else part.failed

    chunks = plan.all_chunks()
    with ThreadPoolExecutor(_READERS, thread_name_prefix="parts") as pool:
        while window := list(islice(chunks, 32 * _READERS)):
            yield from pool.map(look, window)


def _summed_up(plan: Plan, number: int) -> dict[str, int]:
    """The failed rows of each part, by key, as the summary of round `number` has them; none where there is none."""
    try:
        summary = json.loads(plan.store.get(SUMMARY_KEY))
        if summary.get("round", 0) == number:
            return {part["key"]: int(part["failed"]) for part in summary["parts"]}
    except (ObjectNotFound, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # the parts tell
        pass
    return {}


def last_part(chunk: Chunk, rounds: Sequence[Round]) -> tuple[int, int]:
    """The last round that the chunk belongs to, and how many of its rows."""
    for this in reversed(rounds):
        if rows := this.rows_of(chunk.id):
            return this.number, rows
    return 0, chunk.rows


def present_chunks(plan: Plan, number: int = 0, block: int | None = None) -> set[int]:
    """The chunks that have a part of that round, by listing; with `block`, at least those of this `_BLOCK`."""
    some = "" if block is None else f"{block:04d}"  # of eight digits; longer numbers that begin so are there as well
    found = (chunk_of(info.key, plan.results) for info in plan.store.list(part_prefix(number) + some))
    return {chunk for chunk in found if chunk is not None and chunk < plan.chunks}


def parts_of(plan: Plan, chunks: Sequence[int], number: int = 0) -> Iterator[tuple[int, PartInfo | None]]:
    """Chunks with their parts of the round, asked for at once: each answer of an object store takes a while."""
    keys = (part_key(chunk, number, plan.results) for chunk in chunks)
    with ThreadPoolExecutor(min(_LOOKS, len(chunks)), "parts", initializer=as_here()) as pool:
        yield from zip(chunks, pool.map(lambda key: describe(plan.store, key, plan.hash), keys), strict=True)


def is_complete(plan: Plan, rounds: Sequence[Round]) -> bool:
    """Whether the last round has all of its parts. Raises StorageError."""
    if not rounds:
        return len(present_chunks(plan)) == plan.chunks
    return present_chunks(plan, rounds[-1].number).issuperset(rounds[-1].chunks)


def is_whole(plan: Plan, rounds: Sequence[Round]) -> bool:
    """Whether every part is there that rows have their results in, of all rounds. Lists them; raises StorageError."""
    return next(_lost(plan, rounds), None) is None


def _lost(plan: Plan, rounds: Sequence[Round]) -> Iterator[int]:
    """The round of each part that is not there, unless a later round did all of its chunk's rows."""
    for number in range(len(rounds) + 1):
        present = present_chunks(plan, number)
        for chunk in rounds[number - 1].chunks if number else range(plan.chunks):
            if chunk not in present and _needed(plan.chunk(chunk), rounds)[0][0] <= number:
                yield number


def stopped_round(plan: Plan) -> int:
    """The retry that was begun and is not done, stopped or still at work; 0: none. Raises JobError and StorageError.

    One of which there is a summary was done: where parts of it are missing now, they were lost.
    """
    rounds = load_rounds(plan)
    begun = bool(rounds) and not is_complete(plan, rounds) and not _summed_up(plan, len(rounds))
    return len(rounds) if begun else 0


def numbers_to_do(store: Store, chunk: Chunk, number: int, todo: int, results: ResultFormat = "jsonl") -> list[int]:
    """The row numbers that round `number` of the chunk is about: the `todo` rows without a result before it.

    Raises PartError when the parts before do not agree with that, and StorageError.
    """
    every = range(chunk.first_row, chunk.first_row + chunk.rows)
    if todo == chunk.rows:
        return list(every)
    latest: dict[int, bool] = {}
    for earlier in range(number):
        try:
            records, _ = read_part(store, part_key(chunk.id, earlier, results))
        except ObjectNotFound:  # the chunk has no part in that round
            continue
        latest.update((record["row"], record["error"] is None) for record in records)
    missing = [row for row in every if not latest.get(row, False)]
    if len(missing) != todo:
        raise PartError(
            f"chunk {chunk.id}: {len(missing)} rows have no result, round {number} was begun with {todo}; "
            "a part was changed: put it back"
        )
    return missing


def merged_chunk(plan: Plan, chunk: Chunk, rounds: Sequence[Round], so_far: bool = False) -> MergedChunk:
    """Reads and checks all parts of a chunk. Raises PartError, and StorageError (PartMissing: no part).

    `so_far`: where the part of the last round is not there, the rows have the outcomes of the rounds before.
    """
    if not rounds:
        try:
            part = check(plan.store, chunk, results=plan.results)
        except ObjectNotFound:
            raise PartMissing(plan, chunk, 0, chunk.rows) from None
        return MergedChunk([(0, part)], part.records)
    parts: list[tuple[int, CheckedPart]] = []
    latest: dict[int, dict[str, Any]] = {}
    whole = _needed(chunk, rounds)[0][0]
    for number, rows in _parts_of(chunk, rounds):
        every = list(range(chunk.first_row, chunk.first_row + chunk.rows))
        numbers = every if rows == chunk.rows else [n for n in every if n not in latest or latest[n]["error"]]
        if len(numbers) != rows:
            if number < whole:  # parts before it were lost, so a later round did all rows
                continue
            uri = plan.store.uri(part_key(chunk.id, number, plan.results))
            raise PartError(f"{uri}: round {number} is about {rows} rows, {len(numbers)} have no result before it")
        try:
            part = check(plan.store, chunk, number, numbers, plan.results)
        except ObjectNotFound:
            if number < whole:
                continue
            if so_far and number == rounds[-1].number and len(latest) == chunk.rows:
                continue
            raise PartMissing(plan, chunk, number, rows) from None
        parts.append((number, part))
        latest.update((record["row"], record) for record in part.records)
    return MergedChunk(parts, [latest[row] for row in sorted(latest)])


def _parts_of(chunk: Chunk, rounds: Sequence[Round]) -> Iterator[tuple[int, int]]:
    """The rounds that the chunk belongs to, oldest first, with the number of its rows in each."""
    yield 0, chunk.rows
    for this in rounds:
        if rows := this.rows_of(chunk.id):
            yield this.number, rows


def _needed(chunk: Chunk, rounds: Sequence[Round]) -> list[tuple[int, int]]:
    """Of these, what its outcome follows from: those from the last one that did all of its rows on."""
    needed: list[tuple[int, int]] = []
    for number, rows in _parts_of(chunk, rounds):
        needed = [(number, rows)] if rows == chunk.rows else [*needed, (number, rows)]
    return needed


def failures_by_chunk(plan: Plan, first_row: int = 0) -> Iterator[tuple[Chunk, list[dict[str, Any]]]]:
    """Chunks from the one that holds `first_row` on, and the error records that they have so far, in manifest order.

    The job may be at work. Only the latest outcome of a row counts; chunks without failures are here too, and where
    the summary knows of them, they are not read. Where there is none, parts are listed as far as they are asked for.
    """
    rounds = load_rounds(plan)
    known = _summed_up(plan, len(rounds))
    for block, chunks in groupby(plan.chunks_from(first_row), lambda chunk: chunk.id // _BLOCK):
        present = None if known else [present_chunks(plan, number, block) for number in range(len(rounds) + 1)]
        for chunk in chunks:
            clean = known.get(part_key(chunk.id, last_part(chunk, rounds)[0], plan.results)) == 0
            yield chunk, [] if clean else _failures(plan, chunk, rounds, present)


def _failures(
    plan: Plan, chunk: Chunk, rounds: Sequence[Round], present: Sequence[set[int]] | None
) -> list[dict[str, Any]]:
    """The error records of a chunk. `present`: the chunks that have a part, of each round; None: all that should."""
    latest: dict[int, dict[str, Any]] = {}
    for number, _ in _parts_of(chunk, rounds):
        if present is None or chunk.id in present[number]:
            with suppress(ObjectNotFound):  # a part that was removed, or one that a later round made needless
                records, _ = read_part(plan.store, part_key(chunk.id, number, plan.results))
                latest.update((record["row"], record) for record in records)
    return [latest[row] for row in sorted(latest) if latest[row]["error"] is not None]


def merged_chunks(plan: Plan, so_far: bool = False) -> Iterator[MergedChunk]:
    """Every chunk, checked, in order; a bounded number of them in memory. Raises PartError and StorageError."""
    rounds = load_rounds(plan)
    return each_chunk(plan, lambda chunk: merged_chunk(plan, chunk, rounds, so_far))


def each_chunk(plan: Plan, look: Callable[[Chunk], T]) -> Iterator[T]:
    """What `look`, which reads parts, returns for every chunk, in order; of a bounded number of them at once."""
    chunks = plan.all_chunks()
    readers = 1 if isinstance(plan.store, LocalStore) else _READERS  # reading takes longer than checking, or less
    with ThreadPoolExecutor(readers, "parts", initializer=as_here()) as pool:
        while window := list(islice(chunks, _WINDOW)):
            yield from pool.map(look, window)


def latest_records(plan: Plan) -> Iterator[dict[str, Any]]:
    """The records of an output in manifest order, exactly one per row, the latest round's.

    In memory at once: the records of `_WINDOW` chunks. Raises PartError when something is missing or wrong.
    """
    for chunk in merged_chunks(plan):
        yield from chunk.records
