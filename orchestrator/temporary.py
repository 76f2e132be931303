"""Temporary files of this process, and those that a killed one left behind.

One can run out of room for them: that is said in one line, with the way out. Each is locked while it is in use. The
kernel lets go of a dead process's locks, and so tells whose files nobody needs.
"""

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from .errors import StorageError

PREFIXES: Final = ("blip-rows-", "blip-copy-", "blip-errors-")
_YOUNG_SECONDS: Final = 60.0  # it may be that its owner has not locked it yet

log = logging.getLogger(__name__)


class TemporaryFile:
    """A file to be written from front to back. Nothing is buffered: what is written can be read by its path."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self.path = descriptor, path
        self.size = 0  # bytes written

    def write(self, data: bytes) -> None:
        """Adds `data`. Raises StorageError when there is no room."""
        left = memoryview(data)
        while left:
            try:
                written = os.write(self._descriptor, left)
            except OSError as error:
                raise StorageError(f"{self.path}: {error.strerror}; give TMPDIR a folder with more room") from error
            self.size += written
            left = left[written:]


@contextmanager
def temporary_file(prefix: str) -> Iterator[TemporaryFile]:
    """A new file in TMPDIR that is gone after the block. Raises StorageError when none can be made."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=prefix)
    except OSError as error:
        raise StorageError(f"no temporary file can be made: {error.strerror}; give TMPDIR another folder") from error
    try:
        with suppress(OSError):  # a file system without locks: then it stays if we are killed
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield TemporaryFile(descriptor, Path(name))
    finally:
        os.close(descriptor)
        Path(name).unlink(missing_ok=True)


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
