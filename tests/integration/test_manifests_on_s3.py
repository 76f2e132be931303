"""Each manifest format, made to its public specification, read through a real S3 server; and what goes wrong there."""

import hashlib
import json
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow
import pytest
from conftest import make_bucket
from harness import advance, ended, rows_of
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from manifest_files import EXPECTED, FILES, IMAGES, KEYS, MANIFEST, OBJECTS, WRITERS, put_inventory
from mini_worker import MiniWorker
from pyarrow import parquet
from servers import MotoServer

from orchestrator.contract import JobSpec, Row
from orchestrator.control import Controller
from orchestrator.dry_run import dry_run
from orchestrator.errors import JobError, ManifestError
from orchestrator.fetch import fetch
from orchestrator.jobs import make_spec, submit
from orchestrator.manifest import require_rows
from orchestrator.plan import Plan, make_plan
from orchestrator.s3 import s3_client
from orchestrator.settings import Settings, load_settings
from orchestrator.storage import open_store


def plan_of(manifest: str, out: str = "s3://blip/out", settings: Settings | None = None, **more: Any) -> Plan:
    spec = JobSpec(id="j", task="caption", model="demo", manifest=manifest, output=out, created_at=0, **more)
    return make_plan(spec, open_store(out), settings or load_settings())


def images_of(plan: Plan) -> list[str | None]:
    return [row.image for chunk in plan.all_chunks() for row in plan.read_rows(chunk, "caption")]


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_read_from_s3(s3_server: MotoServer, name: str) -> None:
    found, data = FILES[name]
    open_store("s3://blip/in").put(name, data)
    plan = plan_of(f"s3://blip/in/{name}", chunk_rows=2)
    assert (plan.format, plan.rows, plan.chunks) == (found, 3, 2)
    assert images_of(plan) == IMAGES
    policy = plan.image_policy()
    assert [policy.resolve(image) for image in IMAGES] == IMAGES
    report = dry_run(f"s3://blip/in/{name}", "caption", None, None, {})
    assert (report["format"], report["rows"], report["bad_rows"]) == (found, 3, 0)
    assert [row["image"] for row in report["first_rows"]] == IMAGES


def test_a_prefix_in_key_order(s3_server: MotoServer) -> None:
    store = open_store("s3://blip")
    for key in [*KEYS, "img/notes.txt", "other/x.jpg"]:
        store.put(key, b"x")
    plan = plan_of("s3://blip/img/")
    assert (plan.format, images_of(plan)) == ("folder", sorted(IMAGES))
    with pytest.raises(ManifestError, match="s3://blip/none/: no images below it"):
        plan_of("s3://blip/none/", "s3://blip/out2")


#: Without control characters, which moto has no address for, nor for `//` and `.` between slashes.
kept = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"], exclude_characters="/."), max_size=9)
listed = st.lists(kept.map(lambda name: f"x{name}"), min_size=1, max_size=3).map(lambda names: "/".join(names) + ".png")


@hypothesis.settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.lists(listed, min_size=1, max_size=5, unique=True))
def test_prefixes_round_trip(s3_server: MotoServer, keys: list[str]) -> None:
    prefix = f"s3://blip/{hashlib.md5(json.dumps(keys).encode()).hexdigest()}"
    for key in [*keys, "notes.txt"]:
        open_store(f"{prefix}/in").put(key, key.encode())
    plan = plan_of(f"{prefix}/in/", f"{prefix}/out")
    policy, images = plan.image_policy(), images_of(plan)
    assert images == [f"{prefix}/in/{key}" for key in sorted(keys, key=str.encode)]
    assert [fetch(policy.resolve(str(image)), 100, 5) for image in images] == [
        str(image).removeprefix(f"{prefix}/in/").encode() for image in images
    ]


# ── S3 Inventory ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def photos(s3_server: MotoServer) -> Settings:
    """Settings of someone who may read the inventory's images."""
    make_bucket("photos")
    return load_settings(allowed_buckets="photos")  # the manifest's own bucket need not be named


@pytest.mark.parametrize("file_format", ["CSV", "Parquet", "ORC"])
def test_an_inventory_is_read(photos: Settings, monkeypatch: pytest.MonkeyPatch, file_format: str) -> None:
    put_inventory(file_format)
    plan = plan_of(MANIFEST, settings=photos)
    assert (plan.format, images_of(plan)) == ("s3-inventory", EXPECTED)
    policy = plan.image_policy()
    assert [policy.resolve(image) for image in EXPECTED] == EXPECTED
    monkeypatch.setenv("BLIP_ALLOWED_BUCKETS", "photos")
    assert dry_run(MANIFEST, "caption", None, None, {})["skipped"] == {
        "old versions and delete markers": 2, "keys that are no images": 2,
    }  # fmt: skip


