"""Whole jobs through real workers on S3: every format of parts, and the tasks that are made of others."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from numpy import float32
from servers import RedisServer, S3Server
from system import Cluster, colour, write_images, write_rows

from orchestrator import lifecycle
from orchestrator.contract import RESULT_FORMATS, ResultFormat
from orchestrator.export import export
from orchestrator.parts import read_part
from orchestrator.storage import open_store
from orchestrator.verify import verify


@pytest.fixture
def cluster(redis_server: RedisServer, s3_server: S3Server, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def manifest(folder: Path, rows: list[dict[str, Any]]) -> Path:
    write_images(folder, 30)
    return write_rows(folder / "rows.jsonl", [{"image": f"{n % 30}.png", "id": n, **row} for n, row in enumerate(rows)])


def read(output: str) -> list[dict[str, Any]]:
    store = open_store(output)
    return [record for info in store.list("results/part-") for record in read_part(store, info.key)[0]]


@pytest.mark.parametrize("results", RESULT_FORMATS)
def test_a_job_in_every_format(cluster: Cluster, tmp_path: Path, results: ResultFormat) -> None:
    rows = manifest(tmp_path / "in", [{"prompt": f"p{n}", "k": {"n": n}} for n in range(32)])
    (tmp_path / "in/7.png").write_bytes(b"no image")
    worker = cluster.start_worker()
    cluster.start_orchestrator()
    spec = cluster.submit(rows, "s3://blip/out", results=results)
    cluster.until(spec.id, lambda state: state.chunks_done >= 1)
    worker.kill()
    cluster.start_worker()
    state = cluster.until_ended(spec.id)
    assert (state.status, state.completed, state.failed) == ("completed", 31, 1)
    audit = verify("s3://blip/out")
    assert audit.ok, audit.problems
    store = open_store("s3://blip/out")
    keys = [info.key for info in store.list("results/")]
    assert keys == [f"results/part-{n:08d}.{results}" for n in range(4)]
    summary = json.loads(store.get("summary.json"))
    assert [part["key"] for part in summary["parts"]] == keys
    found = read("s3://blip/out")
    assert [record["row"] for record in found] == list(range(32))
    for n, record in enumerate(found):
        assert (record["id"], record["image"]) == (n, f"{n % 30}.png")
        assert record["input"] == {"prompt": f"p{n}", "k": {"n": n}}
        if n == 7:
            assert record["error"]["code"] == "image_unreadable"
        else:
            assert record["result"] == {"caption": f"{colour(n % 30)} p{n}", "score": -0.5, "tokens": 3}
    assert export("s3://blip/out", str(tmp_path / "all.csv")).rows == 32
    again = cluster.submit(rows, "s3://blip/out", results=results)  # the same work: found done
    assert again.id == spec.id
    retried(cluster, spec.id, tmp_path, results)


def retried(cluster: Cluster, job: str, folder: Path, results: ResultFormat) -> None:
    """The failed row once more, its image mended: one part of one record, and an export that has its result."""
    write_images(folder / "in", 8)
    assert lifecycle.retry(cluster.ledger, cluster.settings, job).rows == 1
    state = cluster.until(job, lambda state: state.ended and state.round == 1)
    assert (state.status, state.failed) == ("completed", 0)
    audit = verify("s3://blip/out")
    assert audit.ok, audit.problems
    assert [info.key for info in open_store("s3://blip/out").list("rounds/1/part-")] == [
        f"rounds/1/part-00000000.{results}"
    ]
    assert export("s3://blip/out", str(folder / "all.jsonl")).failed == 0
    found = [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]
    assert [record["row"] for record in found] == list(range(32))
    assert found[7]["result"] == {"caption": f"{colour(7)} p7", "score": -0.5, "tokens": 3}


def test_parts_of_another_format_are_no_parts(cluster: Cluster, tmp_path: Path) -> None:
    rows = manifest(tmp_path / "in", [{}] * 5)
    cluster.start_worker()
    cluster.start_orchestrator()
    cluster.until_ended(cluster.submit(rows, tmp_path / "out").id)
    part = tmp_path / "out/results/part-00000000.jsonl"
    part.with_suffix(".parquet").write_bytes(part.read_bytes())
    assert verify(str(tmp_path / "out")).problems == ["results/part-00000000.parquet: no chunk of the plan"]


def test_embed_and_capfilt(cluster: Cluster, tmp_path: Path) -> None:
    other = tmp_path / "judge"
    other.mkdir()
    texts: list[dict[str, Any]] = [{}, {"text": "right"}, {"text": "wrong"}]
    rows = manifest(tmp_path / "in", texts * 4)
    several = manifest(tmp_path / "in2", [{"texts": ["right", "wrong", "all right"]}])
    cluster.start_worker()
    cluster.start_orchestrator()
    embed = cluster.submit(rows, "s3://blip/embed", "embed", results="parquet")
    models = f"{cluster.model}+{other}"
    capfilt = cluster.submit(rows, "s3://blip/capfilt", "capfilt", model=models, results="parquet")
    lists = cluster.submit(several, "s3://blip/lists", "capfilt", model=models)
    for spec in (embed, capfilt, lists):
        assert cluster.until_ended(spec.id).status == "completed"
        assert verify(spec.output).ok
    for n, record in enumerate(read("s3://blip/embed")):
        assert record["result"]["embedding"] == [float(f"{float32(c / 255):.8e}") for c in (n, 0, 7)]
        assert record["result"].get("text_embedding") == ([0.5, 0.25, 5.0] if n % 3 else None)
    for n, record in enumerate(read("s3://blip/capfilt")):
        caption = f"{colour(n)} by caption:{cluster.model}"
        assert record["result"] == {
            "caption": caption, "caption_match": 0.75, "text_match": (None, 1.0, 0.0)[n % 3],
            "kept": ["right", caption] if n % 3 == 1 else [caption],
        }  # fmt: skip
    (record,) = read("s3://blip/lists")
    assert record["result"]["text_matches"] == [1.0, 0.0, 1.0]
    assert record["result"]["kept"] == ["right", "all right", record["result"]["caption"]]
    job = json.loads(open_store("s3://blip/capfilt").get("job.json"))
    assert job["spec"]["model"] == models
    assert job["model"]["weights_sha256"] == f"{'0' * 64}+{'0' * 64}"
    done = open_store("s3://blip/capfilt").head("results/part-00000000.parquet")
    assert done is not None
    assert done.metadata["weights"] == f"{'0' * 64}+{'0' * 64}"


def test_a_filter_that_cannot_be_loaded_fails_the_job(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "absent").mkdir()
    rows = manifest(tmp_path / "in", [{}] * 3)
    cluster.start_worker()
    cluster.start_orchestrator()
    spec = cluster.submit(rows, tmp_path / "out", "capfilt", model=f"{cluster.model}+{tmp_path / 'absent'}")
    state = cluster.until_ended(spec.id)
    assert state.error is not None
    assert (state.status, state.error["code"]) == ("failed", "model_unusable")
    assert "absent" in state.error["message"]
