"""What a loader process does: it fetches images ahead in threads, while this thread decodes and resizes.

Every failure of an image has a code. Answers go out several at once where more work waits.
"""

import threading
import time
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Final, TypeAlias

import numpy as np
from PIL import Image

from blip_engine.errors import ImageError
from blip_engine.images import ImageLimits, decode_image, resized_pixels
from orchestrator.errors import BlipBatchError, FetchError
from orchestrator.fetch import fetch

from .loader import LoaderLimits
from .messages import Ask, Failure, Loaded
from .slots import DECODING, FETCHING, LOADED, SLOT_BYTES, Slots

Fetched: TypeAlias = bytes | Failure | BlipBatchError  # the last: why no image can be fetched at present

_TOGETHER: Final = 4  # answers in a message, where more work waits
_QUICK_SECONDS: Final = 0.01  # a decode that took longer is answered at once


def fetched(location: Any, limits: LoaderLimits) -> Fetched:
    """The bytes at `location`, or what went wrong."""
    try:
        return fetch(location, limits.max_bytes, limits.fetch_timeout)
    except FetchError as error:
        return Failure(error.code, str(error))
    except BlipBatchError as error:  # no row may pay for it
        return error
    except Exception as error:
        return _failed(error)


def decode_into(
    slots: Slots, slot: int, data: bytes, size: tuple[int, int], limits: LoaderLimits
) -> Failure | tuple[int, int]:
    """Fill `slot` with the image in `data`, resized to `size` (height, width) where that is the loaders' task.

    Returns its size in the slot, or what went wrong.
    """
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, limits.max_pixels)  # ours are checked before it decodes
    caps = ImageLimits(max_bytes=limits.max_bytes, max_pixels=limits.max_pixels)
    try:
        image = decode_image(data, caps, draft=2 * max(size) if limits.draft else 0)
        as_it_is = not limits.resize and image.width * image.height * 3 <= SLOT_BYTES
        size = (image.height, image.width) if as_it_is else size
        slots.pixels(slot, size)[...] = np.asarray(image) if as_it_is else resized_pixels(image, size)
    except ImageError as error:
        return Failure(error.code, str(error))
    except Exception as error:
        return _failed(error)
    return size


def _failed(error: Exception) -> Failure:
    if isinstance(error, MemoryError):
        return Failure("out_of_memory", "not enough memory to decode the image")
    return Failure("internal", f"loading failed: {type(error).__name__}: {error}"[:500])


class Loads:
    """The process: `limits.fetches` threads fetch, the one that calls `serve` decodes."""

    def __init__(self, pipe: Connection, slots: Slots, limits: LoaderLimits) -> None:
        self._pipe, self._slots, self._limits = pipe, slots, limits
        self._asked: SimpleQueue[Ask] = SimpleQueue()
        self._fetched: SimpleQueue[tuple[Ask, Fetched, float] | None] = SimpleQueue()  # None: no more come

    def serve(self) -> None:
        """Returns when the pipe is closed."""
        for target in [self._read, *[self._fetch] * self._limits.fetches]:
            threading.Thread(target=target, daemon=True).start()
        done: list[Loaded] = []
        while (found := self._fetched.get()) is not None:
            done.append(self._decode(*found))
            soon = not self._fetched.empty() and done[-1].decode_seconds < _QUICK_SECONDS
            if len(done) >= _TOGETHER or not soon:
                self._pipe.send(done)
                done = []

    def _read(self) -> None:
        try:
            while True:
                for ask in self._pipe.recv():
                    self._asked.put(ask)
        except (EOFError, OSError):  # the parent closed it, or is gone
            self._fetched.put(None)

    def _fetch(self) -> None:
        while True:
            ask = self._asked.get()
            self._slots.set_phase(ask.slot, FETCHING)
            started = time.perf_counter()
            data = fetched(ask.location, self._limits)
            self._fetched.put((ask, data, time.perf_counter() - started))

    def _decode(self, ask: Ask, data: Fetched, fetch_seconds: float) -> Loaded:
        if not isinstance(data, bytes):
            self._slots.set_phase(ask.slot, LOADED)
            return Loaded(ask.slot, data, 0, fetch_seconds)
        self._slots.set_phase(ask.slot, DECODING)
        started = time.perf_counter()
        outcome = decode_into(self._slots, ask.slot, data, ask.size, self._limits)
        self._slots.set_phase(ask.slot, LOADED)
        return Loaded(ask.slot, outcome, len(data), fetch_seconds, time.perf_counter() - started)
