"""Loader processes: they fetch, decode and resize images into shared-memory slots.

One item in a child's hands and one queued behind it. A child that crashes or hangs is killed and replaced; that costs
exactly the image in its hands: at once if it hung, and at the second crash, for the first may be another's doing (the
kernel's, when memory runs out). This module is what a loader process imports: neither torch nor celery.
"""

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Final

from .children import Child, Supervisor
from .messages import Failure
from .slots import DECODING, FETCHING, Slots

_log = logging.getLogger(__name__)

QUEUED: Final = 2  # items sent to a child: the one in its hands and the next
_CRASHES: Final = 2  # until the image is to blame
_DEATHS_AT_START: Final = 5  # in a row: the loaders cannot work at all


@dataclass(frozen=True, slots=True)
class LoaderLimits:
    """What one image may cost."""

    max_bytes: int  # of the encoded image
    max_pixels: int
    fetch_timeout: float  # seconds, for the storage client
    hang_timeout: float  # seconds in a child's hands, after which the child is killed


@dataclass(slots=True)
class _Item:
    slot: int
    location: Any  # what orchestrator.storage.fetch takes
    size: tuple[int, int]
    replies: "SimpleQueue[tuple[Any, Any]]"
    token: object
    crashes: int = 0  # of loaders that had it in their hands

    def settle(self, outcome: Failure | None) -> None:
        self.replies.put((self.token, outcome))


@dataclass(slots=True)
class _Loader:
    child: Child
    ready: bool = False
    items: deque[_Item] = field(default_factory=deque)
    since: float = 0.0  # when the first item came into its hands


def loader_count(wanted: int) -> int:
    """`wanted`, or where that is 0: one for each two cores, at most 8."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return wanted or max(1, min(8, cores // 2))


class LoaderPool(Supervisor):
    """`count` loader processes behind one thread."""

    def __init__(self, count: int, slots: Slots, limits: LoaderLimits, broken: Callable[[str], None]) -> None:
        super().__init__("loaders", broken)
        self._count, self._slots, self._limits = count, slots, limits
        self._loaders: list[_Loader] = []
        self._backlog: deque[_Item] = deque()
        self._deaths_at_start = 0
        self.restarts = 0

    def load(
        self,
        slot: int,
        location: Any,
        size: tuple[int, int],
        replies: "SimpleQueue[tuple[Any, Any]]",
        token: object,
    ) -> None:
        """Put the image at `location`, resized to (height, width), into `slot`.

        `(token, None)` or `(token, Failure)` then comes through `replies`; after it the slot is the caller's again.
        """
        item = _Item(slot, location, size, replies, token)
        self._call(lambda: self._accept(item))

    def pids(self) -> list[int]:
        """The loaders' process ids now."""
        return [loader.child.pid for loader in list(self._loaders)]

    def _open(self) -> None:
        for _ in range(self._count):
            self._spawn()

    def _spawn(self) -> None:
        loader = _Loader(Child("blip-loader", loader_main, self._slots, self._limits))
        self._loaders.append(loader)
        self._watch(loader.child.pipe, loader)

    def _accept(self, item: _Item) -> None:
        self._backlog.append(item)
        if len(self._backlog) == 1:  # otherwise every loader is full already
            for depth in range(1, QUEUED + 1):
                for loader in self._loaders:
                    self._feed(loader, depth)

    def _feed(self, loader: _Loader, depth: int = QUEUED) -> None:
        while self._backlog and loader.ready and len(loader.items) < depth:
            item = self._backlog.popleft()
            self._slots.set_phase(item.slot, FETCHING)
            if not loader.items:
                loader.since = time.monotonic()
            loader.items.append(item)
            try:
                loader.child.pipe.send((item.slot, item.location, item.size))
            except OSError:  # it died; its end of file is about to be read and settles the item
                return

    def _readable(self, owner: _Loader) -> None:
        try:
            message = owner.child.pipe.recv()
        except (EOFError, OSError):  # the child died: `_replace` settles or keeps its items
            self._replace(owner, "crashed", "the loader process died on this image")
            return
        if not owner.ready:
            self._started(owner, message)
        elif owner.items:
            owner.items.popleft().settle(message)
            owner.since = time.monotonic()
        self._feed(owner)

    def _started(self, loader: _Loader, message: str | None) -> None:
        if message is None:
            loader.ready = True
            self._deaths_at_start = 0
        else:
            self._broken(f"a loader process cannot start: {message}")

    def _replace(self, loader: _Loader, code: str, message: str) -> None:
        self._loaders.remove(loader)
        self._unwatch(loader.child.pipe)
        ending = loader.child.end(0.2 if code == "crashed" else 0.0)
        _log.warning("loader %s replaced (%s): %s", "at work" if loader.items else "idle", ending, message)
        if loader.items:
            loader.items[0].crashes += 1
            if code != "crashed" or loader.items[0].crashes >= _CRASHES:
                loader.items.popleft().settle(Failure(code, f"{message} ({ending})"))
        self._backlog.extendleft(reversed(loader.items))
        self._deaths_at_start += not loader.ready
        self.restarts += 1
        if self._deaths_at_start >= _DEATHS_AT_START:
            self._broken(f"loader processes die at start ({ending})")
        elif not self._closing:
            self._spawn()

    def _tick(self, now: float) -> None:
        for loader in list(self._loaders):
            if loader.items and now - loader.since > self._limits.hang_timeout:
                self._replace(loader, *self._hanging(loader.items[0]))

    def _hanging(self, item: _Item) -> tuple[str, str]:
        seconds = f"{self._limits.hang_timeout:g} seconds"
        if self._slots.phase(item.slot) == DECODING:
            return "image_unreadable", f"decoding took more than {seconds}"
        return "fetch_timeout", f"fetching took more than {seconds}"

    def _shut(self) -> None:
        for loader in self._loaders:
            loader.child.end()
        self._loaders.clear()


def loader_main(pipe: Connection, slots: Slots, limits: LoaderLimits) -> None:
    """The loader process: says `None` when it is ready, then answers each (slot, location, size) in order."""
    try:
        from .load import load_into  # noqa: PLC0415 - an absent Pillow or numpy becomes one clear line
    except ImportError as error:
        pipe.send(f"{error}; install blip-batch[worker]")
        return
    pipe.send(None)
    while True:
        slot, location, size = pipe.recv()
        pipe.send(load_into(slots, slot, location, size, limits))
