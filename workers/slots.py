"""Places for decoded images in memory that the worker's children share.

The block is an anonymous file (memfd): it is not limited like /dev/shm (64 MB in a container), and nothing is left
behind when every process is killed. It is sparse: a slot occupies only the pages that its image touches, so one
generous slot size serves models of every image size.
"""

import mmap
import os
import tempfile
from functools import cached_property
from multiprocessing import reduction
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np

SLOT_BYTES: Final = 4 << 20  # an RGB image of up to 1182 x 1182
#: How far a loader is with a slot: it tells a hanging download from a hanging decoder, and which image killed it.
ASKED: Final = 0
FETCHING: Final = 1
DECODING: Final = 2
LOADED: Final = 3


class Slots:
    """`count` slots of SLOT_BYTES, and one byte per slot for the loader's phase. Pickles into spawned children only."""

    def __init__(self, count: int, fd: int | None = None) -> None:
        self.count = count
        self._fd = _anonymous_file(self._header_bytes + count * SLOT_BYTES) if fd is None else fd

    @property
    def _header_bytes(self) -> int:
        return -(-self.count // mmap.PAGESIZE) * mmap.PAGESIZE

    @cached_property
    def _memory(self) -> mmap.mmap:
        return mmap.mmap(self._fd, self._header_bytes + self.count * SLOT_BYTES)

    def phase(self, slot: int) -> int:
        """ASKED, FETCHING, DECODING or LOADED, as the loader last wrote it."""
        return self._memory[slot]

    def set_phase(self, slot: int, phase: int) -> None:
        """Note what the loader does now."""
        self._memory[slot] = phase

    def pixels(self, slot: int, size: tuple[int, int]) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """The slot's image as a writable uint8 view (height, width, 3); ValueError when it does not fit."""
        import numpy as np  # noqa: PLC0415 - the worker's parent, which needs no pixels, stays without it

        if size[0] * size[1] * 3 > SLOT_BYTES:
            raise ValueError(f"an image of {size[0]} x {size[1]} does not fit a slot of {SLOT_BYTES} bytes")
        start = self._header_bytes + slot * SLOT_BYTES
        return np.ndarray((*size, 3), dtype=np.uint8, buffer=self._memory, offset=start)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (self.count, reduction.DupFd(self._fd))


def _attach(count: int, handle: Any) -> Slots:
    return Slots(count, handle.detach())


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("blip-slots")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd
