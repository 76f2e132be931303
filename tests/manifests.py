"""Manifests as files, planned and read back."""

from pathlib import Path
from typing import Any

import pyarrow

from orchestrator.contract import BadRow, JobSpec, Row
from orchestrator.plan import Plan, make_plan
from orchestrator.settings import load_settings
from orchestrator.storage import open_store


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def plan_of(path: Path, out: Path, task: str = "caption", **more: Any) -> Plan:
    spec = JobSpec(id="j", task=task, model="demo", manifest=str(path), output=str(out), created_at=0, **more)  # type: ignore[arg-type]
    return make_plan(spec, open_store(str(out)), load_settings())


def rows_of(plan: Plan, task: str = "caption") -> list[Row | BadRow]:
    return [row for chunk in plan.all_chunks() for row in plan.read_rows(chunk, task)]  # type: ignore[arg-type]


def planned(folder: Path, name: str, data: bytes, task: str = "caption", **more: Any) -> list[Row | BadRow]:
    """The rows of a manifest after a whole plan, written and read back."""
    (folder / name).write_bytes(data)
    return rows_of(plan_of(folder / name, folder / f"out-{name}", task, **more), task)
