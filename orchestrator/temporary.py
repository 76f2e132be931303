"""Temporary files of this process, and those that a killed one left behind.

Each is locked while it is in use. The kernel lets go of a dead process's locks, and so tells whose files nobody needs.
"""

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

PREFIXES: Final = ("blip-rows-", "blip-copy-", "blip-errors-")
_YOUNG_SECONDS: Final = 60.0  # it may be that its owner has not locked it yet

log = logging.getLogger(__name__)


@contextmanager
def temporary_file(prefix: str) -> Iterator[IO[bytes]]:
    """A new file in TMPDIR, open for writing, with a `name` that is a path; gone after the block."""
    with tempfile.NamedTemporaryFile(prefix=prefix) as file:
        with suppress(OSError):  # a file system without locks: then it stays if we are killed
            fcntl.flock(file.fileno(), fcntl.LOCK_SH)
        yield file


def remove_left_behind() -> None:
    """Removes the files of processes that were killed. Never those in use, or of a file system without locks."""
    for path in Path(tempfile.gettempdir()).glob("blip-*-*"):
        if path.name.startswith(PREFIXES):
            with suppress(OSError):  # gone meanwhile, or someone else's
                _remove_unless_used(path)


def _remove_unless_used(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its owner lives
        if time.time() - os.fstat(descriptor).st_mtime > _YOUNG_SECONDS:
            path.unlink()
            log.info("%s: removed; its process was killed", path)
    finally:
        os.close(descriptor)
