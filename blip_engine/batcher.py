"""Which requests run together: policy only, no tensors.

Requests of one model, task and options form a group, whichever job they come from. The group whose oldest request
waited longest goes next. A batch is padded to a fixed shape, so a half-empty one costs as much as a full one: the
batcher waits for more while they keep coming, but not longer than `patience`.
"""

import threading
import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar


class Batchable(Protocol):
    """What the batcher needs to know of an entry."""

    @property
    def group(self) -> Hashable:
        """Entries of equal groups may share a batch."""

    @property
    def weight(self) -> int:
        """Its share of a batch."""

    @property
    def capacity(self) -> int:
        """The weight that a batch of its group has."""

    @property
    def least(self) -> int:
        """Entries that a batch should have: for them it may be heavier than its capacity, up to OVERWEIGHT times."""


#: So that no batch takes so long that it looks like a hang.
OVERWEIGHT: Final = 4


EntryT = TypeVar("EntryT", bound=Batchable)


@dataclass(slots=True)
class _Queue(Generic[EntryT]):
    """The entries of a group, each with the time it came."""

    entries: deque[tuple[float, EntryT]] = field(default_factory=deque)
    weight: int = 0  # of all


class Batcher(Generic[EntryT]):
    """A queue that gives out batches. `put` from any thread, `take` from one."""

    def __init__(self, patience: float = 0.02) -> None:
        self._patience = patience  # seconds a batch waits for its next entry before it goes half-empty
        self._groups: dict[Hashable, _Queue[EntryT]] = {}
        self._changed = threading.Condition()
        self._closed = False

    def put(self, entry: EntryT) -> bool:
        """Queue an entry; False if the batcher is closed."""
        with self._changed:
            if self._closed:
                return False
            queue = self._groups.setdefault(entry.group, _Queue())
            queue.entries.append((time.monotonic(), entry))
            queue.weight += entry.weight
            self._changed.notify()
            return True

    def take(self, wait: bool = True) -> list[EntryT] | None:
        """The next batch, at least one entry; waits for it. None once closed and empty.

        With `wait` off it returns at once: None also if no batch is due yet.
        """
        with self._changed:
            while True:
                waiting: float | None = None
                if self._groups:
                    group = min(self._groups, key=lambda g: self._groups[g].entries[0][0])
                    waiting = self._time_left(self._groups[group])
                    if waiting <= 0:
                        return self._cut(group)
                elif self._closed:
                    return None
                if not wait:
                    return None
                self._changed.wait(waiting)

    def close(self) -> None:
        """Take no more; what is queued is still given out."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _time_left(self, queue: "_Queue[EntryT]") -> float:
        first = queue.entries[0][1]
        enough = queue.weight >= first.capacity and len(queue.entries) >= first.least
        if self._closed or enough or queue.weight >= OVERWEIGHT * first.capacity:
            return 0.0
        return queue.entries[-1][0] + self._patience - time.monotonic()

    def _cut(self, group: Hashable) -> list[EntryT]:
        queue = self._groups[group]
        batch: list[EntryT] = []
        weight = 0
        while queue.entries:
            entry = queue.entries[0][1]
            room = entry.capacity * (OVERWEIGHT if len(batch) < entry.least else 1)
            if batch and weight + entry.weight > room:
                break
            batch.append(queue.entries.popleft()[1])
            weight += entry.weight
        queue.weight -= weight
        if not queue.entries:
            del self._groups[group]
        return batch
