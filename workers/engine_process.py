"""The worker's handle on the engine process: sends it work, survives its death, finds the image that kills it.

When the process dies, it is started again and everything it held is run once more, one image at a time. What kills
it alone is guilty and fails with `crashed`; everybody else gets a result. The pixels are still in their slots.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Final

from blip_engine.errors import CheckpointError
from blip_engine.requests import BatchReport, Task

from .children import Child, Supervisor
from .engine_child import UNEXPECTED, engine_main
from .messages import Checkpoint, Failure, Load, Run
from .slots import Slots

_log = logging.getLogger(__name__)

_DEATHS_AT_START: Final = 3  # in a row: the engine cannot work at all
_LOAD_TRIES: Final = 2  # deaths while one checkpoint is loading, before the load is refused


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How the engine is built, and how long it may be silent (seconds)."""

    factory: str
    device: str
    precision: str
    run_timeout: float  # over work that it holds
    load_timeout: float  # over a checkpoint
    compiled: bool | None = None  # whether the vision tower is; None: on a GPU


@dataclass(slots=True)
class _Job:
    run: Run
    replies: "SimpleQueue[tuple[Any, Any]]"
    token: object

    def settle(self, outcome: object) -> None:
        self.replies.put((self.token, outcome))


@dataclass(slots=True)
class _Loading:
    load: Load
    checkpoint: Checkpoint | None = None  # once it is resident
    waiting: "list[Future[Checkpoint]]" = field(default_factory=list)
    deaths: int = 0  # of the process, while this was loading

    def settle(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        for future in self.waiting:
            future.set_result(checkpoint)
        self.waiting.clear()

    def refuse(self, why: str) -> None:
        for future in self.waiting:
            future.set_exception(CheckpointError(why))


class EngineProcess(Supervisor):
    """One engine process behind one thread, which alone touches the state below."""

    def __init__(
        self,
        settings: EngineSettings,
        slots: Slots,
        broken: Callable[[str], None],
        observe: Callable[[BatchReport], None] = lambda _: None,
    ) -> None:
        """`observe` is told (in the thread) of every batch, before its outcomes are given."""
        super().__init__("engine", broken)
        self._settings, self._slots, self._observe = settings, slots, observe
        self._child: Child | None = None
        self._ready = False
        self._deaths_at_start = 0
        self._loads: dict[str, _Loading] = {}  # every checkpoint that was asked for, by the name it is run by
        self._pending_loads: set[str] = set()  # sent and not answered; no run is sent meanwhile
        self._held: dict[int, _Job] = {}  # in the process, in the order they were sent
        self._suspects: deque[_Job] = deque()  # were in a process that died: to be run alone
        self._waiting: deque[_Job] = deque()  # came while suspects are examined or the process starts
        self._alone = False  # the one job in `_held` is a suspect
        self._heard = 0.0  # when the process last gave an answer, or got work after being idle
        self._last_id = 0
        self.restarts = 0
        self.loads = 0  # that ended, well or not
        self.started = threading.Event()  # the process is up: its imports and its device work

    @property
    def pid(self) -> int | None:
        """The process id now; None between two processes."""
        child = self._child
        return child.pid if child else None

    @property
    def queued(self) -> int:
        """Images, with their texts, that it holds or that wait for it."""
        return len(self._held) + len(self._suspects) + len(self._waiting)

    @property
    def loading(self) -> bool:
        """It starts, or loads checkpoints (in a new process those of the old one too): runs wait, whoever's."""
        return not self._ready or bool(self._pending_loads)

    def load_model(self, model: str, task: Task) -> "Future[Checkpoint]":
        """Make a checkpoint resident: or CheckpointError (in the future)."""
        future: Future[Checkpoint] = Future()
        self._call(lambda: self._accept_load(Load(f"{task}:{model}", model, task), future))
        return future

    def submit(self, run: Run, replies: "SimpleQueue[tuple[Any, Any]]", token: object) -> None:
        """`(token, list[Result])` or `(token, Failure)` comes through `replies`; after it the slot is free again."""
        job = _Job(run, replies, token)
        self._call(lambda: self._waiting.append(job))

    # Everything below runs in the supervisor's thread.

    def _open(self) -> None:
        s = self._settings
        self._ready = False
        self._heard = time.monotonic()
        self._child = Child("blip-engine", engine_main, self._slots, s.factory, s.device, s.precision, s.compiled)
        self._watch(self._child.pipe, self._child)

    def _accept_load(self, load: Load, future: "Future[Checkpoint]") -> None:
        loading = self._loads.setdefault(load.name, _Loading(load))
        if loading.checkpoint is not None:
            future.set_result(loading.checkpoint)
            return
        loading.waiting.append(future)
        if self._ready and load.name not in self._pending_loads:
            self._send_load(load)

    def _send_load(self, load: Load) -> None:
        self._heard = time.monotonic()
        self._pending_loads.add(load.name)
        self._send(load)

    def _pump(self) -> None:
        """Send what may be sent now: everything, or while there are suspects, one of them at a time."""
        if not self._ready or self._pending_loads or self._alone:
            return
        if not self._suspects:
            self._send_jobs(self._waiting)
            self._waiting.clear()
        elif not self._held:
            self._alone = True
            self._send_jobs([self._suspects.popleft()])

    def _send_jobs(self, jobs: Collection[_Job]) -> None:
        """In one message, in which what the runs share is pickled once."""
        if not jobs:
            return
        if not self._held:
            self._heard = time.monotonic()
        numbered = dict(enumerate(jobs, self._last_id + 1))
        self._last_id += len(jobs)
        self._held |= numbered
        self._send([(number, job.run) for number, job in numbered.items()])

    def _send(self, message: object) -> None:
        if self._child is not None:  # where it died, the end of file that follows deals with everything it held
            self._child.send(message)

    def _readable(self, owner: Child) -> None:
        try:
            answers = owner.pipe.recv()
        except (EOFError, OSError):  # it died, or hangs in mid-message: what it held is run again or blamed
            self._replace("died", grace=2.0)
            return
        self._heard = time.monotonic()
        for kind, content in answers:
            self._answered(kind, content)

    def _answered(self, kind: str, content: Any) -> None:
        if kind in {"done", "failed"}:
            self._settle(kind, *content)
        elif kind == "batch":
            self._observe(content)
        elif kind in {"loaded", "refused"}:
            self._settle_load(kind, *content)
        elif kind == "broken":
            self._closing = True
            self._broken(f"the engine cannot start: {content}")
        elif kind == "ready":
            self._ready = True
            self.started.set()
            for loading in self._loads.values():  # what was resident in its predecessor, and what is asked for anew
                self._send_load(loading.load)

    def _settle(self, kind: str, job_id: int, *content: Any) -> None:
        job = self._held.pop(job_id)
        if kind == "done":
            job.settle(content[0])
        elif content[0] != UNEXPECTED:
            job.settle(Failure(*content))
        elif self._alone:
            job.settle(Failure("internal", content[1]))
        else:
            self._suspects.append(job)
        self._alone = False
        self._deaths_at_start = 0

    def _settle_load(self, kind: str, name: str, content: Any) -> None:
        self._pending_loads.discard(name)
        self.loads += 1
        loading = self._loads[name]
        if kind == "loaded":
            loading.settle(content)
        elif loading.checkpoint is None:
            self._loads.pop(name).refuse(content)
        else:  # it was resident in the process that died: without it, jobs could not go on here
            self._closing = True
            self._broken(f"the engine cannot load a checkpoint again: {content}")

    def _replace(self, why: str, grace: float = 0.0) -> None:
        """The process is dead, or silent and about to be killed: find who is to blame, start another."""
        if self._child is None:
            return
        self._unwatch(self._child.pipe)
        ending = self._child.end(grace)
        self._child = None
        _log.warning("engine process %s (%s) over %d images; restarting", why, ending, len(self._held))
        starting = not self._ready or bool(self._pending_loads)
        self._blame_loads(ending)
        self._blame_runs(f"the engine process {why} on this image ({ending})")
        self.restarts += 1
        self._deaths_at_start += starting
        if self._deaths_at_start >= _DEATHS_AT_START:
            self._closing = True
            self._broken(f"the engine process {why} at start ({ending})")
        elif not self._closing:
            self._open()

    def _blame_loads(self, ending: str) -> None:
        for name in self._pending_loads:
            loading = self._loads[name]
            loading.deaths += 1
            if loading.checkpoint is None and loading.deaths >= _LOAD_TRIES:
                why = f"the engine process ended ({ending}) while it loaded model {loading.load.model!r}"
                self._loads.pop(name).refuse(why)
                self._deaths_at_start = 0
        self._pending_loads.clear()

    def _blame_runs(self, why: str) -> None:
        held = list(self._held.values())
        self._held.clear()
        if self._alone:
            held.pop().settle(Failure("crashed", why))
            self._alone = False
        self._suspects.extend(held)

    def _tick(self, now: float) -> None:
        if self._held or self._pending_loads or not self._ready:
            runs_only = self._ready and not self._pending_loads
            limit = self._settings.run_timeout if runs_only else self._settings.load_timeout
            if now - self._heard > limit:
                self._replace(f"was silent for {limit:g} seconds")

    def _shut(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None
