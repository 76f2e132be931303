"""The audit of an output: what is damaged is told in one line, whatever it is."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from harness import advance, caption_spec, ended, write_manifest
from mini_worker import MiniWorker
from servers import MotoServer

from orchestrator.contract import JobSpec
from orchestrator.control import Controller
from orchestrator.embedded import finished_summary
from orchestrator.errors import JobError
from orchestrator.finalizer import finalize
from orchestrator.jobs import submit
from orchestrator.parts import part_key
from orchestrator.plan import load_plan
from orchestrator.settings import Settings
from orchestrator.storage import open_store
from orchestrator.verify import verify


@pytest.fixture
def job(settings: Settings, controller: Controller, tmp_path: Path) -> JobSpec:
    """A job that is complete, in `out`: 30 rows in 3 parts."""
    spec = caption_spec(write_manifest(tmp_path, 30), tmp_path / "out")
    advance(controller, submit(controller.ledger, spec, settings), ended, MiniWorker(settings))
    return spec


def test_parts_on_s3_are_read_some_at_once_and_told_in_order(
    s3_server: MotoServer, settings: Settings, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store("s3://blip/out")
    rows = b"".join(b"s3://blip/%d.jpg\n" % n for n in range(40))
    open_store("s3://blip/in").put("list.txt", rows)
    spec = caption_spec("s3://blip/in/list.txt", "s3://blip/out", chunk_rows=1)
    advance(controller, submit(controller.ledger, spec, settings), ended, MiniWorker(settings), 60)
    assert verify(spec.output).ok
    wrong = range(3, 40, 4)
    for chunk in wrong:
        store.put(part_key(chunk), b"damaged" * chunk)
    met = threading.Barrier(8)  # the readers; all of them are needed to go on
    kind = type(store)
    get = kind.get

    def together(self: Any, key: str, *span: int, **more: Any) -> bytes:
        if key in {part_key(chunk) for chunk in range(8)}:
            met.wait(60)
        return get(self, key, *span, **more)

    monkeypatch.setattr(kind, "get", together)
    audit = verify(spec.output)
    assert audit.problems[:-1] == [
        f"s3://blip/out/{part_key(chunk)}: its last line is cut off; delete this part and run the job again"
        for chunk in wrong
    ]
    assert "summary.json counts" in audit.problems[-1]
    assert (audit.rows_found, audit.parts, audit.chunks) == (30, 30, 40)


def summaries(good: dict[str, Any]) -> list[str]:
    part = {name: value for name, value in good["parts"][0].items() if name != "sha256"}
    return [
        "", "{", "[]", "{}", "null", '"x"', "[" * 100_000,
        json.dumps({**good, "parts": None}), json.dumps({**good, "parts": [7]}),
        json.dumps({**good, "parts": [part]}), json.dumps({**good, "request_counts": [1]}),
    ]  # fmt: skip


def test_a_damaged_summary_is_told_and_written_anew(
    settings: Settings, controller: Controller, job: JobSpec, tmp_path: Path
) -> None:
    path, plan = tmp_path / "out/summary.json", load_plan(open_store(job.output), settings)
    state = controller.ledger.state(job.id)
    assert plan is not None
    assert state is not None
    for text in summaries(json.loads(path.read_text())):
        path.write_text(text)
        audit = verify(job.output)
        assert audit.problems == [f"{path} is damaged; delete it and run the job again"], text
        assert (audit.rows_found, audit.complete) == (30, False)
        assert finished_summary(job, settings) is None
        finalize(job, plan, state)
        assert verify(job.output).ok


def damage(text: str, change: dict[str, Any]) -> str:
    return json.dumps({**json.loads(text), **change})


@pytest.mark.parametrize(
    "change",
    [
        {"ends": None}, {"ends": ["x"]}, {"ends": []}, {"rows": [10, 10]}, {"rows": [10.5, 10, 10]}, {"start": "x"},
        {"first_row": None}, {"first_chunk": 7}, {"ends": [10**30, 1, 1]},
        {"ends": [1, 2], "rows": [1, 1]},
    ],
)  # fmt: skip
def test_a_damaged_page_of_the_plan_is_told(job: JobSpec, tmp_path: Path, change: dict[str, Any]) -> None:
    (page,) = (tmp_path / "out/plan").glob("*/chunks-00000.json")
    page.write_text(damage(page.read_text(), change))
    with pytest.raises(JobError, match=f"{page} is no page of this plan; choose another output") as caught:
        verify(job.output)
    assert caught.value.code == "plan_invalid"


@pytest.mark.parametrize("text", ["", "[]", "{}", "7", '"chunks-00000"', '{"ends": ', "[" * 100_000])
def test_a_page_that_is_none(job: JobSpec, tmp_path: Path, text: str) -> None:
    (page,) = (tmp_path / "out/plan").glob("*/chunks-00000.json")
    page.write_text(text)
    with pytest.raises(JobError, match="is no page of this plan"):
        verify(job.output)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": "30"}, {"chunks": None}, {"etag": 7}, {"hash": []}, {"more": 1}, {"results": "xml"}, {"results": []},
        {"format": 7}, {"columns": "x"}, {"chunk_rows": 0},
    ],
)  # fmt: skip
def test_a_damaged_plan_is_told(job: JobSpec, tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "out/plan/plan.json"
    path.write_text(damage(path.read_text(), change))
    with pytest.raises(JobError, match="is not a plan; choose another output"):
        verify(job.output)


def test_a_record_that_is_none_fails_the_job_with_the_part_s_name(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    spec, worker = caption_spec(write_manifest(tmp_path, 30), tmp_path / "out"), MiniWorker(settings)
    job = submit(controller.ledger, spec, settings)
    path = tmp_path / "out/results/part-00000001.jsonl"

    def damaged(state: Any) -> bool:
        if path.exists() and b'"error":null' in path.read_bytes():
            other = tmp_path / "damaged"  # the finalizer may read meanwhile, and is to see all of it
            other.write_bytes(path.read_bytes().replace(b'"error":null', b'"error":"none"', 1))
            other.replace(path)
        return bool(ended(state))

    state = advance(controller, job, damaged, worker)
    assert state.error is not None
    assert state.error["code"] == "part_invalid"
    assert f"{path}: record 1: `error` is str; delete this part" in state.error["message"]
    assert [problem for problem in verify(spec.output).problems if str(path) in problem]
