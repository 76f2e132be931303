"""Whether this worker is alive, which means that it consumes, and whether it is ready. For probes: see `metrics`.

A process that answers may still be useless: hung over a row, or deaf to its queue after a connection that half closed.
So it is unwell when a chunk in hand stands still for longer than its own watchdogs would allow, or when hints wait and
an idle thread takes none. What a restart cannot mend (Redis or the store away, a model's slow download) is no reason.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from orchestrator.errors import RedisUnavailable
from orchestrator.settings import Settings

from .worker import Worker

_log = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 5.0  # how often the queue is looked at
DEAF_SECONDS: Final = 120.0  # hints wait, nothing is taken


class Health:
    """Judges one worker. `problem` and `unready` are quick and ask nobody: a thread looks at the queue."""

    def __init__(self, worker: Worker, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds; another one for tests."""
        self._worker, self._settings, self._clock = worker, settings, clock
        self._consuming = False
        self._engine: tuple[tuple[bool, int, int] | None, float] = None, clock()  # what it is at, and since when
        self._passed_over: tuple[int, float] | None = None  # hints taken when some began to wait, and when that was
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="health", daemon=True)

    def consuming(self) -> None:
        """The worker takes hints from now on: it is ready, and what waits is its business."""
        if not self._consuming:
            self._consuming = True
            self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def unready(self) -> str | None:
        """Why it takes no work; None: it does."""
        if self._worker.faulty.is_set():
            return self._worker.fault
        if self._worker.draining:
            return "draining"
        return None if self._consuming else "starting"

    def problem(self) -> str | None:
        """Why it should be restarted; None: it should not."""
        if self._worker.draining or self._worker.faulty.is_set():  # it is about to end by itself
            return None
        return self._stuck() or self._deaf()

    def _stuck(self) -> str | None:
        loading, since = self._watch_engine()
        now, patience = self._clock(), self._patience(loading)
        still = [now - max(one.moved, since) for one in self._worker.held()]
        if still and min(still) >= patience:
            return f"no row of {len(still)} chunks in hand was done for {min(still):.0f} s"
        if still and max(still) >= patience * len(still):  # its images may be in the line behind those of the others
            return f"no row of a chunk in hand was done for {max(still):.0f} s, while others moved"
        return None

    def _watch_engine(self) -> tuple[bool, float]:
        """Whether it loads, and since when what waits for it has to be done: since a load's end or its replacement."""
        engine = self._worker.engine
        state = engine.loading, engine.loads, engine.restarts
        if state != self._engine[0]:
            self._engine = state, self._clock()
        return state[0], self._engine[1]

    def _patience(self, loading: bool) -> float:
        """Longer than the worker's own watchdogs need to end what hangs."""
        settings = self._settings
        hang = settings.model_timeout_seconds if loading else settings.engine_timeout_seconds
        return hang + settings.loader_timeout_seconds + 2 * settings.storage_retry_seconds

    def _deaf(self) -> str | None:
        passed_over = self._passed_over
        if passed_over is None or self._clock() - passed_over[1] < DEAF_SECONDS:
            return None
        return f"hints wait, and none was taken for {self._clock() - passed_over[1]:.0f} s"

    def _main(self) -> None:
        while not self._stopping.wait(_LOOK_SECONDS):
            try:
                self.look()
            except Exception:  # a bug here must not make a working worker look dead
                self._passed_over = None
                _log.exception("the queue was not looked at")

    def look(self) -> None:
        """Notes what the engine is at, and whether hints wait that an idle thread of this worker could take."""
        self._watch_engine()
        taken = self._worker.hints_taken
        idle = len(self._worker.held()) < self._settings.worker_threads
        try:
            waiting = idle and self._worker.hints_waiting()
        except RedisUnavailable:  # no restart mends that, and what waited before is not known to wait
            waiting = False
        if not waiting:
            self._passed_over = None
        elif self._passed_over is None or self._passed_over[0] != taken:
            self._passed_over = taken, self._clock()
