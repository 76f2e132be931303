"""Staging and planning millions of rows takes the memory of a few: measured in a process of its own."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pyarrow
import pytest
from manifest_files import MANIFEST, WRITERS, put_inventory
from pyarrow import parquet
from servers import MotoServer

from orchestrator.storage import open_store

# VmHWM, not ru_maxrss: the latter begins with what the parent, the whole test run, held when it forked.
STAGE = """
import json, sys
from orchestrator.contract import JobSpec
from orchestrator.manifest import chunking
from orchestrator.plan import make_plan
from orchestrator.settings import load_settings
from orchestrator.storage import open_store
manifest, out, block = sys.argv[1:]
if block != "None":
    chunking.BLOCK, chunking.LONGEST_CHUNK = int(block), 4 * int(block)
spec = JobSpec(id="j", task="caption", model="demo", manifest=manifest, output=out, created_at=0)
plan = make_plan(spec, open_store(out), load_settings())
with open("/proc/self/status") as status:
    kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(json.dumps({"rows": plan.rows, "kib": kib}))
"""


#: What is asked for is measured, and not what allocators keep back for every thread: that differs by 20 MiB and more
#: between two runs of the same.
PLAIN = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}


def peak(manifest: Path | str, rows: int, out: Path | None = None, block: int | None = 2**20) -> int:
    """Peak resident memory, in MiB, of a process that plans the manifest.

    `block`: bytes read ahead at once; None: as always. With small ones the peak is the same whenever they arrive.
    """
    command = [sys.executable, "-c", STAGE, str(manifest), str(out or f"{manifest}-out"), str(block)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=240, env={**os.environ, **PLAIN}
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert told["rows"] == rows
    return int(told["kib"]) >> 10


def write_csv(path: Path, rows: int) -> None:
    with gzip.open(path, "wb", 1) as file:
        file.write(b"image,id,note\n")
        for begin in range(0, rows, 50_000):
            file.write(b"".join(b'photos/%09d.jpg,%d,"a, b"\n' % (n, n) for n in range(begin, begin + 50_000)))


def write_parquet(path: Path, rows: int) -> None:
    schema = pyarrow.schema([("image", pyarrow.string()), ("id", pyarrow.int64())])
    with parquet.ParquetWriter(path, schema) as writer:
        for begin in range(0, rows, 50_000):
            numbers = range(begin, begin + 50_000)
            columns = [[f"photos/{n:09d}.jpg" for n in numbers], list(numbers)]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))


def write_zstd(path: Path, rows: int) -> None:
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        for begin in range(0, rows, 50_000):
            file.write(
                b"".join(b'{"image": "photos/%09d.jpg", "id": %d}\n' % (n, n) for n in range(begin, begin + 50_000))
            )


@pytest.mark.parametrize(
    ("name", "write"), [("m.csv.gz", write_csv), ("m.parquet", write_parquet), ("m.jsonl.zst", write_zstd)]
)
def test_memory_does_not_grow_with_the_manifest(tmp_path: Path, name: str, write: object) -> None:
    few, many = 500_000, 1_500_000  # with few, all buffers are already as large as they get
    for rows in (few, many):
        write(tmp_path / f"{rows}-{name}", rows)  # type: ignore[operator]
    small, large = (peak(tmp_path / f"{rows}-{name}", rows) for rows in (few, many))
    assert large <= small + 24, (small, large)  # one more reference and number a row would be 36
    assert large <= 250
    assert peak(tmp_path / f"{few}-{name}", few, tmp_path / "again", None) <= 250


def write_long_csv(path: Path, rows: int) -> None:
    with path.open("wb") as file:
        file.write(b"image,note\n")
        for n in range(rows):
            file.write(b"%d.jpg,%s\n" % (n, b"x" * 1_000_000))


def write_long_parquet(path: Path, rows: int, note: str = "%d") -> None:
    """Pages of a few rows, in one row group."""
    schema = pyarrow.schema([("image", pyarrow.string()), ("note", pyarrow.string())])
    with parquet.ParquetWriter(path, schema, compression="zstd", write_batch_size=8) as writer:
        columns = [
            [f"{n}.jpg" for n in range(rows)],
            [note.replace("%d", str(n)) + "x" * 1_000_000 for n in range(rows)],
        ]
        writer.write_batch(pyarrow.record_batch(columns, schema=schema))


def write_repeated_parquet(path: Path, rows: int) -> None:
    """The long text is in the file once, whatever the rows."""
    write_long_parquet(path, rows, "")


@pytest.mark.parametrize(
    ("name", "write"),
    [("m.csv", write_long_csv), ("m.parquet", write_long_parquet), ("repeated.parquet", write_repeated_parquet)],
)
def test_memory_does_not_grow_with_long_rows(tmp_path: Path, name: str, write: object) -> None:
    few, many = 80, 200  # of a megabyte each
    for rows in (few, many):
        write(tmp_path / f"{rows}-{name}", rows)  # type: ignore[operator]
    small, large = (peak(tmp_path / f"{rows}-{name}", rows) for rows in (few, many))
    assert large <= small + 60, (small, large)  # all rows at once would be 120 at least
    assert large <= 330
    assert peak(tmp_path / f"{few}-{name}", few, tmp_path / "again", None) <= 330


@pytest.mark.parametrize("file_format", ["CSV", "Parquet", "ORC"])
def test_memory_does_not_grow_with_an_inventory(
    s3_server: MotoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str
) -> None:
    """In the number of its files."""
    monkeypatch.setenv("BLIP_ALLOWED_BUCKETS", "photos")
    data = WRITERS[file_format]([(f"{'photos/' * 42}{n:09d}.jpg", "v", True, False) for n in range(25_000)])
    open_store("s3://blip").put("inv/data", data)
    file = {"key": "inv/data", "size": len(data), "MD5checksum": hashlib.md5(data).hexdigest()}
    peaks = []
    for files in (4, 12):  # the first few fragment the heap
        put_inventory(file_format, files=[file] * files)
        peaks.append(peak(MANIFEST, files * 25_000, tmp_path / f"out-{files}"))
    small, large = peaks
    assert large <= small + 32, (small, large)  # the rows themselves are 63
    assert large <= 250


class Listing(BaseHTTPRequestHandler):
    """A bucket `blip` whose keys below N/ are N thousands, and exist nowhere."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        asked = parse_qs(urlsplit(self.path).query)
        prefix, page = asked["prefix"][0], int(asked.get("continuation-token", ["0"])[0])
        entry = '<Contents><Key>%sphotos/%09d.jpg</Key><Size>17</Size><ETag>"%032x"</ETag></Contents>'
        entries = "".join(entry % (prefix, n, n) for n in range(1000 * page, 1000 * page + 1000))
        more = page + 1 < int(prefix.rstrip("/"))
        text = f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{entries}" + (
            f"<NextContinuationToken>{page + 1}</NextContinuationToken>" if more else ""
        )
        body = f"{text}</ListBucketResult>".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def test_memory_does_not_grow_with_a_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Listing)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{server.server_address[1]}", "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    try:
        small, large = (peak(f"s3://blip/{n}/", n * 1000, tmp_path / f"out-{n}") for n in (10, 60))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert large <= small + 16, (small, large)  # what is known of a key takes 400 bytes or more: 19
    assert large <= 200


def test_memory_does_not_grow_with_a_folder(tmp_path: Path) -> None:
    """Of many folders; the names in one are sorted, and so held at once."""
    peaks = []
    for folders in (10, 60):
        for folder in range(folders):
            below = tmp_path / f"{folders}/{folder:03d}"
            below.mkdir(parents=True)
            for n in range(1000):
                (below / f"{n:09d}.jpg").touch()
        peaks.append(peak(tmp_path / str(folders), folders * 1000, tmp_path / f"out-{folders}"))
    small, large = peaks
    assert large <= small + 16, (small, large)
    assert large <= 200
