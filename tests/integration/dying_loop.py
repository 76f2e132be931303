"""A control loop that is killed (SIGKILL) just before its Nth write, for N = 1, 2, 3 … until a job has ended.

`python dying_loop.py JOB`; prints the number of lives it took. Each life is a process of its own, forked from this
one, which holds nothing but imports.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from orchestrator import control
from orchestrator.control import Controller
from orchestrator.ledger import Ledger
from orchestrator.settings import load_settings
from orchestrator.storage import LocalStore

READS = {"progress", "due", "workers", "lead"}


class Countdown:
    """Counts writes to Redis, to the queue and to storage, and dies at the last one."""

    def __init__(self, writes: int) -> None:
        self.left, self.lock = writes, threading.Lock()

    def tick(self) -> None:
        with self.lock:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def before(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            if not (write.__name__ == "_run" and args[1] in READS):
                self.tick()
            return write(*args, **named)

        return counted


def live(job: str, writes: int) -> None:
    count = Countdown(writes)
    Ledger._run = count.before(Ledger._run)  # type: ignore[method-assign]
    control.publish = count.before(control.publish)  # type: ignore[assignment]
    for name in ("put", "put_new", "put_file", "put_file_new"):
        setattr(LocalStore, name, count.before(getattr(LocalStore, name)))
    controller = Controller(load_settings())
    while True:
        controller.step()
        state = controller.ledger.state(job)
        if state is not None and state.ended:
            os._exit(0)
        time.sleep(0.02)


def main() -> None:
    for writes in range(1, 200):
        child = os.fork()
        if child == 0:
            live(sys.argv[1], writes)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            sys.stdout.write(f"{writes}\n")
            return


if __name__ == "__main__":
    main()
