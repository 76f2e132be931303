"""Which requests run together: policy only, no tensors.

Requests of one model, task and options form a group, whichever job they come from. The group whose oldest request
waited longest goes next. A batch is padded to a fixed shape, so a half-empty one costs as much as a full one: the
batcher waits for more while they keep coming, but not longer than `patience`.
"""

import threading
import time
from collections import deque
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar


class Batchable(Protocol):
    """What the batcher needs to know of an entry."""

    @property
    def group(self) -> Hashable:
        """Entries of equal groups may share a batch."""

    @property
    def capacity(self) -> int:
        """How many entries a batch of its group has."""


EntryT = TypeVar("EntryT", bound=Batchable)


class Batcher(Generic[EntryT]):
    """A queue that gives out batches. `put` from any thread, `take` from one."""

    def __init__(self, patience: float = 0.02) -> None:
        self._patience = patience  # seconds a batch waits for its next entry before it goes half-empty
        self._groups: dict[Hashable, deque[tuple[float, EntryT]]] = {}
        self._changed = threading.Condition()
        self._closed = False

    def put(self, entry: EntryT) -> bool:
        """Queue an entry; False if the batcher is closed."""
        with self._changed:
            if self._closed:
                return False
            self._groups.setdefault(entry.group, deque()).append((time.monotonic(), entry))
            self._changed.notify()
            return True

    def take(self) -> list[EntryT] | None:
        """The next batch, at least one entry; waits for it. None once closed and empty."""
        with self._changed:
            while True:
                if not self._groups:
                    if self._closed:
                        return None
                    self._changed.wait()
                    continue
                group = min(self._groups, key=lambda g: self._groups[g][0][0])
                waiting = self._time_left(self._groups[group])
                if waiting <= 0:
                    return self._cut(group)
                self._changed.wait(waiting)

    def close(self) -> None:
        """Take no more; what is queued is still given out."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _time_left(self, queue: deque[tuple[float, EntryT]]) -> float:
        first = queue[0][1]
        if self._closed or len(queue) >= first.capacity:
            return 0.0
        return queue[-1][0] + self._patience - time.monotonic()

    def _cut(self, group: Hashable) -> list[EntryT]:
        queue = self._groups[group]
        batch = [queue.popleft()[1] for _ in range(min(len(queue), queue[0][1].capacity))]
        if not queue:
            del self._groups[group]
        return batch
