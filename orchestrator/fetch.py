"""Where a row's image is, whether it may be read, and its bytes. Loader processes import this: no Celery, no Redis."""

import errno
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .errors import FetchError, UsageError
from .settings import Settings
from .storage import is_s3, split_s3

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(data):", re.ASCII)


@dataclass(frozen=True, slots=True)
class ImagePolicy:
    """What the rows of one manifest may point to."""

    folder: str | None  # files must be below it (real path); None: the manifest is not on this machine
    allowed: tuple[str, ...]  # buckets and prefixes ("bucket/prefix"); "*" for any
    folders: tuple[str, ...] = ()  # real paths that absolute names may be below too
    tells_links: bool = False  # whether messages say where links lead: records may be read by others over HTTP

    @classmethod
    def of(cls, manifest: str, is_folder: bool, settings: Settings) -> "ImagePolicy":
        """`manifest`: its URI or absolute path; a folder of images is its own manifest."""
        if is_s3(manifest):
            return cls(None, settings.allowed_buckets or (split_s3(manifest)[0],))
        folder = os.path.realpath(manifest if is_folder else Path(manifest).parent)
        folders = tuple(os.path.realpath(other) for other in settings.allowed_folders)
        return cls(folder, settings.allowed_buckets, folders)

    def absolute(self, image: str) -> str:
        """An image as a manifest at any other place names it: s3:// URIs as they are, files by their whole path."""
        if self.folder is None or is_s3(image) or _SCHEME.match(image):
            return image
        return os.path.join(self.folder, image)  # noqa: PTH118 -- keeps odd names as they are

    def resolve(self, image: str, known: dict[str, str] | None = None, *, links: bool = True) -> str:
        """The location to give to `fetch`. Touches no network.

        `known`: real paths of folders, remembered between calls that soon follow each other. Not `links`: no look at
        the file itself, which may be a link. Raises FetchError with code `uri_not_allowed` or `unsupported_uri`.
        """
        if is_s3(image):
            return self._resolve_s3(image)
        if _SCHEME.match(image):
            raise FetchError(
                "unsupported_uri", f"{_short(image)}: only s3:// images, and files of a local manifest, are read"
            )
        if self.folder is None:
            raise FetchError("unsupported_uri", f"{_short(image)}: a manifest on S3 needs s3://bucket/key images")
        try:
            path = _real_path(os.path.join(self.folder, image), {} if known is None else known, links)  # noqa: PTH118 -- keeps odd names as they are
        except (OSError, ValueError):
            raise FetchError("unsupported_uri", f"{_short(image)} is not a file name") from None
        if not self._is_below(path):
            raise FetchError("uri_not_allowed", f"{_short(image)} {self._why_outside(image, path)}")
        return path

    def _is_below(self, path: str) -> bool:
        return any(path.startswith(folder.rstrip("/") + "/") for folder in (self.folder, *self.folders) if folder)

    def _why_outside(self, image: str, path: str) -> str:
        named = os.path.normpath(os.path.join(self.folder or "", image))  # noqa: PTH118 -- as the row says
        where, folder = f"of the manifest's folder {self.folder}", os.path.dirname(named)  # noqa: PTH120
        if not self._is_below(named):
            return f"is outside {where}; add {folder} to BLIP_ALLOWED_FOLDERS to read from it"
        if not self.tells_links:
            return f"is a link that leads outside {where}; add the folder that it leads to to BLIP_ALLOWED_FOLDERS"
        folder = os.path.dirname(path)  # noqa: PTH120
        return f"is a link to {path}, outside {where}; add {folder} to BLIP_ALLOWED_FOLDERS to read from it"

    def _resolve_s3(self, image: str) -> str:
        try:
            bucket, key = split_s3(image)
        except UsageError as error:
            raise FetchError("unsupported_uri", str(error)) from None
        if not key:
            raise FetchError("unsupported_uri", f"{_short(image)} names a bucket, not an object")
        for entry in self.allowed:
            allowed_bucket, _, prefix = entry.partition("/")
            if entry == "*" or (bucket == allowed_bucket and key.startswith(prefix)):
                return image
        raise FetchError("uri_not_allowed", f"{_short(image)}: add {bucket} to BLIP_ALLOWED_BUCKETS to read from it")


def _real_path(path: str, known: dict[str, str], links: bool) -> str:
    """os.path.realpath, which looks at every folder of the path, with those of `known` looked at once."""
    folder, _, name = path.rpartition("/")
    if name in {"", ".", ".."}:
        return os.path.realpath(path)
    if folder not in known:
        known[folder] = os.path.realpath(folder or "/")
    real = known[folder].rstrip("/") + "/" + name
    if not links:
        return real
    with suppress(OSError):  # it is not there: who opens it will say so
        return os.path.realpath(real) if stat.S_ISLNK(os.lstat(real).st_mode) else real
    return real


def fetch(location: str, max_bytes: int, timeout: float) -> bytes:
    """The bytes at a location that `ImagePolicy.resolve` gave; never more than `max_bytes`, never fewer than there are.

    Transient failures are retried within about `timeout` seconds. Raises FetchError with code `image_not_found`,
    `access_denied`, `fetch_failed`, `fetch_timeout`, `image_too_large` or `image_unreadable`, and what is not about
    this image: NoCredentials, and UsageError where S3 is not configured as it can be.
    """
    if not is_s3(location):
        return _read_file(location, max_bytes)
    from .s3_images import fetch_object  # noqa: PLC0415 -- local jobs never load boto3

    return fetch_object(location, max_bytes, timeout)


_CODES: Final = {
    errno.ENOENT: "image_not_found",
    errno.ENOTDIR: "image_not_found",
    errno.ENAMETOOLONG: "image_not_found",
    errno.EISDIR: "image_unreadable",
    errno.EACCES: "access_denied",
    errno.EPERM: "access_denied",
}


def _read_file(path: str, max_bytes: int) -> bytes:
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise FetchError("image_unreadable", f"{path} is not a file")
            if info.st_size > max_bytes:
                raise FetchError(
                    "image_too_large",
                    f"{path} has {info.st_size} bytes; limit {max_bytes} (BLIP_MAX_IMAGE_BYTES)",
                )
            return file.read(max_bytes)
    except OSError as error:
        raise FetchError(_CODES.get(error.errno or 0, "fetch_failed"), f"{path}: {error.strerror}") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe must not make us wait


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "…"
