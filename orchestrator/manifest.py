"""What a manifest is, and where its chunks begin and end, without parsing a single row.

Formats: JSON Lines, plain lists (one image a line), and a folder or prefix, whose listing is staged as JSON Lines.
Memory does not grow with the manifest: it is read in blocks, and only chunk boundaries are kept.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Final

from .contract import Chunk, ManifestFormat
from .errors import ManifestError, StorageError
from .rows import BOM
from .settings import Settings
from .storage import Store, is_s3, open_object, open_store

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

BLOCK: Final = 8 * 2**20  # bytes read at once
LONGEST_CHUNK: Final = 32 * 2**20  # bytes; a chunk of longer rows has fewer of them
SMALLEST_CHUNK, LARGEST_CHUNK, AIM_CHUNKS = 16, 512, 64  # rows, rows, chunks

#: First bytes of what is surely no text, and what to call it.
_MAGIC: Final = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"PAR1": "Parquet",
    b"ORC": "ORC",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
_UNSUPPORTED: Final = (".csv", ".tsv", ".parquet", ".orc", ".gz", ".zst", ".xml", ".yaml", ".yml", ".xlsx")
_WAY_OUT: Final = "give JSON Lines, a list of one image a line, or a folder or prefix that ends with /"


def is_folder(uri: str, given: str | None) -> bool:
    """Whether the manifest is a folder or prefix of images: as given, by its name, or, locally, by what it is."""
    return given == "folder" or uri.endswith("/") or (not is_s3(uri) and os.path.isdir(uri))  # noqa: PTH112


def detect(uri: str, head: bytes, given: ManifestFormat | None) -> ManifestFormat:
    """The format of a manifest whose first bytes are `head`. Raises ManifestError that names the way out."""
    if not head.removeprefix(BOM).strip():
        raise ManifestError(f"{uri} is empty; a manifest needs at least one row")
    binary = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "no text")
    if binary != "no text" or b"\0" in head:
        raise ManifestError(f"{uri} is {binary}, which is not read yet; {_WAY_OUT}")
    return given or _text_format(uri, head)


def _text_format(uri: str, head: bytes) -> ManifestFormat:
    first = head.removeprefix(BOM).lstrip().split(b"\n", 1)[0].strip()
    name = uri.lower()
    if first.startswith(b"["):
        raise ManifestError(f"{uri} is a JSON array; write one object a line instead")
    if first == b"{" or (first.startswith(b"{") and name.endswith(".json") and not _is_object(first)):
        raise ManifestError(f"{uri} holds JSON over several lines; write one object a line instead")
    if first.startswith(b"{") or name.endswith((".jsonl", ".ndjson", ".jsonlines", ".manifest")):
        return "jsonl"
    if name.endswith(_UNSUPPORTED):
        raise ManifestError(f"{uri}: {name.rpartition('.')[2]} manifests are not read yet; {_WAY_OUT}")
    try:
        first.decode()
    except UnicodeDecodeError:
        raise ManifestError(f"{uri}: line 1 is not UTF-8 text; {_WAY_OUT}") from None
    return "list"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def open_manifest(
    uri: str, given: ManifestFormat | None, settings: Settings
) -> tuple[Store, str, str, int, ManifestFormat]:
    """Store, key, etag, size and format of a manifest file. Raises ManifestError when it cannot be read."""
    store, key = open_object(uri, settings)
    try:
        info = store.head(key)
        if info is None:
            prefix = "; end it with / if it is a prefix of images" if is_s3(uri) else ""
            raise ManifestError(f"{uri} does not exist{prefix}")
        head = store.get(key, 0, min(info.size, 65_536), etag=info.etag)
    except StorageError as error:
        if error.retryable:
            raise
        raise ManifestError(f"the manifest cannot be read: {error}") from error
    return store, key, info.etag, info.size, detect(uri, head, given)


def require_rows(uri: str, given: ManifestFormat | None, settings: Settings) -> None:
    """Raises ManifestError unless the manifest can be read, is of a known format and is not empty."""
    if not is_folder(uri, given):
        open_manifest(uri, given, settings)
    elif not any(_is_image(info.key) for info in open_store(uri, settings).list()):
        raise _no_images(uri)


def _is_image(key: str) -> bool:
    return key.lower().endswith(IMAGE_SUFFIXES)


def _no_images(uri: str) -> ManifestError:
    return ManifestError(f"{uri}: no images below it ({' '.join(IMAGE_SUFFIXES)})")


@contextmanager
def staged_listing(uri: str, settings: Settings) -> Iterator[tuple[Path, str]]:
    """The images below a folder or prefix as a temporary JSON Lines file, with the sha256 of its content."""
    store = open_store(uri, settings)
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(prefix="blip-listing-") as file:
        for info in store.list():
            if _is_image(info.key):
                line = json.dumps({"image": store.uri(info.key) if is_s3(uri) else info.key}).encode() + b"\n"
                digest.update(line)
                file.write(line)
        file.flush()
        if file.tell() == 0:
            raise _no_images(uri)
        yield Path(file.name), digest.hexdigest()


def choose_chunk_rows(size: int, head: bytes) -> int:
    """Rows a chunk, from the manifest's size and first bytes: enough chunks for many workers and a moving bar."""
    lines = max(1, head.count(b"\n"))
    rows = lines if size <= len(head) else size * lines // len(head)
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
    position = 0  # in the manifest, of the next read
    while position < size or buffer:
        block = read(position, min(position + BLOCK, size))
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
        if position >= size:
            return
        buffer, base = buffer[at:], base + at


def _shorter_run(
    buffer: bytes, at: int, at_end: bool, some: re.Pattern[bytes], first_row: int
) -> tuple[re.Match[bytes] | None, int]:
    """The rows left at the manifest's end, or those of a chunk that is already as long as one may be."""
    end = len(buffer) if at_end else buffer.rfind(b"\n", at) + 1
    found = some.match(buffer, at, max(at, end))
    if found is None:
        if not at_end:
            raise ManifestError(
                f"row {first_row} of the manifest is longer than {LONGEST_CHUNK >> 20} MiB; is it text?"
            )
        return None, 0
    return found, sum(1 for line in found.group().split(b"\n") if line.strip())
