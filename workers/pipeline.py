"""From rows to records: fetch, decode and resize in the loaders, run in the engine, one record per row in row order.

Each chunk is an event loop in its Celery thread. Images in flight are bounded by the lane's slots, whatever the
number of rows; rows of a chunk that share an image share one load and one vision pass.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, groupby
from queue import Empty, SimpleQueue
from typing import Any, Final

from blip_engine.requests import Options, Result, Task, result_record
from orchestrator.contract import BadRow, Row, error_row, result_row
from orchestrator.errors import BlipBatchError, FetchError
from orchestrator.fastjson import is_json

from .engine_process import EngineProcess
from .loader import LoaderPool
from .messages import Checkpoint, Failure, Run

_MOST_TEXTS: Final = 256  # in one run; more rows about an image make another one, with a vision pass of its own
_TOGETHER: Final = 64  # rows of a turn, after a death: few to go alone after the next one, many enough for full batches
_GROUPS_BLAMED: Final = 3  # until every row goes alone
_CHECK_SECONDS: Final = 0.5  # between two looks at whether to go on, when nothing comes in


@dataclass(frozen=True, slots=True)
class JobContext:
    """What the rows of one job have in common."""

    task: Task
    options: Options
    checkpoint: Checkpoint
    locate: Callable[[str], Any]  # a row's image -> what the loaders fetch; raises FetchError


@dataclass(slots=True)
class _Flight:
    """One image in a slot, and the rows that are about it."""

    chunk: "ChunkRun"
    location: Any
    rows: list[Row]
    slot: int = -1
    size: tuple[int, int] | None = None  # of the image in the slot, once it is there
    later: deque[list[Row]] = field(default_factory=deque)  # to be run after `rows`, from the same slot

    def texts(self) -> tuple[str, ...]:
        """Every distinct text of the rows."""
        if len(self.rows) == 1 and len(self.rows[0].texts) == 1:
            return self.rows[0].texts
        return tuple(dict.fromkeys(text for row in self.rows for text in row.texts))

    def split(self) -> None:
        """Leave in `rows` those of the first run: it has one list of answers to choose from, and so many texts."""
        if len(self.rows) == 1:
            return
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.candidates, []).append(row)
        runs: list[list[Row]] = []
        for rows in groups.values():
            room = 0
            for row in rows:
                if len(row.texts) > room:
                    runs.append([])
                    room = _MOST_TEXTS
                runs[-1].append(row)
                room -= len(row.texts)
        self.rows, *others = runs
        self.later.extend(others)


class Lane:
    """A Celery thread's share of the slots. It outlives chunks: what an abandoned chunk has in flight still lands."""

    def __init__(self, slots: Sequence[int], loaders: LoaderPool, engine: EngineProcess) -> None:
        self._free = list(slots)
        self._loaders, self._engine = loaders, engine
        self._replies: SimpleQueue[tuple[_Flight, Any]] = SimpleQueue()

    def run(self, chunk: "ChunkRun") -> list[dict[str, Any]]:
        """The chunk's records, in row order.

        Passes on what `chunk.check` raises, to abandon it, and what kept a loader from fetching any image.
        """
        waiting = deque(chunk.flights())
        while chunk.rows_done < len(chunk.rows):
            while waiting and self._free and chunk.takes(waiting[0].rows):
                self._start(waiting.popleft())
            with suppress(Empty):  # nothing yet: `check` decides whether to wait on
                self._land(*self._replies.get(timeout=_CHECK_SECONDS), chunk)
            chunk.check()
        return chunk.records

    def _start(self, flight: _Flight) -> None:
        chunk = flight.chunk
        chunk.before(flight.rows)
        flight.split()
        chunk.flying += 1
        flight.slot = self._free.pop()
        self._loaders.load(flight.slot, flight.location, chunk.job.checkpoint.image_size, self._replies, flight)

    def _land(self, flight: _Flight, outcome: Any, current: "ChunkRun") -> None:
        """One answer of a loader (a size, Failure or exception) or of the engine (results or Failure)."""
        if flight.chunk is current and self._goes_on(flight, outcome) and flight.size is not None:
            run = Run(
                current.job.checkpoint.name, current.job.task, flight.slot, flight.size, flight.texts(),
                current.job.options, flight.rows[0].candidates, current.job.checkpoint.judge,
            )  # fmt: skip
            self._engine.submit(run, self._replies, flight)
        else:
            flight.chunk.flying -= 1
            self._free.append(flight.slot)
            if flight.chunk is current and isinstance(outcome, BlipBatchError):
                raise outcome

    def _goes_on(self, flight: _Flight, outcome: Any) -> bool:
        """Settle rows; whether `flight.rows` are to be run (again)."""
        if isinstance(outcome, tuple):
            flight.size = outcome
            return True
        if isinstance(outcome, BlipBatchError):
            return False
        if isinstance(outcome, Failure):
            if flight.size is None:
                flight.chunk.fail([*flight.rows, *chain.from_iterable(flight.later)], outcome)
                return False
            if len(flight.rows) > 1 and outcome.code != "crashed":
                flight.later.extend([row] for row in flight.rows)  # perhaps one row's text is at fault: find it
            else:
                flight.chunk.fail(flight.rows, outcome)
        else:
            flight.chunk.finish(flight.rows, dict(zip(flight.texts(), outcome, strict=True)))
        if flight.later:
            flight.rows = flight.later.popleft()
            return True
        return False


