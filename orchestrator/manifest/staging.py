"""Manifests whose rows are not plain lines, written out once as lines: into a temporary file, in constant memory."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..contract import ManifestFormat
from ..errors import ManifestError
from ..settings import Settings
from ..stopping import go_on
from ..storage import is_s3
from ..temporary import temporary_file
from .formats import LINE_FORMATS, is_image
from .inventory import inventory_lines, read_inventory
from .source import Source, no_images, open_manifest, opened
from .tables import csv_lines, parquet_lines

_BLOCK: Final = 2**20  # bytes written at once, or one line


@dataclass(frozen=True)
class Staged:
    """The rows as a file of lines that vanishes with the block."""

    path: Path
    sha256: str  # of its content: the same manifest gives the same
    skipped: Mapping[str, int]  # why -> entries of the manifest that are no rows


def require_rows(
    uri: str, given: ManifestFormat | None, settings: Settings, columns: Mapping[str, str] | None = None
) -> None:
    """Raises ManifestError for what can be known without reading all of a manifest: unreadable, unknown, empty, …"""
    source = open_manifest(uri, given, settings, columns)
    if source.format == "folder" and not any(is_image(info.key) for info in source.store.list()):
        raise no_images(uri)
    if source.format == "s3-inventory":
        read_inventory(source, settings)


@contextmanager
def staged(source: Source, settings: Settings) -> Iterator[Staged]:
    """The rows of a manifest, a folder or a prefix as lines. Raises ManifestError and StorageError."""
    skipped: Counter[str] = Counter()
    digest = hashlib.sha256()
    with temporary_file("blip-rows-") as file:
        for block in _blocks(source, settings, skipped):
            go_on()
            digest.update(block)
            file.write(block)
        if file.size == 0:
            raise ManifestError(f"{source.uri} is empty; a manifest needs at least one row")
        yield Staged(file.path, digest.hexdigest(), dict(skipped))


def _blocks(source: Source, settings: Settings, skipped: Counter[str]) -> Iterator[bytes]:
    if source.format in LINE_FORMATS:  # compressed: its lines stay as they are
        with opened(source) as stream:
            while block := stream.read(_BLOCK):
                yield block
        return
    lines = bytearray()
    for line in _lines(source, settings, skipped):
        lines += line
        if len(lines) >= _BLOCK:
            yield bytes(lines)
            lines.clear()
    yield bytes(lines)


def _lines(source: Source, settings: Settings, skipped: Counter[str]) -> Iterable[bytes]:
    if source.format == "folder":
        return _listing(source, skipped)
    if source.format == "s3-inventory":
        return inventory_lines(source, settings, skipped)
    return parquet_lines(source) if source.format == "parquet" else csv_lines(source)


def _listing(source: Source, skipped: Counter[str]) -> Iterator[bytes]:
    empty = True
    for info in source.store.list():
        if is_image(info.key):
            empty = False
            yield json.dumps({"image": source.store.uri(info.key) if is_s3(source.uri) else info.key}).encode() + b"\n"
        else:
            skipped["keys that are no images"] += 1
    if empty:
        raise no_images(source.uri)
