"""Manifests of every format, made to its public specification, for tests that read them."""

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote_plus

import pyarrow
from pyarrow import orc, parquet

from orchestrator.storage import open_store

KEYS = ["img/a b+c.jpg", "img/é,1.PNG", 'img/q"uote.webp']
IMAGES = [f"s3://blip/{key}" for key in KEYS]


def lines(key: str) -> bytes:
    return b"".join(json.dumps({key: image, "n": n}).encode() + b"\n" for n, image in enumerate(IMAGES))


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def table(delimiter: str, rows: list[list[str]], newline: str = "\r\n") -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=newline).writerows(rows)
    return text.getvalue().encode()


def parquet_bytes() -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table({"image": IMAGES, "n": [0, 1, 2]}), sink, compression="zstd")
    return sink.getvalue()


NAMED = [["n", "image"], *([str(n), image] for n, image in enumerate(IMAGES))]
FILES: dict[str, tuple[str, bytes]] = {
    "rows.jsonl": ("jsonl", lines("image")),
    "rows.jsonl.gz": ("jsonl", gzip.compress(lines("image"))),
    "rows.jsonl.zst": ("jsonl", zstd(lines("image"))),
    "output.manifest": ("ground-truth", lines("source-ref")),
    "bom.csv": ("csv", b"\xef\xbb\xbf" + table(",", NAMED)),
    "rows.csv.gz": ("csv", gzip.compress(table(",", NAMED, "\n"))),
    "rows.tsv": ("tsv", table("\t", NAMED)),
    "batch.csv": ("s3-batch", table(",", [["blip", quote_plus(key)] for key in KEYS])),
    "list.txt": ("list", "\n".join(IMAGES).encode()),
    "rows.parquet": ("parquet", parquet_bytes()),
}


# ── S3 Inventory ─────────────────────────────────────────────────────────────────────────────────────────────────────

SCHEMA = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag"
#: key, version, whether it is the latest, whether it is a delete marker
OBJECTS = [
    ("img/a b+c.jpg", "v1", True, False), ("img/é,1.PNG", "v2", True, False), ("img/é,1.PNG", "v1", False, False),
    ("img/gone.jpg", "v3", True, True), ("data/notes.txt", "v1", True, False), ("img/", "v1", True, False),
    ('img/q"uote.webp', "v9", True, False),
]  # fmt: skip


def inventory_csv(objects: list[tuple[str, str, bool, bool]]) -> bytes:
    """Headerless, every cell quoted, keys URL-encoded, gzipped."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for key, version, latest, deleted in objects:
        writer.writerow([
            "photos", quote_plus(key, safe="/"), version, str(latest).lower(), str(deleted).lower(), "17",
            "2026-11-01T10:00:00.000Z", "d41d8cd98f00b204e9800998ecf8427e",
        ])  # fmt: skip
    return gzip.compress(text.getvalue().encode())


def inventory_table(objects: list[tuple[str, str, bool, bool]]) -> pyarrow.Table:
    return pyarrow.table({
        "bucket": ["photos"] * len(objects),
        "key": [key for key, *_ in objects],
        "version_id": [version for _, version, *_ in objects],
        "is_latest": [latest for *_, latest, _ in objects],
        "is_delete_marker": [deleted for *_, deleted in objects],
        "size": pyarrow.array([17] * len(objects), pyarrow.int64()),
    })  # fmt: skip


def inventory_parquet(objects: list[tuple[str, str, bool, bool]]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(inventory_table(objects), sink)
    return sink.getvalue()


def inventory_orc(objects: list[tuple[str, str, bool, bool]]) -> bytes:
    sink = io.BytesIO()
    orc.write_table(inventory_table(objects), sink)
    return sink.getvalue()


SCHEMAS = {
    "CSV": SCHEMA,
    "Parquet": "message s3.inventory { required binary bucket (STRING); required binary key (STRING); "
    "optional binary version_id (STRING); optional boolean is_latest; optional boolean is_delete_marker; "
    "optional int64 size;}",
    "ORC": "struct<bucket:string,key:string,version_id:string,is_latest:boolean,is_delete_marker:boolean,size:bigint>",
}
WRITERS: dict[str, Callable[[list[tuple[str, str, bool, bool]]], bytes]] = {
    "CSV": inventory_csv, "Parquet": inventory_parquet, "ORC": inventory_orc,
}  # fmt: skip
MANIFEST = "s3://blip/inv/photos/daily/2026-11-06T01-00Z/manifest.json"


def put_inventory(file_format: str, **changes: Any) -> dict[str, Any]:
    """An inventory of bucket `photos` in two files, published below s3://blip/inv."""
    files = []
    for number, objects in enumerate((OBJECTS[:3], OBJECTS[3:])):
        data = WRITERS[file_format](objects)
        key = f"inv/photos/daily/data/{number}.{file_format.lower()}"
        open_store("s3://blip").put(key, data)
        files.append({"key": key, "size": len(data), "MD5checksum": hashlib.md5(data).hexdigest()})
    manifest = {
        "sourceBucket": "photos", "destinationBucket": "arn:aws:s3:::blip", "version": "2016-11-30",
        "creationTimestamp": "1793926800000", "fileFormat": file_format, "fileSchema": SCHEMAS[file_format],
        "files": files, **changes,
    }  # fmt: skip
    text = json.dumps(manifest, indent=2).encode()
    folder = open_store(MANIFEST.rpartition("/")[0])
    folder.put("manifest.json", text)
    folder.put("manifest.checksum", hashlib.md5(text).hexdigest().encode() + b"\n")
    return manifest


EXPECTED = ["s3://photos/img/a b+c.jpg", "s3://photos/img/é,1.PNG", 's3://photos/img/q"uote.webp']
