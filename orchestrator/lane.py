"""Tasks of jobs in threads, at most one of each job, so that a job that waits for its store holds up no other."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from .stopping import stopped_when


class Lane:
    """A pool of threads. To be used from one thread."""

    def __init__(self, threads: int, name: str, stopping: Callable[[], bool]) -> None:
        """`stopping`: whether its tasks are to end (see `stopping.go_on`)."""
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._stopping = stopping
        self._running: dict[str, Future[None]] = {}

    def start(self, job: str, task: Callable[[], None]) -> "Future[None] | None":
        """Starts a task, or has it wait for a thread. None: the job's last one is not through."""
        self._running = {known: future for known, future in self._running.items() if not future.done()}
        if job in self._running:
            return None
        self._running[job] = self._pool.submit(self._run, task)
        return self._running[job]

    def _run(self, task: Callable[[], None]) -> None:
        with stopped_when(self._stopping):
            task()

    def close(self) -> None:
        """Waits for the tasks that run; those that were not begun never are."""
        self._pool.shutdown(cancel_futures=True)