object_keys = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12).map(lambda key: f"x{key}.png")


@pytest.mark.parametrize("file_format", ["CSV", "Parquet", "ORC"])
@hypothesis.settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.lists(object_keys, min_size=1, max_size=8))
def test_inventories_round_trip(photos: Settings, file_format: str, keys: list[str]) -> None:
    manifest = put_inventory(file_format)
    data = WRITERS[file_format]([(key, "v", True, False) for key in keys])
    file = {**manifest["files"][0], "MD5checksum": hashlib.md5(data).hexdigest()}
    store, folder = open_store("s3://blip"), open_store(MANIFEST.rpartition("/")[0])
    store.put(file["key"], data)
    text = json.dumps({**manifest, "files": [file]}).encode()
    folder.put("manifest.json", text)
    folder.put("manifest.checksum", hashlib.md5(text).hexdigest().encode())
    plan = plan_of(MANIFEST, f"s3://blip/out-{hashlib.md5(data).hexdigest()}", photos)
    assert images_of(plan) == [f"s3://photos/{key}" for key in keys]


@pytest.mark.parametrize("file_format", ["CSV", "Parquet", "ORC"])
def test_a_changed_inventory_file_fails_the_job(photos: Settings, file_format: str) -> None:
    manifest = put_inventory(file_format)
    key = manifest["files"][1]["key"]
    open_store("s3://blip").put(key, WRITERS[file_format](OBJECTS[:2]))
    with pytest.raises(ManifestError, match=rf"manifest\.json: files\[1\]: s3://blip/{key}: the MD5 checksum is"):
        plan_of(MANIFEST, settings=photos)
    assert not list(open_store("s3://blip/out").list("plan/"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"files": [{"key": "inv/absent.csv.gz", "MD5checksum": "0" * 32}]}, r"files\[0\]: .*absent.* does not exist"),
        ({"files": [{"key": "x", "MD5checksum": "short"}]}, "MD5checksum"),
        ({"files": []}, "lists no images"),
        ({"files": None}, "files: Input should be a valid"),
        ({"fileFormat": "XML"}, "fileFormat is 'XML'"),
        ({"fileSchema": "Bucket, Size"}, "the schema has no key"),
        ({"fileSchema": "Bucket, Key"}, "line 1: 8 cells where fileSchema has 2"),
        ({"sourceBucket": "secret"}, "its images are in bucket secret; add secret to BLIP_ALLOWED_BUCKETS"),
        ({"destinationBucket": "arn:aws:s3:::elsewhere"}, "add elsewhere to BLIP_ALLOWED_BUCKETS"),
    ],
)
def test_a_wrong_inventory_fails_the_job(photos: Settings, changes: dict[str, Any], says: str) -> None:
    put_inventory("CSV", **changes)
    with pytest.raises(ManifestError, match=says) as caught:
        plan_of(MANIFEST, settings=photos)
    assert str(caught.value).startswith(MANIFEST)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_not_the_one_of_its_checksum(photos: Settings) -> None:
    put_inventory("CSV")
    open_store(MANIFEST.rpartition("/")[0]).put("manifest.checksum", b"0" * 32)
    with pytest.raises(ManifestError, match="MD5 checksum"):
        require_rows(MANIFEST, None, photos)


def test_an_inventory_damaged_within(photos: Settings) -> None:
    """The checksum is right, the content is not."""
    for file_format, word in {"CSV": "gzip data is damaged", "Parquet": "damaged", "ORC": "damaged"}.items():
        manifest = put_inventory(file_format)
        data = open_store("s3://blip").get(manifest["files"][0]["key"])
        data = data[: len(data) // 2]
        open_store("s3://blip").put(manifest["files"][0]["key"], data)
        manifest["files"][0]["MD5checksum"] = hashlib.md5(data).hexdigest()
        put_files = {"files": manifest["files"]}
        open_store(MANIFEST.rpartition("/")[0]).put("manifest.json", json.dumps(manifest | put_files).encode())
        s3_client(5.0).delete_object(Bucket="blip", Key=MANIFEST.removeprefix("s3://blip/").replace("json", "checksum"))
        with pytest.raises(ManifestError, match=word):
            plan_of(MANIFEST, settings=photos)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (pyarrow.array(["a.jpg", None]), "row 1 on: a bucket or key is None, which is no text"),
        (pyarrow.array([b"a.jpg", b"\xff.jpg"], pyarrow.binary()), "row 1 on: 'utf-8' codec"),
        (pyarrow.array([b"a.jpg", b"\xff.jpg"], pyarrow.binary()).view(pyarrow.string()), "row 0 on: 'utf-8' codec"),
        (pyarrow.array([7, 8]), "row 0 on: a bucket or key is 7, which is no text"),
    ],
)
def test_inventory_keys_that_are_no_text(photos: Settings, key: pyarrow.Array, says: str) -> None:
    manifest = put_inventory("Parquet")
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"bucket": ["photos"] * 2, "key": key}), sink)
    data = sink.getvalue().to_pybytes()
    file = {**manifest["files"][0], "MD5checksum": hashlib.md5(data).hexdigest()}
    put_inventory("Parquet", files=[file])
    open_store("s3://blip").put(file["key"], data)
    with pytest.raises(ManifestError, match=rf"files\[0\]: s3://blip/{file['key']}: damaged from {says}"):
        plan_of(MANIFEST, settings=photos)


