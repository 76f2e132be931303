"""How long tasks in threads learn that the process is to end: they ask, once for each block of what they do.

Python cannot end a thread from outside, and waits for all of them at its exit. A task that goes on for minutes calls
`go_on` in its loops; where someone wants it to end, that raises StoppingError, which leaves the job as it is.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StoppingError(Exception):
    """The process is to end; nothing is wrong. What was begun is begun again by the next one."""


class _Here(threading.local):
    wanted: Callable[[], bool] | None = None


_here = _Here()


@contextmanager
def stopped_when(wanted: Callable[[], bool]) -> Iterator[None]:
    """Within the block `go_on` of this thread looks at `wanted`."""
    before, _here.wanted = _here.wanted, wanted
    try:
        yield
    finally:
        _here.wanted = before


def go_on() -> None:
    """Raises StoppingError where the task is to end; does nothing in threads that nobody wants to stop."""
    if _here.wanted is not None and _here.wanted():
        raise StoppingError


def going_on() -> Callable[[object], None]:
    """`go_on` of this thread, for those who call it back in others. Raises once: they call it at their end too."""
    wanted = _here.wanted

    def look(_: object) -> None:
        nonlocal wanted
        if wanted is not None and wanted():
            wanted = None
            raise StoppingError

    return look


def as_here() -> Callable[[], None]:
    """An `initializer` for a pool of threads that help this one: they stop when it does."""
    wanted = _here.wanted

    def adopt() -> None:
        _here.wanted = wanted

    return adopt
