"""Whole jobs without a model: real Redis, real storage, a real queue."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import FAST
from harness import advance, caption_spec, ended, rows_of, write_manifest
from mini_worker import MiniWorker
from servers import RcloneServer, RedisServer, S3Server

from orchestrator.control import Controller
from orchestrator.errors import UsageError
from orchestrator.jobs import submit
from orchestrator.scheduling import LEAST_IN_FLIGHT, PER_SLOT_UNKNOWN
from orchestrator.settings import Settings, load_settings
from orchestrator.storage import open_store
from orchestrator.verify import verify


def test_a_job_from_manifest_to_summary(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spec = caption_spec(write_manifest(tmp_path, 95, lambda n: n % 10 == 3), out)
    job = submit(controller.ledger, spec, settings)
    state = advance(controller, job, ended, MiniWorker(settings))
    assert (state.status, state.total, state.completed, state.failed, state.chunks) == ("completed", 95, 85, 10, 10)
    assert rows_of(out) == list(range(95))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["request_counts"] == {"total": 95, "completed": 85, "failed": 10}
    assert summary["errors"] == {"image_not_found": 10}
    assert [part["rows"] for part in summary["parts"]] == [10] * 9 + [5]
    assert summary["started_at"] <= summary["finished_at"]
    assert summary["images_per_second"] > 0
    assert summary["model"]["weights_sha256"] == "f" * 64
    record = json.loads((out / "job.json").read_text())
    assert record["model"]["weights_sha256"] == "f" * 64
    assert record["manifest"]["rows"] == 95
    assert record["options"]["num_beams"] == 3
    audit = verify(str(out))
    assert audit.ok, audit.problems


def test_failed_rows_are_a_manifest_again(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"image": "bad-1.png", "id": 7, "prompt": "a photo of", "source": {"x": 1}}\nnot json\n{"image": "img.png"}\n'
    )
    job = submit(controller.ledger, caption_spec(tmp_path / "rows.jsonl", tmp_path / "out"), settings)
    advance(controller, job, ended, MiniWorker(settings))
    failures = [json.loads(line) for line in (tmp_path / "out/errors.jsonl").read_text().splitlines()]
    assert failures[0] == {
        "image": str(tmp_path / "bad-1.png"), "id": 7, "prompt": "a photo of", "source": {"x": 1},
        "error": {"code": "image_not_found", "message": "bad-1.png does not exist"},
    }  # fmt: skip
    assert failures[1]["error"]["code"] == "row_invalid"
    assert failures[1]["line"] == "not json"
    again = submit(controller.ledger, caption_spec(tmp_path / "out/errors.jsonl", tmp_path / "again"), settings)
    advance(controller, again, ended, MiniWorker(settings))
    first = json.loads((tmp_path / "again/results/part-00000000.jsonl").read_text().splitlines()[0])
    assert (first["image"], first["id"], first["input"]["prompt"]) == (str(tmp_path / "bad-1.png"), 7, "a photo of")


def test_a_job_on_s3(s3_server: S3Server, settings: Settings, controller: Controller) -> None:
    open_store("s3://blip/in").put("list.txt", b"".join(b"s3://blip/photos/%d.jpg\n" % n for n in range(35)))
    job = submit(controller.ledger, caption_spec("s3://blip/in/list.txt", "s3://blip/out"), settings)
    state = advance(controller, job, ended, MiniWorker(settings))
    assert (state.status, state.completed) == ("completed", 35)
    assert rows_of("s3://blip/out") == list(range(35))
    part = open_store("s3://blip/out").head("results/part-00000003.jsonl")
    assert part is not None
    assert part.metadata["rows"] == "5"
    assert part.metadata["plan"] == state.plan
    assert verify("s3://blip/out").ok


def test_a_folder_of_images(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    for name in ("b.JPG", "a/z.png", "a/y.webp", "notes.txt", ".hidden.png"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / name).write_bytes(b"x")
    job = submit(controller.ledger, caption_spec(tmp_path / "pictures", tmp_path / "out"), settings)
    assert advance(controller, job, ended, MiniWorker(settings)).status == "completed"
    text = (tmp_path / "out/results/part-00000000.jsonl").read_text()
    assert [json.loads(line)["image"] for line in text.splitlines()] == ["a/y.webp", "a/z.png", "b.JPG"]


def test_all_rows_failed_is_failed(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    spec = caption_spec(write_manifest(tmp_path, 12, lambda _: True), tmp_path / "out")
    state = advance(controller, submit(controller.ledger, spec, settings), ended, MiniWorker(settings))
    assert state.status == "failed"
    assert state.error is not None
    assert state.error["code"] == "all_rows_failed"
    assert state.error["message"] == (
        "all 12 rows failed (image_not_found 12); the first: row 0 bad-0.png does not exist; see "
        f"{tmp_path}/out/errors.jsonl"
    )
    assert len((tmp_path / "out/errors.jsonl").read_text().splitlines()) == 12


def test_too_many_errors_stop_a_job_after_a_thousand_rows(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path, 3000, lambda n: n % 4 != 0)
    spec = caption_spec(manifest, tmp_path / "out", chunk_rows=100)
    state = advance(controller, submit(controller.ledger, spec, settings), ended, MiniWorker(settings))
    assert state.status == "failed"
    assert state.error is not None
    assert state.error["code"] == "too_many_errors"
    says = state.error["message"]
    assert f"rows failed (image_not_found {state.failed:,}), more than max_error_ratio=0.5; the first: row " in says
    assert re.search(r"the first: row (\d+) bad-\1.png does not exist; mend that and retry, or raise the ratio", says)
    assert 1000 <= state.completed + state.failed < 3000
    # The same work with a higher limit goes on from what there is.
    spec = caption_spec(manifest, tmp_path / "out", chunk_rows=100, max_error_ratio=0.8)
    state = advance(controller, submit(controller.ledger, spec, settings), ended, MiniWorker(settings))
    assert (state.status, state.failed) == ("completed", 2250)
    assert verify(str(tmp_path / "out")).ok


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"", "manifest_invalid", "is empty"),
        (b"\n \r\n\n", "manifest_invalid", "is empty"),
        (b"\x1f\x8bxx", "manifest_invalid", "gzip"),
        (b'[{"image": "x"}]', "manifest_invalid", "one object a line"),
        (b"PAR1" + bytes(40), "manifest_invalid", "Parquet"),
    ],
)
def test_a_bad_manifest_fails_at_once(
    settings: Settings, controller: Controller, tmp_path: Path, content: bytes, code: str, says: str
) -> None:
    (tmp_path / "m").write_bytes(content)
    job = submit(controller.ledger, caption_spec(tmp_path / "m", tmp_path / "out"), settings)
    state = advance(controller, job, ended)
    assert state.error is not None
    assert state.error["code"] == code
    assert says in state.error["message"]
    assert str(tmp_path / "m") in state.error["message"]
    assert not (tmp_path / "out").exists()  # still free for the right manifest


def test_an_output_that_cannot_be_written(
    s3_server: S3Server, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path, 3)
    for output, code in (("s3://absent/out", "storage_failed"), ("/proc/blip-out", "storage_failed")):
        state = advance(controller, submit(controller.ledger, caption_spec(manifest, output), settings), ended)
        assert state.error is not None
        assert state.error["code"] == code
        assert output in state.error["message"]


def test_the_same_command_goes_on_and_another_is_refused(
    redis_server: RedisServer, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    manifest, out = write_manifest(tmp_path, 100), tmp_path / "out"
    spec, worker = caption_spec(manifest, out), MiniWorker(settings)
    job = submit(controller.ledger, spec, settings)
    advance(controller, job, lambda state: state.chunks_done >= 4, worker)
    redis_server.client().flushall()  # as if everything but the output were gone
    fresh = Controller(settings)
    with pytest.raises(UsageError, match="chunk_rows=10, not 20"):
        submit(fresh.ledger, caption_spec(manifest, out, chunk_rows=20), settings)
    assert submit(fresh.ledger, caption_spec(manifest, out), settings) == job
    state = advance(fresh, job, lambda state: state.status == "in_progress")
    assert state.completed >= 40
    assert state.restored == state.completed
    state = advance(fresh, job, ended, worker)
    assert (state.status, state.completed) == ("completed", 100)
    assert rows_of(out) == list(range(100))
    fresh.close()


def test_a_prefix_on_s3(s3_server: S3Server, settings: Settings, controller: Controller) -> None:
    for key in ("photos/b.jpg", "photos/a/1.PNG", "photos/readme.md", "other/c.jpg"):
        open_store("s3://blip").put(key, b"x")
    job = submit(controller.ledger, caption_spec("s3://blip/photos/", "s3://blip/out"), settings)
    assert advance(controller, job, ended, MiniWorker(settings)).status == "completed"
    text = open_store("s3://blip/out").get("results/part-00000000.jsonl")
    assert [json.loads(line)["image"] for line in text.splitlines()] == [
        "s3://blip/photos/a/1.PNG", "s3://blip/photos/b.jpg",
    ]  # fmt: skip


def test_a_cancelled_job_ends_when_its_workers_let_go(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    spec = caption_spec(write_manifest(tmp_path, 100), tmp_path / "out")
    job, worker = submit(controller.ledger, spec, settings), MiniWorker(settings)
    advance(controller, job, lambda state: state.chunks_done == 3, worker)
    hint = worker.take()
    assert hint is not None
    lease = worker.start(hint)
    assert not isinstance(lease, str)
    assert controller.ledger.set_status(job, "cancelling")
    controller.step()
    assert controller.ledger.state(job).status == "cancelling"  # type: ignore[union-attr]
    assert not controller.ledger.renew(lease, 1)
    worker.finish(hint)  # what is finished is kept
    state = advance(controller, job, ended)
    assert (state.status, state.completed) == ("cancelled", 40)
    # The same command again goes on from there.
    assert submit(controller.ledger, spec, settings) == job
    assert advance(controller, job, ended, worker).status == "completed"
    assert rows_of(tmp_path / "out") == list(range(100))


def test_a_store_without_conditional_put_is_refused_or_accepted(
    rclone_s3: RcloneServer, redis_server: RedisServer, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path, 40)
    for accept in (False, True):
        settings = load_settings(**FAST, allow_unconditional_put=accept)
        controller = Controller(settings)
        job = submit(controller.ledger, caption_spec(manifest, f"s3://blip/out-{accept}"), settings)
        state = advance(controller, job, ended, MiniWorker(settings))
        controller.close()
        if accept:
            assert (state.status, state.completed) == ("completed", 40)
            assert verify("s3://blip/out-True").ok
        else:
            assert state.error is not None
            assert "BLIP_ALLOW_UNCONDITIONAL_PUT" in state.error["message"]


def test_what_is_handed_out_follows_the_workers_and_redis_s_memory(
    redis_server: RedisServer, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    job = submit(
        controller.ledger, caption_spec(write_manifest(tmp_path, 900), tmp_path / "out", chunk_rows=1), settings
    )
    admin = redis_server.client()
    admin.config_set("maxmemory", int(admin.info("memory")["used_memory"] * 1.2))
    try:
        advance(controller, job, lambda state: state.status == "in_progress")
        controller.step()
        assert controller.ledger.queue_length() == 0  # above 70 % nothing is handed out
    finally:
        admin.config_set("maxmemory", 0)
        admin.close()
    controller.step()
    assert controller.ledger.queue_length() == LEAST_IN_FLIGHT
    controller.ledger.worker_seen("w1", {"slots": 30})
    controller.ledger.worker_seen("w2", {"slots": 20})
    controller.step()
    assert controller.ledger.queue_length() == 50 * PER_SLOT_UNKNOWN


def test_verify_compares_a_part_with_its_metadata(
    s3_server: S3Server, settings: Settings, controller: Controller
) -> None:
    open_store("s3://blip/in").put("list.txt", b"s3://blip/a.jpg\ns3://blip/bad.jpg\n")
    job = submit(controller.ledger, caption_spec("s3://blip/in/list.txt", "s3://blip/out"), settings)
    advance(controller, job, ended, MiniWorker(settings))
    store, key = open_store("s3://blip/out"), "results/part-00000000.jsonl"
    head = store.head(key)
    assert head is not None
    store.put(key, store.get(key).replace(b"does not exist", b"is on holiday"), metadata=head.metadata)
    audit = verify("s3://blip/out")
    assert audit.problem_count == 2
    assert "its metadata says" in audit.problems[0]
    assert "not the one in summary.json" in audit.problems[1]


def test_a_finished_job_stays_as_it_is(settings: Settings, controller: Controller, tmp_path: Path) -> None:
    spec = caption_spec(write_manifest(tmp_path, 15), tmp_path / "out")
    worker = MiniWorker(settings)
    advance(controller, submit(controller.ledger, spec, settings), ended, worker)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    controller.ledger._redis.flushall()  # else the job would just be known as completed
    state = advance(controller, submit(controller.ledger, spec, settings), ended, worker)
    assert state.status == "completed"
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_a_finished_job_whose_output_was_removed_begins_anew(
    settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    spec = caption_spec(write_manifest(tmp_path, 15), tmp_path / "out")
    worker = MiniWorker(settings)
    for _ in range(2):
        job = submit(controller.ledger, spec, settings)
        assert advance(controller, job, lambda state: state.ended and (tmp_path / "out/summary.json").exists(), worker)
        shutil.rmtree(tmp_path / "out")


def test_steps_are_frequent_while_a_job_begins_and_rare_while_it_runs(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("orchestrator.pace.monotonic", lambda: now[0])
    controller = Controller(settings.model_copy(update={"poll_seconds": 0.5}))
    try:
        job = submit(controller.ledger, caption_spec(write_manifest(tmp_path, 5), tmp_path / "out"), settings)
        controller.step()
        pauses = [controller._pace.pause()]
        for seconds in (20, 980):
            now[0] += seconds
            pauses.append(controller._pace.pause())
        controller.ledger.set_status(job, "cancelling")
        controller.step()
        pauses += [controller._pace.pause(took) for took in (0.02, 0.06, 1)]  # with few jobs and with hundreds
        assert pauses == pytest.approx([0.1, 0.2, 0.5, 0.1, 0.24, 0.5])
    finally:
        controller.close()
