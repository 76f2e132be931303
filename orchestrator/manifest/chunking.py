"""Where a manifest's chunks begin and end, without parsing a single row.

Memory does not grow with the manifest: it is read in blocks, and only chunk boundaries are kept.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import Final

from ..contract import Chunk
from ..errors import ManifestError
from ..rows import BOM
from ..stopping import as_here

BLOCK: Final = 8 * 2**20  # bytes read at once
AHEAD: Final = 3  # blocks on their way: one connection to an object store gives less than is counted meanwhile
LONGEST_CHUNK: Final = 32 * 2**20  # bytes; a chunk of longer rows has fewer of them
SMALLEST_CHUNK, LARGEST_CHUNK, AIM_CHUNKS = 16, 512, 64  # rows, rows, chunks
SMALLEST_WORTH: Final = 64  # rows, where the speed is known


def choose_chunk_rows(size: int, head: bytes, worth: int | None = None) -> int:
    """Rows a chunk, from the manifest's size and first bytes: enough chunks for many workers and a moving bar.

    `worth`: rows that are about as much work as a chunk should be, where the speed is known; they are the bound then.
    """
    lines = max(1, head.count(b"\n"))
    rows = lines if size <= len(head) else size * lines // len(head)
    if worth is not None:
        return min(worth, max(SMALLEST_WORTH, rows // AIM_CHUNKS))
    return min(LARGEST_CHUNK, max(SMALLEST_CHUNK, rows // AIM_CHUNKS))


@lru_cache(maxsize=8)
def _runs(rows: int) -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    """Patterns of exactly `rows` whole lines that are not blank, and of at most so many, the last perhaps unended.

    Blank lines go with the row after them. The quantifiers are possessive: one pass, no backtracking.
    """
    line = rb"(?:\s*+\S[^\n]*+\n){%d}+"
    return re.compile(line % rows), re.compile(rb"(?:\s*+\S[^\n]*+(?:\n|\Z)){1,%d}+" % rows)


def scan(read: Callable[[int, int], bytes], size: int, chunk_rows: int) -> Iterator[Chunk]:
    """The chunks of a manifest of `size` bytes; `read(start, end)` gives its bytes. Raises ManifestError.

    Each chunk begins where the one before ended; whitespace after the last row belongs to none.
    """
    whole, some = _runs(chunk_rows)
    buffer, base = b"", 0  # bytes not yet in a chunk, and where they begin
    chunk_id = first_row = 0
    position = 0  # in the manifest, of the next block
    for block in _blocks(read, size):
        position += len(block)
        buffer += block
        if base == 0 and buffer.startswith(BOM):
            buffer, base = b" " * len(BOM) + buffer[len(BOM) :], 0  # spaces: the byte positions stay
        at = 0
        while True:
            found = whole.match(buffer, at)
            rows = chunk_rows
            if found is None and (position >= size or len(buffer) - at > LONGEST_CHUNK):
                found, rows = _shorter_run(buffer, at, position >= size, some, first_row)
            if found is None:
                break
            yield Chunk(chunk_id, base + at, base + found.end(), first_row, rows)
            at, chunk_id, first_row = found.end(), chunk_id + 1, first_row + rows
        buffer, base = buffer[at:], base + at


def _blocks(read: Callable[[int, int], bytes], size: int) -> Iterator[bytes]:
    """The manifest's bytes in order. While one block is looked at, the next ones are on their way."""
    starts = iter(range(0, size, BLOCK))
    with ThreadPoolExecutor(AHEAD, "manifest", initializer=as_here()) as pool:

        def reads(count: int) -> Iterator["Future[bytes]"]:
            return (pool.submit(read, start, min(start + BLOCK, size)) for start in islice(starts, count))

        coming = deque(reads(AHEAD))
        while coming:
            block = coming.popleft().result()
            coming.extend(reads(1))
            yield block


def _shorter_run(
    buffer: bytes, at: int, at_end: bool, some: re.Pattern[bytes], first_row: int
) -> tuple[re.Match[bytes] | None, int]:
    """The rows left at the manifest's end, or those of a chunk that is already as long as one may be."""
    end = len(buffer) if at_end else buffer.rfind(b"\n", at) + 1
    found = some.match(buffer, at, max(at, end))
    if found is None:
        if not at_end:
            raise ManifestError(f"row {first_row} is longer than {LONGEST_CHUNK >> 20} MiB; is it text?")
        return None, 0
    return found, sum(1 for line in found.group().split(b"\n") if line.strip())
