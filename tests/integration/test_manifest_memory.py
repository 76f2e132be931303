"""Staging and planning millions of rows takes the memory of a few: measured in a process of its own."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

# VmHWM, not ru_maxrss: the latter begins with what the parent, the whole test run, held when it forked.
STAGE = """
import json, sys
from orchestrator.contract import JobSpec
from orchestrator.plan import make_plan
from orchestrator.settings import load_settings
from orchestrator.storage import open_store
manifest, out = sys.argv[1:]
spec = JobSpec(id="j", task="caption", model="demo", manifest=manifest, output=out, created_at=0)
plan = make_plan(spec, open_store(out), load_settings())
with open("/proc/self/status") as status:
    kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(json.dumps({"rows": plan.rows, "kib": kib}))
"""


def peak(manifest: Path, rows: int) -> int:
    """Peak resident memory, in MiB, of a process that plans the manifest."""
    command = [sys.executable, "-c", STAGE, str(manifest), f"{manifest}-out"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
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


@pytest.mark.parametrize(("name", "write"), [("m.csv.gz", write_csv), ("m.parquet", write_parquet)])
def test_memory_does_not_grow_with_the_manifest(tmp_path: Path, name: str, write: object) -> None:
    few, many = 500_000, 4_000_000
    for rows in (few, many):
        write(tmp_path / f"{rows}-{name}", rows)  # type: ignore[operator]
    small, large = (peak(tmp_path / f"{rows}-{name}", rows) for rows in (few, many))
    assert large <= small + 48, (small, large)  # blocks of up to 8 MiB are read ahead
    assert large <= 250