# ── Versions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_batch_row_pins_its_version(photos: Settings) -> None:
    client = s3_client(5.0)
    client.put_bucket_versioning(Bucket="photos", VersioningConfiguration={"Status": "Enabled"})
    old = client.put_object(Bucket="photos", Key="a b.jpg", Body=b"old")["VersionId"]
    client.put_object(Bucket="photos", Key="a b.jpg", Body=b"new")
    open_store("s3://blip").put("batch.csv", f"photos,a+b.jpg,{old}\nphotos,a+b.jpg\n".encode())
    plan = plan_of("s3://blip/batch.csv", settings=photos)
    rows = [row for chunk in plan.all_chunks() for row in plan.read_rows(chunk, "caption")]
    policy = plan.image_policy()
    assert [fetch(policy.resolve(row.image), 100, 5) for row in rows if isinstance(row, Row)] == [b"old", b"new"]


@pytest.mark.parametrize("name", ["rows.jsonl", "batch.csv"])
def test_lines_overwritten_mid_job_fail_it(s3_server: MotoServer, name: str) -> None:
    open_store("s3://blip").put(name, FILES[name][1])
    plan = plan_of(f"s3://blip/{name}")
    open_store("s3://blip").put(name, FILES[name][1].replace(b"img", b"gmi"))
    with pytest.raises(JobError, match="was changed or removed") as caught:
        images_of(plan)
    assert caught.value.code == "manifest_changed"


def test_a_staged_manifest_overwritten_mid_job_changes_nothing(s3_server: MotoServer) -> None:
    open_store("s3://blip").put("rows.csv", FILES["bom.csv"][1])
    plan = plan_of("s3://blip/rows.csv")
    open_store("s3://blip").put("rows.csv", b"image\nother.jpg\n")
    assert images_of(plan) == images_of(plan_of("s3://blip/rows.csv")) == IMAGES


def test_a_manifest_overwritten_while_it_is_staged(s3_server: MotoServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("s3://blip")
    rows = b"image\n" + b"".join(b"%d.jpg\n" % n for n in range(100_000))
    store.put("rows.csv", rows)
    kind, seen = type(store), []
    get = kind.get

    def overwriting(self: Any, key: str, start: int = 0, end: int | None = None, *, etag: str | None = None) -> bytes:
        if start > 0 and not seen:
            seen.append(start)
            store.put("rows.csv", rows[:-6] + b"x.jpg\n")
        return get(self, key, start, end, etag=etag)

    monkeypatch.setattr(kind, "get", overwriting)
    with pytest.raises(ManifestError, match=r"s3://blip/rows\.csv was changed while it was being read"):
        plan_of("s3://blip/rows.csv")
    assert seen


# ── Whole jobs ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["rows.parquet", "bom.csv", "rows.jsonl.zst"])
def test_a_whole_job_from_a_staged_manifest(
    s3_server: MotoServer, settings: Settings, controller: Controller, name: str
) -> None:
    open_store("s3://blip").put(name, FILES[name][1])
    spec = make_spec(f"s3://blip/{name}", "caption", "s3://blip/out", model="demo", chunk_rows=2)
    job = submit(controller.ledger, spec, settings)
    state = advance(controller, job, ended, MiniWorker(settings))
    assert (state.status, state.completed, state.failed) == ("completed", 3, 0)
    assert sorted(rows_of("s3://blip/out")) == [0, 1, 2]
    record = json.loads(open_store("s3://blip/out").get("results/part-00000000.jsonl").splitlines()[1])
    assert (record["image"], int(record["input"]["n"])) == (IMAGES[1], 1)


def test_a_job_with_a_bad_manifest_fails_at_once(
    s3_server: MotoServer, settings: Settings, controller: Controller, tmp_path: Path
) -> None:
    open_store("s3://blip").put("m.csv", b'image,note\na.jpg,"open\n')
    spec = make_spec("s3://blip/m.csv", "caption", str(tmp_path / "out"), model="demo")
    state = advance(controller, submit(controller.ledger, spec, settings), ended)
    assert state.error == {
        "code": "manifest_invalid",
        "message": "s3://blip/m.csv: line 2: a quoted cell is never closed; close its quote",
    }
