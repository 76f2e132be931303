"""Each manifest format through a whole job: a real S3 server, real services, images that are fetched and decoded."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_bucket
from harness import advance, ended
from manifest_files import FILES, IMAGES, KEYS, MANIFEST, OBJECTS, WRITERS, put_inventory
from mini_worker import MiniWorker
from PIL import Image
from servers import MotoServer, RedisServer
from system import Cluster, colour

from orchestrator.control import Controller
from orchestrator.jobs import make_spec, submit
from orchestrator.plan import load_plan
from orchestrator.rounds import latest_records
from orchestrator.settings import Settings
from orchestrator.storage import open_store
from orchestrator.verify import verify


@pytest.fixture
def cluster(redis_server: RedisServer, s3_server: MotoServer, tmp_path: Path) -> Iterator[Cluster]:
    """An orchestrator and a worker; in the buckets `blip` and `photos` the images of KEYS, each of its own colour."""
    make_bucket("photos")
    for number, key in enumerate(KEYS):
        file = io.BytesIO()
        Image.new("RGB", (40, 30), (number, 0, 7)).save(file, "PNG")
        for bucket in ("blip", "photos"):
            open_store(f"s3://{bucket}").put(key, file.getvalue())
    open_store("s3://photos").put("img/notes.txt", b"no image")
    cluster = Cluster(tmp_path)
    cluster.environment |= s3_server.s3_environment() | {"BLIP_ALLOWED_BUCKETS": "blip,photos"}
    cluster.start_orchestrator()
    cluster.start_worker()
    yield cluster
    cluster.close()


def captions_of(cluster: Cluster, job: str, output: str) -> list[tuple[str, str]]:
    """(image, caption) by row, of a job that completed and is verified."""
    state = cluster.until_ended(job)
    assert (state.status, state.failed) == ("completed", 0), (output, state, cluster.logs())
    audit = verify(output, cluster.settings)
    assert audit.ok, audit.problems
    plan = load_plan(open_store(output), cluster.settings)
    assert plan is not None
    records = list(latest_records(plan))
    assert [record["row"] for record in records] == list(range(len(records)))
    return [(record["image"], record["result"]["caption"]) for record in records]


def test_every_format_from_manifest_to_results(cluster: Cluster) -> None:
    manifests = {"prefix": "s3://blip/img/", **{name: f"s3://blip/in/{name}" for name in FILES}}
    for name, (_, data) in FILES.items():
        open_store("s3://blip/in").put(name, data)
    jobs = {
        name: cluster.submit(manifest, f"s3://blip/out-{name}", chunk_rows=2).id for name, manifest in manifests.items()
    }
    expected = [(image, colour(number)) for number, image in enumerate(IMAGES)]
    for name, job in jobs.items():
        found = captions_of(cluster, job, f"s3://blip/out-{name}")
        assert found == (sorted(expected) if name == "prefix" else expected), name


def test_every_kind_of_inventory_from_manifest_to_results(cluster: Cluster) -> None:
    """Files checked by MD5, keys URL-encoded in CSV, old versions, folders and files that are no images left out."""
    expected = [(f"s3://photos/{key}", colour(number)) for number, key in enumerate(KEYS)]
    for kind in WRITERS:
        put_inventory(kind)
        output = f"s3://blip/out-{kind}"
        job = cluster.submit(MANIFEST, output).id
        assert captions_of(cluster, job, output) == expected, kind
        record = json.loads(open_store(output).get("job.json"))
        assert record["manifest"]["format"] == "s3-inventory"
    manifest = put_inventory("CSV")
    key = manifest["files"][1]["key"]
    for number, other in enumerate([WRITERS["CSV"](OBJECTS[:2]), open_store("s3://blip").get(key)[::-1]]):
        open_store("s3://blip").put(key, other)
        state = cluster.until_ended(cluster.submit(MANIFEST, f"s3://blip/refused-{number}").id)
        assert state.error is not None
        assert state.error["code"] == "manifest_invalid"
        assert "MD5 checksum" in state.error["message"]
        assert not list(open_store(f"s3://blip/refused-{number}").list("results/"))


def test_a_manifest_of_everything_that_can_be_wrong_with_rows(
    s3_server: MotoServer, settings: Settings, controller: Controller
) -> None:
    """BOM, CRLF, blank lines, equal ids, rows of other formats, lines of 10 MB, bytes that are no text."""
    rows = [
        b'{"image": "s3://blip/0.png", "id": "same"}',
        b'{"image": "s3://blip/1.png", "id": "same", "column of nobody": [1, {"x": null}]}',
        b"  ",
        b"s3://blip/2.png",
        b"blip,3.png",
        b'{"image": "s3://blip/4.png", "prompt": "' + b"x" * 10_000_000 + b'"}',
        b'{"image": "s3://blip/5.png", "note": "' + b"y" * 10_000_000 + b'"}',
        b'{"image": "s3://blip/6\xff.png"}',
        b'{"image": "s3://blip/7.png", "big": 123456789012345678901234567890, "tiny": 1e-400}',
        b'{"image": "s3://blip/8.png", "bad": NaN}',
        b'{"image": "s3://blip/9.png", "half": "\\ud83d"}',
        b"[" * 5000,
    ]
    open_store("s3://blip").put("rows.jsonl", b"\xef\xbb\xbf" + b"\r\n".join(rows))
    spec = make_spec("s3://blip/rows.jsonl", "caption", "s3://blip/out", model="demo", chunk_rows=3)
    job = submit(controller.ledger, spec, settings)
    state = advance(controller, job, ended, MiniWorker(settings), seconds=40)
    assert (state.status, state.completed, state.failed) == ("completed", 5, 6)
    assert verify("s3://blip/out", settings).ok
    plan = load_plan(open_store("s3://blip/out"), settings)
    assert plan is not None
    records = list(latest_records(plan))
    codes = [record["error"] and record["error"]["code"] for record in records]
    invalid = "row_invalid"
    assert codes == [None, None, invalid, invalid, "text_too_long", None, invalid, None, invalid, None, invalid]
    assert [record["id"] for record in records[:2]] == ["same", "same"]
    assert records[1]["input"] == {"column of nobody": [1, {"x": None}]}
    assert len(records[5]["input"]["note"]) == 10_000_000
    assert records[7]["input"] == {"big": 123456789012345678901234567890, "tiny": 0.0}
    assert records[9]["input"] == {"half": "\ud83d"}
    errors = [json.loads(line) for line in open_store("s3://blip/out").get("errors.jsonl").splitlines()]
    assert [row["error"]["code"] for row in errors] == [code for code in codes if code]
