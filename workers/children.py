"""Child processes that may die or hang at any moment, and the thread that owns them.

Each child has a private pipe and shares no lock with anyone, so killing it cannot wedge another process. All sending,
receiving, timing out, killing and respawning of a group of children happens in one thread, a `Supervisor`.
"""

import ctypes
import logging
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, Final

from orchestrator import logs

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG: Final = 1
STALL_SECONDS: Final = 60.0  # for a child in the middle of a message, its or ours, before it is taken for hung


class Child:
    """A spawned process that runs `target(connection, *args)`, and our end of its pipe."""

    def __init__(self, name: str, target: Callable[..., None], *args: Any) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, name=name, args=(os.getpid(), target, theirs, args), daemon=True)
        self._process.start()
        theirs.close()  # the child's death is then an end of file on our side
        _limit_waits(self.pipe, STALL_SECONDS)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid or 0

    def send(self, message: object) -> None:
        """Give it a message. Where it is dead or hung it does not get it, and the end of file tells its owner.

        A child that hangs and reads no more would hold up its owner, who alone could end it: so it is killed here.
        """
        try:
            self.pipe.send(message)
        except BlockingIOError:
            _log.warning("process %d takes no message: it hangs, and is killed", self.pid)
            self._process.kill()
        except OSError:  # it died
            pass

    def end(self, grace: float = 0.0) -> str:
        """Kill it unless it ends by itself within `grace` seconds; how it ended ("signal 9", "exit code 3")."""
        self._process.join(grace)
        self._process.kill()
        self._process.join()
        self.pipe.close()
        code = self._process.exitcode or 0
        self._process.close()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _limit_waits(pipe: Connection, seconds: float) -> None:
    """Let no read or write of our side wait for longer: an OSError, BlockingIOError, then tells of it."""
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    with socket.socket(fileno=os.dup(pipe.fileno())) as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def die_with_parent(parent: int) -> None:
    """Make the kernel kill this process when its parent dies (Linux), however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def _run(parent: int, target: Callable[..., None], pipe: Connection, args: tuple[Any, ...]) -> None:
    die_with_parent(parent)
    logs.configure()
    # Ctrl-C and a service manager's SIGTERM reach the whole group; when to stop is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone: nobody waits for an answer
        target(pipe, *args)


class Supervisor:
    """A thread that owns children.

    Subclasses fill in `_open`, `_readable`, `_pump`, `_tick`, `_shut`; others use `_call`.
    """

    #: Seconds between two `_tick`s when nothing happens.
    TICK: Final = 0.25

    def __init__(self, name: str, broken: Callable[[str], None]) -> None:
        """`broken` is called (from the thread) with one line when these children can work no more."""
        self._broken = broken
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._selector = selectors.DefaultSelector()
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._woken = False
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._closing = False

    def start(self) -> None:
        """Start the thread, which spawns the children."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and kill its children. Answers that are still due never come."""
        self._closing = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join()
        else:  # it never started, or has closed them itself
            self._close_files()

    def _main(self) -> None:
        # Children are spawned here too, because Linux ties "die with parent" to the spawning thread.
        try:
            self._open()
            next_tick = 0.0
            while not self._closing:
                self._serve()
                if (now := time.monotonic()) >= next_tick:
                    self._tick(now)
                    next_tick = now + self.TICK
        except Exception as error:
            _log.exception("%s", self._thread.name)
            self._broken(f"the thread of the {self._thread.name} failed: {error!r}")
        finally:
            self._shut()
            self._close_files()

    def _close_files(self) -> None:
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()

    def _serve(self) -> None:
        for key, _ in self._selector.select(self.TICK):
            if key.data is None:
                self._run_calls()
            else:
                self._readable(key.data)
        self._pump()

    def _call(self, function: Callable[[], None]) -> None:
        """Have `function` run in the supervisor's thread, soon."""
        self._calls.put(function)
        if not self._woken:
            self._woken = True
            self._wake()

    def _wake(self) -> None:
        with suppress(BlockingIOError, OSError):  # a full pipe has woken it already; a closed one needs no waking
            self._wake_write.send(b"!")

    def _run_calls(self) -> None:
        with suppress(BlockingIOError):
            self._wake_read.recv(65536)
        self._woken = False  # after the byte and before the calls: one that comes from now on wakes us once more
        with suppress(Empty):
            while True:
                self._calls.get_nowait()()

    def _watch(self, pipe: Connection, owner: object) -> None:
        self._selector.register(pipe, selectors.EVENT_READ, owner)

    def _unwatch(self, pipe: Connection) -> None:
        self._selector.unregister(pipe)

    def _open(self) -> None:
        raise NotImplementedError

    def _readable(self, owner: Any) -> None:
        raise NotImplementedError

    def _pump(self) -> None:
        """Send what has gathered: after every round of calls and answers."""
        raise NotImplementedError

    def _tick(self, now: float) -> None:
        raise NotImplementedError

    def _shut(self) -> None:
        raise NotImplementedError
