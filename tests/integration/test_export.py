"""One file of all rows, from outputs in every format, with retries, to disk and to S3: whole, or not at all."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import S3Server
from test_cli import blip_batch, one_line_error

from orchestrator.contract import RESULT_FORMATS, Chunk, Hint, JobState, ResultFormat, Row, error_row, result_row
from orchestrator.encoding import encode
from orchestrator.errors import JobError, StorageError, UsageError
from orchestrator.export import export
from orchestrator.finalizer import finalize
from orchestrator.jobs import claim_output, make_spec, read_job, spec_of
from orchestrator.parts import REDO, part_key, put_part
from orchestrator.plan import Plan, make_plan
from orchestrator.rounds import begin_round
from orchestrator.settings import load_settings
from orchestrator.storage import open_store
from orchestrator.verify import verify

STATE = JobState("job", "finalizing", None, 3, 3, 25, 22, 3)


def record(row: Row, task: str, fails: bool) -> dict[str, Any]:
    if fails:
        return error_row(row, task, "image_not_found", "not there")  # type: ignore[arg-type]
    vector = {"embedding": [0.5, float(row.number), -0.25]}
    caption = {"caption": f"a dog, {row.number}", "score": -0.5, "tokens": 3}
    return result_row(row, task, vector if task == "embed" else caption)  # type: ignore[arg-type]


def put(plan: Plan, chunk: Chunk, task: str, numbers: list[int], fails: Callable[[int], bool], number: int) -> None:
    rows = [row for row in plan.read_rows(chunk, "caption") if isinstance(row, Row) and row.number in numbers]
    hint = Hint("job", chunk.id, plan.hash, chunk.start, chunk.end, chunk.first_row, chunk.rows, number, len(rows))
    records = [record(row, task, fails(row.number)) for row in rows]
    put_part(plan.store, hint, records, "w", numbers, plan.results)


def output(
    folder: Path, results: ResultFormat = "jsonl", where: str | None = None, task: str = "caption", rows: int = 25,
    fails: Callable[[int], bool] = lambda number: number % 10 == 3, chunk_rows: int = 10,
) -> Plan:  # fmt: skip
    """A job's first round; of every ten rows one failed."""
    folder.mkdir(exist_ok=True)
    lines = (json.dumps({"image": f"{n}.jpg", "id": f"r{n}", "k": n}) + "\n" for n in range(rows))
    (folder / "m.jsonl").write_text("".join(lines))
    spec = make_spec(
        str(folder / "m.jsonl"), task, where or str(folder / "out"), model="demo", chunk_rows=chunk_rows,
        results=results,
    )  # fmt: skip
    store = open_store(spec.output)
    claim_output(spec, store)
    plan = make_plan(spec, store, load_settings())
    for chunk in plan.all_chunks():
        put(plan, chunk, task, list(range(chunk.first_row, chunk.first_row + chunk.rows)), fails, 0)
    return plan


def retry(plan: Plan, done: int = 3) -> None:
    """A second round, in which all but row 13 has a result; stopped after so many of its three chunks."""
    this = begin_round(plan, [])
    assert this is not None
    for chunk in this.chunks[:done]:
        numbers = [n for n in range(chunk * 10, chunk * 10 + 10) if n % 10 == 3]
        put(plan, plan.chunk(chunk), "caption", numbers, lambda number: number == 13, 1)


@pytest.mark.parametrize("results", RESULT_FORMATS)
def test_the_latest_round_wins_in_manifest_order(tmp_path: Path, results: ResultFormat) -> None:
    plan = output(tmp_path / "job", results)
    assert export(plan.store.root, str(tmp_path / "first.jsonl")).failed == 3
    retry(plan)
    for name in ("a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"):
        done = export(plan.store.root, str(tmp_path / name))
        assert (done.rows, done.failed) == (25, 1)
    found = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["row"] for row in found] == list(range(25))
    assert [row["row"] for row in found if row["error"]] == [13]
    assert found[3] == {
        "row": 3, "id": "r3", "image": "3.jpg", "task": "caption", "error": None, "input": {"k": 3},
        "result": {"caption": "a dog, 3", "score": -0.5, "tokens": 3},
    }  # fmt: skip
    unzipped = subprocess.run(["gzip", "-dc", tmp_path / "a.jsonl.gz"], capture_output=True, check=True)
    assert unzipped.stdout == (tmp_path / "a.jsonl").read_bytes()
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column("row").to_pylist() == list(range(25))
    assert table.column("result").combine_chunks().field("caption")[24].as_py() == "a dog, 24"
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["caption"] for row in rows] == ["" if n == 13 else f"a dog, {n}" for n in range(25)]
    assert [row["error_code"] for row in rows if row["error_code"]] == ["image_not_found"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.csv", "a.jsonl", "a.jsonl.gz", "a.parquet", "first.jsonl", "job",
    ]  # fmt: skip


