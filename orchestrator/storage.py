"""Object storage: one small interface over S3 and local folders. Truth lives here; Redis only coordinates.

A store is bound to a prefix, and keys are relative to it. `put_new` and `put_file_new` are atomic on both: the whole
object appears at once, and only if nothing was there.
"""

import contextlib
import errno
import os
import stat
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from .errors import AccessDenied, ObjectChanged, ObjectNotFound, StorageError, UsageError
from .settings import Settings, load_settings
from .stopping import go_on

#: Written once by the start-up probe and left there: deleting may not be allowed, and it is proof for the next run.
PROBE_KEY: Final = "plan/probe"


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a listing or a HEAD tells. `metadata` is filled by `head` on S3 only."""

    key: str
    size: int
    etag: str  # changes whenever the content does; on disk: size and modification time
    metadata: Mapping[str, str] = field(default_factory=dict)


class Store(ABC):
    """A prefix in an object store. All methods are safe from many threads.

    They raise StorageError (see `errors`), and UsageError where the store's configuration cannot be right.
    """

    root: str  # the URI or path the keys are relative to, without a slash at the end

    @abstractmethod
    def get(self, key: str, start: int = 0, end: int | None = None, *, etag: str | None = None) -> bytes:
        """Bytes [start, end) of an object, never fewer; `end` None: to its end.

        With `etag`, raises ObjectChanged when the object is another version.
        """

    @abstractmethod
    def head(self, key: str) -> ObjectInfo | None:
        """The object's size, version and metadata; None when it does not exist."""

    @abstractmethod
    def put(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        """Writes the whole object, over an older one if there is one."""

    @abstractmethod
    def put_new(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> bool:
        """Writes the object unless the key is taken. False: it was (perhaps by our own lost answer)."""

    @abstractmethod
    def put_file(self, key: str, path: Path) -> None:
        """Writes a file of any size, over an older object if there is one."""

    @abstractmethod
    def put_file_new(self, key: str, path: Path) -> bool:
        """Writes a file of any size unless the key is taken. False: it was (perhaps by our own lost answer)."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object below `prefix`, in key order."""

    def uri(self, key: str) -> str:
        return f"{self.root}/{key}"

    def check_conditional_put(self) -> None:
        """Raises StorageError unless the place can be written and refuses a second `put_new`."""
        if self.put_new(PROBE_KEY, b"conditional put works if this is never overwritten\n"):
            if not self.put_new(PROBE_KEY, b"overwritten\n"):
                return
            raise StorageError(
                f"{self.root}: this store ignores `If-None-Match: *`, so results could be overwritten; use another "
                "store, or set BLIP_ALLOW_UNCONDITIONAL_PUT=true to accept a check before each write instead"
            )


class LocalStore(Store):
    """A folder. Names that start with a dot are ours (temporary files) or hidden, and never listed.

    Metadata is not kept: what it says of a part can be counted in the part (`parts.describe`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = str(folder)

    def _path(self, key: str) -> Path:
        if key.startswith("/") or ".." in key.split("/"):
            raise StorageError(f"{key!r} is not a key below {self.root}")
        return self.folder / key

    def get(self, key: str, start: int = 0, end: int | None = None, *, etag: str | None = None) -> bytes:
        path = self._path(key)
        with _errors_of(path), path.open("rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise StorageError(f"{path} is not a regular file")
            if etag is not None and _etag(info) != etag:
                raise ObjectChanged(f"{path} was changed")
            file.seek(start)
            data = file.read() if end is None else file.read(end - start)
        if end is not None and len(data) != end - start:
            raise ObjectChanged(f"{path} ends before byte {end}")
        return data

    def head(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        try:
            with _errors_of(path):
                info = path.stat()
        except ObjectNotFound:
            return None
        return ObjectInfo(key, info.st_size, _etag(info)) if stat.S_ISREG(info.st_mode) else None

    def put(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:  # noqa: ARG002
        path = self._path(key)
        with _errors_of(path, writing=True), _temporary(path, data) as temporary:
            temporary.replace(path)

    def put_new(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> bool:  # noqa: ARG002
        path = self._path(key)
        if os.path.lexists(path):
            return False
        with _errors_of(path, writing=True), _temporary(path, data) as temporary:
            return self._link_new(temporary, path)

    def put_file(self, key: str, path: Path) -> None:
        target = self._path(key)
        with _errors_of(target, writing=True), _temporary(target) as temporary:
            _copy(path, temporary)
            temporary.replace(target)

    def put_file_new(self, key: str, path: Path) -> bool:
        target = self._path(key)
        if os.path.lexists(target):
            return False
        with _errors_of(target, writing=True), _temporary(target) as temporary:
            _copy(path, temporary)
            return self._link_new(temporary, target)

    def _link_new(self, temporary: Path, path: Path) -> bool:
        try:
            path.hardlink_to(temporary)  # atomic, and refuses to overwrite; rename would not
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}:
                raise
            raise StorageError(f"{self.root}: this file system has no hard links; write to another one") from error
        return True

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        for info in self._walk(folder):
            if info.key.startswith(prefix):
                yield info

    def _walk(self, folder: str) -> Iterator[ObjectInfo]:
        path = self._path(folder) if folder else self.folder
        try:
            with _errors_of(path), os.scandir(path) as found:
                entries = [entry for entry in found if not entry.name.startswith(".")]
        except ObjectNotFound:
            return
        # S3's order: by the whole key, in which a folder's name goes on with "/".
        named = sorted(((entry.name + "/" if _is_folder(entry) else entry.name).encode(errors="surrogateescape"), entry)
                       for entry in entries)  # fmt: skip
        for _, entry in named:
            key = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(key)
            elif (info := _stat(entry)) is not None and stat.S_ISREG(info.st_mode):
                yield ObjectInfo(key, info.st_size, _etag(info))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    with contextlib.suppress(OSError):  # a link to itself
        return entry.is_dir()
    return False


def _stat(entry: "os.DirEntry[str]") -> os.stat_result | None:
    """None: a link to nothing, or one that vanished since its folder was read."""
    try:
        with _errors_of(Path(entry.path)):
            return entry.stat()
    except ObjectNotFound:
        return None


def _etag(info: os.stat_result) -> str:
    return f"{info.st_size:x}-{info.st_mtime_ns:x}"


@contextlib.contextmanager
def _errors_of(path: Path, writing: bool = False) -> Iterator[None]:
    """OSErrors of the block become StorageErrors that name the path."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        if writing:
            raise StorageError(f"{path} cannot be written: {error.strerror}; choose another output") from error
        raise ObjectNotFound(f"{path} does not exist") from error
    except PermissionError as error:
        raise AccessDenied(f"{path}: permission denied") from error
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _temporary(path: Path, data: bytes | None = None) -> Iterator[Path]:
    """A file beside `path`, with `data` safely on disk; gone after the block unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".put-", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o666 & ~_umask())  # mkstemp makes files private; results are for reading
            if data is not None:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    """The bytes of a file into another one, safely on disk."""
    with source.open("rb") as read, target.open("wb") as write:
        while block := read.read(2**20):
            go_on()
            write.write(block)
        write.flush()
        os.fsync(write.fileno())


def _umask() -> int:
    """The process's umask, which can only be read by setting it: done once."""
    if not hasattr(_umask, "value"):
        mask = os.umask(0o022)
        os.umask(mask)
        _umask.value = mask  # type: ignore[attr-defined]
    return int(_umask.value)  # type: ignore[attr-defined]


def open_store(uri: str, settings: Settings | None = None) -> Store:
    """The store of a prefix (`s3://bucket/prefix`) or folder. Touches nothing yet; raises UsageError for other URIs."""
    if is_s3(uri):
        from .s3 import S3Store  # noqa: PLC0415 -- boto3 takes a third of a second; local jobs never need it

        bucket, prefix = split_s3(uri)
        return S3Store(bucket, prefix.strip("/"), settings or load_settings())
    refuse_other_uris(uri)
    return LocalStore(Path(uri).absolute())


def open_object(uri: str, settings: Settings | None = None) -> tuple[Store, str]:
    """The store and the key of one object: its folder, and its name in there."""
    parent, _, name = uri.rstrip("/").rpartition("/")
    return open_store(parent or ("." if not uri.startswith("/") else "/"), settings), name


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def is_uri(text: str) -> bool:
    """Whether it is meant as one, also misspelt: `s3:/bucket` would be a folder named `s3:`."""
    return "://" in text or text.lower().startswith("s3:")


def refuse_other_uris(text: str, what: str = "") -> None:
    """Raises UsageError for what is neither a local path nor ours."""
    if is_uri(text):
        raise UsageError(f"{what}{text}: only s3:// URIs and local paths can be used")


def split_s3(uri: str) -> tuple[str, str]:
    """`s3://bucket/key` as (bucket, key). Raises UsageError when there is no bucket."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise UsageError(f"{uri}: names no bucket; write s3://bucket/key")
    return bucket, key