class ChunkRun:
    """The rows of a chunk on their way to records."""

    def __init__(self, job: JobContext, rows: Sequence[Row | BadRow], check: Callable[[], None]) -> None:
        """`check` is called often and raises to abandon the chunk."""
        self.job, self.rows, self.check = job, rows, check
        self.rows_done = 0
        self.flying = 0
        #: In row order; complete once `rows_done` is the number of rows.
        self.records: list[dict[str, Any]] = [{}] * len(rows)
        self._places = {row.number: place for place, row in enumerate(rows)}  # in a retry, rows have gaps

    def takes(self, _rows: list[Row]) -> bool:
        """Whether to begin with these rows now. The lane's slots are the bound."""
        return True

    def before(self, rows: list[Row]) -> None:
        """Called before these rows are worked on."""

    def flights(self) -> Iterable[_Flight]:
        """The images to load. Rows that need no work are settled here."""
        return self._flights(self.rows)

    def _flights(self, rows: Iterable[Row | BadRow]) -> Iterable[_Flight]:
        flights: dict[Any, _Flight] = {}  # by location: an image may have several names
        places: dict[str, Any] = {}  # by name
        for row in rows:
            if isinstance(row, BadRow):
                self._settle(row, error_row(row, self.job.task, row.code, row.message))
            elif (location := places.get(row.image) or self._locate(row)) is not None:
                places[row.image] = location
                if location not in flights:
                    flights[location] = _Flight(self, location, [])
                flights[location].rows.append(row)
        yield from flights.values()

    def _locate(self, row: Row) -> Any:
        try:
            return self.job.locate(row.image)
        except FetchError as error:  # the row gets the record; nothing is fetched
            self.fail([row], Failure(error.code, str(error)))
            return None

    def fail(self, rows: Iterable[Row], failure: Failure) -> None:
        """These rows end as error records."""
        for row in rows:
            self._settle(row, error_row(row, self.job.task, failure.code, failure.message))  # type: ignore[arg-type]

    def finish(self, rows: Iterable[Row], results: dict[str, Result]) -> None:
        """These rows have results, by text."""
        task = self.job.task
        for row in rows:
            mine = result_record(task, [results[text] for text in row.texts], row.several)
            if is_json(mine):
                self._settle(row, result_row(row, task, mine))
            else:
                self.fail([row], Failure("internal", "the model's result is not a finite number"))

    def _settle(self, row: Row | BadRow, record: dict[str, Any]) -> None:
        self.records[self._places[row.number]] = record
        self.rows_done += 1


class CarefulRun(ChunkRun):
    """For a chunk whose worker died: in turns, each of which gets the blame for a death meanwhile.

    A turn is a group of rows, as fast as ever, or a row alone: in a small chunk, and in a group that has the blame.
    When several groups have it nobody knows whether it is their rows or their number, and every row goes alone.
    """

    def __init__(
        self,
        job: JobContext,
        rows: Sequence[Row | BadRow],
        check: Callable[[], None],
        blame: Callable[[int], None],
        condemned: Mapping[int, str],
        blamed: Collection[int] = (),
    ) -> None:
        """`blame(turn)` is called before each turn: a row's number, or `~` that of a group's first row.

        `condemned` rows fail at once, for the reason given; `blamed` are the turns that a worker died in before.
        """
        super().__init__(job, rows, check)
        self._blame, self._condemned = blame, condemned
        self._turns = _turns(rows, blamed)
        self._turn: int | None = None

    def takes(self, rows: list[Row]) -> bool:
        return self.flying == 0 or self._turns[rows[0].number] == self._turn

    def before(self, rows: list[Row]) -> None:
        if (turn := self._turns[rows[0].number]) != self._turn:
            self._blame(turn)
            self._turn = turn

    def flights(self) -> Iterable[_Flight]:
        for _, rows in groupby(self.rows, lambda row: self._turns[row.number]):
            yield from self._flights(row for row in rows if not self._fails(row))

    def _fails(self, row: Row | BadRow) -> bool:
        why = self._condemned.get(row.number)
        if why is None or isinstance(row, BadRow):
            return False
        self.fail([row], Failure("crashed", why))
        return True


def _turns(rows: Sequence[Row | BadRow], blamed: Collection[int]) -> dict[int, int]:
    """The turn of each row, by its number."""
    turns: dict[int, int] = {}
    alone = len(rows) <= _TOGETHER or sum(turn < 0 for turn in blamed) >= _GROUPS_BLAMED
    for start in range(0, len(rows), _TOGETHER):
        group = rows[start : start + _TOGETHER]
        turn = ~group[0].number
        turns |= {row.number: row.number if alone or turn in blamed else turn for row in group}
    return turns
