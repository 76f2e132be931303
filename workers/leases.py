"""Keeps the worker's leases alive and its presence known, from a thread that does no other work."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from orchestrator.errors import BlipBatchError
from orchestrator.ledger import Lease, Ledger
from orchestrator.settings import Settings

_log = logging.getLogger(__name__)

_REPORT_SECONDS: Final = 1.0  # how often rows done are reported: progress bars live on it
_PRESENCE_SECONDS: Final = 5.0


@dataclass(slots=True)
class Held:
    """A lease in hand. The chunk's thread tells of rows `done` and asks `lost`; the keeper does the rest."""

    lease: Lease
    deadline: float  # by our monotonic clock, from before the lease was asked for: never later than Redis's
    renew_seconds: float
    rows_done: int = 0
    refused: bool = False  # Redis gave it to someone else, or the job is not to go on
    started: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)  # when a row of it was last done; at first, when it began

    def done(self, rows: int) -> None:
        """So many of its rows are done by now."""
        if rows != self.rows_done:
            self.rows_done, self.moved = rows, time.monotonic()

    @property
    def lost(self) -> bool:
        """Stop working on it: lost, or so near its end (after a long stop, say) that a write could come too late."""
        return self.refused or time.monotonic() > self.deadline - self.renew_seconds


class LeaseKeeper:
    """Renews every held lease about once a second, with its row count, until `stop`."""

    def __init__(self, ledger: Ledger, settings: Settings, worker: str, info: Mapping[str, Any]) -> None:
        self._thread = threading.Thread(target=self._main, name="leases", daemon=True)
        self._ledger, self._settings, self._worker, self._info = ledger, settings, worker, info
        self._held: dict[int, Held] = {}
        self._stopping = threading.Event()

    @contextmanager
    def holding(self, lease: Lease, asked_at: float) -> Iterator[Held]:
        """The lease is renewed while the block runs. `asked_at`: monotonic time just before it was acquired."""
        held = Held(lease, asked_at + self._settings.lease_seconds, self._settings.renew_seconds)
        self._held[id(held)] = held
        try:
            yield held
        finally:
            del self._held[id(held)]

    def held(self) -> list[Held]:
        """The leases in hand."""
        return list(self._held.values())

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def _main(self) -> None:
        # Outlasts a Redis that is away: leases then run out by themselves, and their chunks are abandoned.
        pause = min(_REPORT_SECONDS, self._settings.renew_seconds)
        seen = -_PRESENCE_SECONDS
        while not self._stopping.is_set():
            try:
                if time.monotonic() - seen >= _PRESENCE_SECONDS:
                    seen = time.monotonic()
                    self._ledger.worker_seen(self._worker, self._info)
                for held in self.held():
                    self._renew(held)
            except BlipBatchError as error:
                _log.warning("leases not renewed: %s", error)
            except Exception:  # a bug must not silently stop the renewals
                _log.exception("leases not renewed")
            self._stopping.wait(pause)

    def _renew(self, held: Held) -> None:
        before = time.monotonic()
        if held.refused:
            return
        if self._ledger.renew(held.lease, held.rows_done):
            held.deadline = before + self._settings.lease_seconds
        else:
            held.refused = True

    def stop(self) -> None:
        """Ends the thread; leases still held run out."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