@pytest.mark.parametrize(("done", "failed"), [(0, [3, 13, 23]), (1, [13, 23]), (2, [13, 23])])
def test_rows_that_a_stopped_retry_has_not_done_are_as_before(tmp_path: Path, done: int, failed: list[int]) -> None:
    plan = output(tmp_path / "job")
    retry(plan, done)
    made = blip_batch("export", plan.store.root, tmp_path / "a.jsonl")
    assert made.returncode == 0, made.stderr
    assert made.stderr == "round 1, a retry, is not complete: rows that it has not done are as before it\n"
    found = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["row"] for row in found] == list(range(25))
    assert [row["row"] for row in found if row["error"]] == failed
    shown = blip_batch("report", plan.store.root, tmp_path / "a.html")
    assert (shown.returncode, shown.stderr) == (0, made.stderr)
    assert f"<th>failed<td>{len(failed)}" in (tmp_path / "a.html").read_text()
    audit = verify(plan.store.root)
    missing = [f"{plan.store.uri(part_key(n, 1))} is missing: 1 rows of round 1; {REDO}" for n in range(done, 3)]
    assert audit.problems == [*missing, "summary.json is missing: the job is not complete"]
    assert (audit.rows_found, audit.failed) == (25, len(failed))


def test_a_row_without_any_outcome_is_not_exported(tmp_path: Path) -> None:
    plan = output(tmp_path / "job")
    lost = tmp_path / "job/out" / part_key(1)
    lost.unlink()
    retry(plan, 1)
    with pytest.raises(JobError, match=r"part-00000001\.jsonl is missing: rows 10 to 19; let the job finish"):
        export(plan.store.root, str(tmp_path / "all.jsonl"))


def test_a_part_that_a_complete_retry_has_lost_is_not_exported_as_before_it(tmp_path: Path) -> None:
    plan = output(tmp_path / "job")
    retry(plan)
    assert finalize(spec_of(read_job(plan.store) or {}, plan.store), plan, STATE)
    (tmp_path / "job/out" / part_key(0, 1)).unlink()
    with pytest.raises(JobError, match="is missing: 1 rows of round 1; let the job finish"):
        export(plan.store.root, str(tmp_path / "all.jsonl"))


def test_from_s3_to_s3(s3_server: S3Server, tmp_path: Path) -> None:
    plan = output(tmp_path / "job", "parquet", "s3://blip/out")
    done = blip_batch("export", "s3://blip/out", "s3://blip/files/all.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"file": "s3://blip/files/all.jsonl", "rows": 25, "failed": 3}
    lines = open_store("s3://blip/files").get("all.jsonl").splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(25))
    assert plan.results == "parquet"


def test_embeddings_keep_their_size_when_the_first_rows_failed(tmp_path: Path) -> None:
    plan = output(tmp_path / "job", "parquet", task="embed", fails=lambda number: number < 15)
    export(plan.store.root, str(tmp_path / "all.parquet"))
    vectors = pq.read_table(tmp_path / "all.parquet").column("result").combine_chunks().field("embedding")
    assert vectors.type == pa.list_(pa.float32(), 3)
    assert vectors[20].as_py() == [0.5, 20.0, -0.25]
    assert export(plan.store.root, str(tmp_path / "all.csv")).failed == 15


def test_nothing_is_left_of_what_cannot_be_finished(tmp_path: Path) -> None:
    plan = output(tmp_path / "job")
    (tmp_path / "all.jsonl").write_text("an older one\n")
    part = tmp_path / "job/out" / part_key(2)
    whole = part.read_bytes()
    part.write_bytes(whole[:-9])
    with pytest.raises(JobError, match="cut off"):
        export(plan.store.root, str(tmp_path / "all.jsonl"))
    part.unlink()
    with pytest.raises(JobError, match="is missing: rows 20 to 24; let the job finish"):
        export(plan.store.root, str(tmp_path / "all.jsonl"))
    assert (tmp_path / "all.jsonl").read_text() == "an older one\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.jsonl", "job"]


def test_mistakes(tmp_path: Path) -> None:
    plan = output(tmp_path / "job")
    out = plan.store.root
    one_line_error(blip_batch("export", tmp_path, tmp_path / "x.jsonl"), "holds no job")
    one_line_error(blip_batch("export", out, tmp_path / "x.txt"), "must end in .jsonl, .jsonl.gz, .csv or .parquet")
    for file, says in (
        (f"{out}/errors.jsonl", "part of the output itself"),
        (f"{out}/results/part-00000001.jsonl", "part of the output itself"),
        (str(tmp_path / "nowhere/x.csv"), "make it first"),
    ):
        with pytest.raises(UsageError, match=says):
            export(out, file)
    with pytest.raises(StorageError):
        export(out, "/proc/x.csv")


def test_memory_does_not_grow_with_the_output(tmp_path: Path) -> None:
    """Peaks of two exports, in processes of their own: ten times the rows, the same memory but for 40 MB."""
    code = (
        "import sys; from orchestrator.export import export\n"
        "for name in sys.argv[2:]: export(sys.argv[1], name)\n"
        "print(next(int(line.split()[1]) // 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    for rows in (10_000, 100_000):
        plan = output(tmp_path / str(rows), rows=rows, chunk_rows=500)
        files = [str(tmp_path / f"{rows}{ending}") for ending in (".jsonl", ".csv", ".parquet")]
        done = subprocess.run([sys.executable, "-c", code, plan.store.root, *files], capture_output=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] <= peaks[0] + 40, peaks


def test_parts_of_a_job_are_the_bytes_that_their_format_says(tmp_path: Path) -> None:
    plan = output(tmp_path / "job", "jsonl.gz")
    rows = [row for row in plan.read_rows(plan.chunk(1), "caption") if isinstance(row, Row)]
    expected = encode([record(row, "caption", row.number == 13) for row in rows], "jsonl.gz", "caption")
    assert (tmp_path / "job/out/results/part-00000001.jsonl.gz").read_bytes() == expected
