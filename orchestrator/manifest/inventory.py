"""S3 Inventory: a manifest.json, and the CSV, Parquet or ORC files that it lists, checksums verified.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-inventory-location.html tells of the manifest;
keys are URL-encoded in CSV files, and only there.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote_plus

from pydantic import BaseModel, Field, ValidationError, field_validator

from blip_engine.errors import one_line

from ..errors import FetchError, ManifestError, StorageError
from ..fetch import ImagePolicy
from ..settings import Settings
from ..storage import open_object
from .formats import is_image
from .source import Source, StoredFile, compression_of, decompressed
from .tables import local_copy, md5, slices

_LARGEST: Final = 256 * 2**20  # bytes of a manifest.json
_BATCH: Final = 4096  # rows of Parquet and ORC as Python values at once
_SIDECAR: Final = "manifest.checksum"  # beside manifest.json, of which it holds the MD5
_FIELDS: Final = ("bucket", "key", "islatest", "isdeletemarker")  # the last two only where versions are listed


class _File(BaseModel):
    key: str
    md5: str = Field(alias="MD5checksum", pattern=r"^[0-9a-fA-F]{32}$")


class _Inventory(BaseModel):
    source_bucket: str = Field(alias="sourceBucket")
    destination_bucket: str = Field(alias="destinationBucket")
    file_format: str = Field(alias="fileFormat")
    file_schema: str = Field(alias="fileSchema")
    files: list[_File]

    @field_validator("file_format")
    @classmethod
    def _upper(cls, value: str) -> str:
        return value.upper()  # "Parquet" in S3's own examples


def inventory_lines(source: Source, settings: Settings, skipped: Counter[str]) -> Iterator[bytes]:
    """A row for every present image; `skipped` counts what is none. Raises ManifestError and StorageError."""
    inventory = read_inventory(source, settings)
    read = _csv if inventory.file_format == "CSV" else _columnar
    rows = 0
    for index, file in enumerate(inventory.files):
        where = f"{source.uri}: files[{index}]"
        part = _part(source.uri, where, file, inventory, settings)
        for bucket, key, latest, deleted in read(where, part, file.md5, inventory):
            if _is_true(deleted) or (latest is not None and not _is_true(latest)):
                skipped["old versions and delete markers"] += 1
            elif not is_image(key):
                skipped["keys that are no images"] += 1
            else:
                rows += 1
                yield b'{"image": %s}\n' % json.dumps(f"s3://{bucket}/{key}").encode()
    if not rows:
        raise ManifestError(f"{source.uri}: the inventory lists no images ({skipped.total()} keys skipped)")


def read_inventory(source: Source, settings: Settings) -> _Inventory:
    """The manifest.json. Raises ManifestError unless it is whole, of a known format, and its images may be read."""
    inventory = _parsed(source)
    if inventory.file_format not in {"CSV", "PARQUET", "ORC"}:
        raise ManifestError(f"{source.uri}: fileFormat is {inventory.file_format!r}; it can be CSV, Parquet or ORC")
    _check_bucket(source.uri, ImagePolicy.of(source.uri, False, settings), inventory.source_bucket)
    return inventory


def _parsed(source: Source) -> _Inventory:
    if source.size > _LARGEST:
        raise ManifestError(f"{source.uri} has more than {_LARGEST >> 20} MiB; is it an inventory's manifest.json?")
    text = source.store.get(source.key, 0, source.size, etag=source.etag)
    if source.key == "manifest.json" and source.store.head(_SIDECAR) is not None:
        wanted = source.store.get(_SIDECAR).decode(errors="replace").strip()
        digest = md5()
        digest.update(text)
        _check_sum(source.uri, wanted, digest.hexdigest())
    try:
        return _Inventory.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ManifestError(f"{source.uri} is no S3 Inventory manifest: {where}: {first['msg']}") from None


def _check_sum(where: str, wanted: str, found: str) -> None:
    if wanted.lower() != found:
        raise ManifestError(
            f"{where}: the MD5 checksum is {found}, not {wanted}: the inventory was changed or not copied whole"
        )


def _check_bucket(uri: str, policy: ImagePolicy, bucket: str) -> None:
    """An inventory usually lies in another bucket than its images: better said at once than by every row."""
    if not any(entry == "*" or entry.partition("/")[0] == bucket for entry in policy.allowed):
        raise ManifestError(
            f"{uri}: its images are in bucket {bucket}; add {bucket} to BLIP_ALLOWED_BUCKETS to read them"
        )


def _part(manifest: str, where: str, file: _File, inventory: _Inventory, settings: Settings) -> Source:
    bucket = inventory.destination_bucket.rpartition(":")[2]
    uri = f"s3://{bucket}/{file.key}"
    try:
        if not manifest.startswith(f"s3://{bucket}/"):  # whoever may name the manifest may read what lies with it
            ImagePolicy.of(manifest, False, settings).resolve(uri)
        store, key = open_object(uri, settings)
        info = store.head(key)
    except FetchError as error:
        raise ManifestError(f"{where}: {error}") from None
    except StorageError as error:
        if error.retryable:
            raise
        raise ManifestError(f"{where}: {error}") from None
    if info is None:
        raise ManifestError(f"{where}: {uri} does not exist; is the inventory whole?")
    return Source(uri, store, key, info.etag, info.size, "csv")


def _csv(where: str, part: Source, wanted: str, inventory: _Inventory) -> Iterator[tuple[Any, ...]]:
    schema = inventory.file_schema.split(",")
    names = _names(where, schema)
    at = [schema.index(names[name]) if name in names else None for name in _FIELDS]
    digest = md5()
    raw = StoredFile(part.store, part.key, part.etag, part.size, digest)
    compression = compression_of(part.store.get(part.key, 0, min(4, part.size), etag=part.etag))
    with decompressed(raw, part.uri, compression) as stream:
        reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8", newline=""), strict=True)
        try:
            for cells in reader:
                if len(cells) != len(schema):
                    raise ValueError(f"{len(cells)} cells where fileSchema has {len(schema)}")
                bucket, key, latest, deleted = (None if index is None else cells[index] for index in at)
                yield bucket, unquote_plus(str(key), errors="strict"), latest or None, deleted
        except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
            _read_out(raw)
            _check_sum(f"{where}: {part.uri}", wanted, digest.hexdigest())  # another file than was listed: says more
            raise ManifestError(f"{where}: {part.uri}: line {reader.line_num}: {error}") from None
        _read_out(raw)  # what follows the compressed data
    _check_sum(f"{where}: {part.uri}", wanted, digest.hexdigest())


def _read_out(raw: StoredFile) -> None:
    while raw.read(2**20):
        pass


def _columnar(where: str, part: Source, wanted: str, inventory: _Inventory) -> Iterator[tuple[Any, ...]]:
    digest = md5()
    with local_copy(part, digest) as path:
        _check_sum(f"{where}: {part.uri}", wanted, digest.hexdigest())
        batches = _orc_batches if inventory.file_format == "ORC" else _parquet_batches
        import pyarrow  # noqa: PLC0415

        row = 0
        try:
            for names, batch in batches(where, path):
                for cells in _rows(names, batch):
                    yield cells
                    row += 1
        except (pyarrow.ArrowException, OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
            raise ManifestError(f"{where}: {part.uri}: damaged from row {row} on: {one_line(error)[:300]}") from None


def _parquet_batches(where: str, path: Path) -> Iterator[tuple[dict[str, str], Any]]:
    from pyarrow import parquet  # noqa: PLC0415

    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
        names = _names(where, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=_BATCH, columns=list(names.values())):
            yield names, batch


def _orc_batches(where: str, path: Path) -> Iterator[tuple[dict[str, str], Any]]:
    from pyarrow import orc  # noqa: PLC0415

    file = orc.ORCFile(path)
    names = _names(where, file.schema.names)
    for stripe in range(file.nstripes):
        for batch in slices(file.read_stripe(stripe, columns=list(names.values())), _BATCH):
            yield names, batch


def _rows(names: Mapping[str, str], batch: Any) -> Iterator[tuple[Any, ...]]:
    columns = [batch.column(names[name]).to_pylist() if name in names else repeat(None) for name in _FIELDS]
    for bucket, key, latest, deleted in zip(*columns):  # noqa: B905 -- `repeat` has no end
        yield _text(bucket), _text(key), latest, deleted


def _text(value: object) -> str:
    if not isinstance(value, str | bytes):
        raise ValueError(f"a bucket or key is {value!r}, which is no text")
    return value if isinstance(value, str) else value.decode()


def _names(where: str, there: Sequence[str]) -> dict[str, str]:
    """Our field -> its name in a schema; S3 writes `IsLatest` in CSV and `is_latest` in the other formats."""
    found = {name.strip().replace("_", "").lower(): name for name in there}
    for name in _FIELDS[:2]:
        if name not in found:
            raise ManifestError(f"{where}: the schema has no {name}, but {', '.join(there)[:300]}")
    return {name: found[name] for name in _FIELDS if name in found}


def _is_true(value: object) -> bool:
    return value is True or (isinstance(value, str) and value.lower() == "true")
