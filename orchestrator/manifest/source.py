"""A manifest as it lies in a store: its version, format and compression; and its bytes as a stream."""

import gzip
import io
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Final, Literal, TypeAlias, cast

from blip_engine.errors import one_line

from ..contract import ManifestFormat
from ..errors import ManifestError, ObjectChanged, StorageError
from ..settings import Settings
from ..storage import Store, is_s3, open_object, open_store
from .formats import HEAD, IMAGE_SUFFIXES, LINE_FORMATS, PARQUET, detect

if TYPE_CHECKING:
    from hashlib import _Hash

    from _typeshed import WriteableBuffer

Compression: TypeAlias = Literal["gzip", "zstd"]

_BLOCKS: Final = (64 * 2**10, 8 * 2**20)  # bytes of the first read and of the largest
_MAGIC: Final[Mapping[bytes, Compression]] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Source:
    """One version of a manifest."""

    uri: str  # as the user named it
    store: Store
    key: str
    etag: str  # pins the version; empty for a folder or prefix
    size: int  # bytes, compressed as they are
    format: ManifestFormat
    compression: Compression | None = None
    columns: Mapping[str, str] = field(default_factory=dict)  # our key -> the manifest's name for it

    @property
    def staged(self) -> bool:
        """Whether the rows must be written out as lines before they can be planned."""
        return self.compression is not None or self.format not in LINE_FORMATS


class StoredFile(io.RawIOBase):
    """An object read from front to back, in blocks that grow; of one version. Raises ManifestError and StorageError."""

    def __init__(self, store: Store, key: str, etag: str, size: int, digest: "_Hash | None" = None) -> None:
        self._store, self._key, self._etag, self._size = store, key, etag, size
        self._digest = digest  # of all bytes read so far
        self._position, self._block = 0, _BLOCKS[0]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), self._size - self._position, self._block)
        self._block = min(2 * self._block, _BLOCKS[1])
        try:
            data = self._store.get(self._key, self._position, self._position + count, etag=self._etag) if count else b""
        except ObjectChanged:
            raise ManifestError(
                f"{self._store.uri(self._key)} was changed while it was being read; run again once it is complete"
            ) from None
        view[:count] = data
        self._position += count
        if self._digest is not None:
            self._digest.update(data)
        return count


class _Decompressed(io.RawIOBase):
    """What a decompressor gives, with its errors in our words."""

    def __init__(self, inner: Any, uri: str, name: Compression) -> None:
        self._inner, self._uri, self._name = inner, uri, name
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        try:
            data = self._inner.read(min(len(view), 2**20))
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise ManifestError(
                f"{self._uri}: the {self._name} data is damaged or incomplete after {self._position} decompressed "
                f"bytes; write the file again ({one_line(error) or type(error).__name__})"
            ) from None
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


def decompressed(raw: io.RawIOBase, uri: str, compression: Compression | None) -> BinaryIO:
    """The plain bytes of a stream, which damaged data ends with ManifestError."""
    if compression is None:
        return cast("BinaryIO", io.BufferedReader(raw, _BLOCKS[1]))
    buffered = cast("IO[bytes]", io.BufferedReader(raw, 2**20))
    if compression == "gzip":
        inner: Any = gzip.GzipFile(fileobj=buffered, mode="rb")
    else:
        import pyarrow  # noqa: PLC0415 -- only where it is needed: the command line stays quick

        inner = pyarrow.CompressedInputStream(pyarrow.PythonFile(buffered, mode="r"), "zstd")
    return cast("BinaryIO", io.BufferedReader(_Decompressed(inner, uri, compression), 2**20))


@contextmanager
def opened(source: Source) -> Iterator[BinaryIO]:
    """The manifest's plain bytes, from front to back."""
    raw = StoredFile(source.store, source.key, source.etag, source.size)
    with decompressed(raw, source.uri, source.compression) as stream:
        yield stream


def compression_of(head: bytes) -> Compression | None:
    """The compression that an object's first bytes tell."""
    if head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F:  # a skippable frame, as parallel writers put first
        return "zstd"
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def is_folder(uri: str, given: str | None) -> bool:
    """Whether the manifest is a folder or prefix of images: as given, by its name, or, locally, by what it is."""
    return given == "folder" or uri.endswith("/") or (not is_s3(uri) and os.path.isdir(uri))  # noqa: PTH112


def open_manifest(
    uri: str, given: ManifestFormat | None, settings: Settings, columns: Mapping[str, str] | None = None
) -> Source:
    """The manifest's present version. Raises ManifestError when it cannot be read or is of no known format."""
    if is_folder(uri, given):
        if given not in {None, "folder"}:
            raise ManifestError(f"{uri} is read as folder, not as {given}; name a file in it, or leave --format out")
        if columns:
            raise ManifestError(f"{uri} is read as folder, which has no columns to rename; leave --column out")
        return Source(uri, open_store(uri, settings), "", "", 0, "folder")
    store, key = open_object(uri, settings)
    try:
        info = store.head(key)
        if info is None:
            prefix = "; end it with / if it is a prefix of images" if is_s3(uri) else ""
            raise ManifestError(f"{uri} does not exist{prefix}")
        head = store.get(key, 0, min(info.size, HEAD), etag=info.etag)
        compression = compression_of(head)
        draft = Source(uri, store, key, info.etag, info.size, "list", compression, columns or {})
        if compression is not None:
            with opened(draft) as stream:
                head = stream.read(HEAD)
        source = replace(draft, format=detect(uri, head, given, columns))
        plain = source.format == "parquet" and compression is None
        if plain and store.get(key, info.size - 4, info.size, etag=info.etag) != PARQUET:
            raise ManifestError(f"{uri}: the Parquet data is damaged: it does not end with PAR1; was it written whole?")
    except StorageError as error:
        if error.retryable:
            raise
        raise ManifestError(f"the manifest cannot be read: {error}") from error
    return source


def stored_rows(source: Source, store: Store, key: str) -> Source:
    """The staged rows of `source` at `key`, as a manifest that can be planned where it is. Raises StorageError."""
    info = store.head(key)
    if info is None:
        raise StorageError(f"{store.uri(key)} was written and is not there")
    return Source(store.uri(key), store, key, info.etag, info.size, source.format, None, source.columns)


def no_images(uri: str) -> ManifestError:
    return ManifestError(f"{uri}: no images below it ({' '.join(IMAGE_SUFFIXES)})")
