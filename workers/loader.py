"""Loader processes: they fetch, decode and resize images into shared-memory slots.

A child fetches several images ahead while it decodes one. One that crashes or hangs is killed and replaced; that costs
exactly the image it was at: at once if it hung, and at the second crash, for the first may be another's doing (the
kernel's, when memory runs out). This module is what a loader process imports: neither torch nor celery.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

from orchestrator.errors import BlipBatchError

from .children import Child, Supervisor
from .cpus import usable_cpus
from .messages import Ask, Failure, Loaded
from .slots import ASKED, DECODING, FETCHING, Slots

_log = logging.getLogger(__name__)

_BEHIND: Final = 2  # items sent to a child beside those it may fetch: one to decode, one to fetch next
_CRASHES: Final = 2  # until the image is to blame
_DEATHS_AT_START: Final = 5  # in a row: the loaders cannot work at all


@dataclass(frozen=True, slots=True)
class LoaderLimits:
    """What one image may cost."""

    max_bytes: int  # of the encoded image
    max_pixels: int
    fetch_timeout: float  # seconds, for the storage client
    hang_timeout: float  # seconds of fetching or decoding it, after which the child is killed
    fetches: int = 8  # images that a child fetches at once
    resize: bool = True  # to the size that is asked for; else only what does not fit a slot
    draft: bool = False  # JPEGs may be decoded smaller, to no less than twice that size


@dataclass(slots=True)
class _Item:
    ask: Ask
    replies: "SimpleQueue[tuple[Any, Any]]"
    token: object
    crashes: int = 0  # of loaders that were at it
    phase: int = ASKED  # as it was seen last
    since: float = 0.0  # when it was first seen so

    def settle(self, outcome: "Failure | tuple[int, int] | BlipBatchError") -> None:
        self.replies.put((self.token, outcome))


@dataclass(slots=True)
class _Loader:
    child: Child
    ready: bool = False
    items: dict[int, _Item] = field(default_factory=dict)  # by slot, in the order they were sent
    since: float = 0.0  # when it last gave a sign of life


def loader_count(wanted: int, device: str = "auto") -> int:
    """`wanted`, or where that is 0: one for each two cores, at most 8; beside a GPU all cores but two, at most 32.

    Cores are those that this process may use, a container's CPU limit included.
    """
    cores = usable_cpus()
    on_gpu = device != "cpu" and any(Path("/dev").glob("nvidia[0-9]*"))
    return wanted or max(1, min(32, cores - 2) if on_gpu else min(8, cores // 2))


class LoaderPool(Supervisor):
    """`count` loader processes behind one thread."""

    def __init__(
        self,
        count: int,
        slots: Slots,
        limits: LoaderLimits,
        broken: Callable[[str], None],
        observe: Callable[[Loaded], None] = lambda _: None,
    ) -> None:
        """`observe` is told (in the thread) what every image took."""
        super().__init__("loaders", broken)
        self._count, self._slots, self._limits, self._observe = count, slots, limits, observe
        self._depth = limits.fetches + _BEHIND
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

        `(token, its size there)` or `(token, Failure)` then comes through `replies`; after it the slot is the caller's.
        `(token, BlipBatchError)`: no image can be fetched at present, and it is not this one's fault.
        """
        item = _Item(Ask(slot, location, size), replies, token)
        self._call(lambda: self._backlog.append(item))

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

    def _pump(self) -> None:
        """Give what waits to those who have least, in one message each."""
        given: dict[int, list[_Item]] = {}
        ready = [loader for loader in self._loaders if loader.ready]
        while self._backlog and ready:
            place = min(range(len(ready)), key=lambda n: len(ready[n].items))
            if len(ready[place].items) >= self._depth:
                break
            item = self._backlog.popleft()
            ready[place].items[item.ask.slot] = item
            given.setdefault(place, []).append(item)
        for place, items in given.items():
            self._give(ready[place], items)

    def _give(self, loader: _Loader, items: list[_Item]) -> None:
        if len(loader.items) == len(items):  # it had nothing to do
            loader.since = time.monotonic()
        for item in items:
            item.phase = ASKED
            self._slots.set_phase(item.ask.slot, ASKED)
        loader.child.send([item.ask for item in items])  # where it died, its end of file deals with the items

    def _readable(self, owner: _Loader) -> None:
        try:
            message = owner.child.pipe.recv()
        except (EOFError, OSError):  # the child died, or hangs in mid-message: `_replace` settles or keeps its items
            self._replace(owner, "crashed", "the loader process died on this image")
            return
        owner.since = time.monotonic()
        if not owner.ready:
            self._started(owner, message)
            return
        for loaded in message:
            self._observe(loaded)
            owner.items.pop(loaded.slot).settle(loaded.outcome)

    def _started(self, loader: _Loader, message: str | None) -> None:
        if message is None:
            loader.ready = True
            self._deaths_at_start = 0
        else:
            self._broken(f"a loader process cannot start: {message}")

    def _replace(self, loader: _Loader, code: str, message: str, guilty: _Item | None = None) -> None:
        """Kill it and start another. `guilty` hung; where none did, the image that it was at may have killed it."""
        self._loaders.remove(loader)
        self._unwatch(loader.child.pipe)
        ending = loader.child.end(0.2 if guilty is None else 0.0)
        _log.warning("loader %s replaced (%s): %s", "at work" if loader.items else "idle", ending, message)
        suspect = guilty or self._at_hand(loader)
        if suspect is not None:
            suspect.crashes += 1
            if suspect is guilty or suspect.crashes >= _CRASHES:
                loader.items.pop(suspect.ask.slot).settle(Failure(code, f"{message} ({ending})"))
        self._backlog.extendleft(reversed(loader.items.values()))
        self._deaths_at_start += not loader.ready
        self.restarts += 1
        if self._deaths_at_start >= _DEATHS_AT_START:
            self._broken(f"loader processes die at start ({ending})")
        elif not self._closing:
            self._spawn()

    def _at_hand(self, loader: _Loader) -> _Item | None:
        """What it decodes, or else what it has been fetching for longest."""
        for phase in (DECODING, FETCHING, ASKED):
            for item in loader.items.values():
                if self._slots.phase(item.ask.slot) == phase:
                    return item
        return None  # all is loaded, only the answers were lost

    def _tick(self, now: float) -> None:
        for loader in list(self._loaders):
            if (item := self._hanging(loader, now)) is not None:
                decoding = self._slots.phase(item.ask.slot) == DECODING
                code, what = ("image_unreadable", "decoding") if decoding else ("fetch_timeout", "fetching")
                self._replace(loader, code, f"{what} took more than {self._limits.hang_timeout:g} seconds", item)

    def _hanging(self, loader: _Loader, now: float) -> _Item | None:
        """The image that keeps it for too long."""
        for item in loader.items.values():
            if (phase := self._slots.phase(item.ask.slot)) != item.phase:
                item.phase, item.since, loader.since = phase, now, now
            elif phase in {FETCHING, DECODING} and now - item.since > self._limits.hang_timeout:
                return item
        stuck = loader.items and now - loader.since > self._limits.hang_timeout  # it does not even begin
        return self._at_hand(loader) or next(iter(loader.items.values())) if stuck else None

    def _shut(self) -> None:
        for loader in self._loaders:
            loader.child.end()
        self._loaders.clear()


def loader_main(pipe: Connection, slots: Slots, limits: LoaderLimits) -> None:
    """The loader process: says None when it is ready, then answers lists of Ask with lists of Loaded."""
    try:
        from .load import Loads  # noqa: PLC0415 - an absent Pillow or numpy becomes one clear line
    except ImportError as error:
        pipe.send(f"{error}; install blip-batch[worker]")
        return
    pipe.send(None)
    Loads(pipe, slots, limits).serve()
