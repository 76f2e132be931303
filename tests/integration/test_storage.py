"""One behaviour on every store: local folders, moto (conditional put), and rclone (without it)."""

import os
import shutil
import threading
from pathlib import Path

import pytest
from conftest import make_bucket
from servers import RcloneServer, S3Server

from orchestrator import s3_images
from orchestrator.errors import AccessDenied, ObjectChanged, ObjectNotFound, StorageError, UsageError
from orchestrator.fetch import fetch
from orchestrator.s3 import s3_client
from orchestrator.settings import load_settings
from orchestrator.storage import LocalStore, Store, open_object, open_store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "out"))
    request.getfixturevalue("s3_server")
    return open_store("s3://blip/some/prefix/")


def test_objects_come_back_whole_and_in_ranges(store: Store) -> None:
    store.put("a/b.bin", b"0123456789")
    assert store.get("a/b.bin") == b"0123456789"
    assert store.get("a/b.bin", 2, 5) == b"234"
    assert store.get("a/b.bin", 7) == b"789"
    assert store.get("a/b.bin", 4, 4) == b""
    info = store.head("a/b.bin")
    assert info is not None
    assert (info.key, info.size) == ("a/b.bin", 10)
    assert store.head("a/none") is None
    with pytest.raises(ObjectNotFound, match="a/none"):
        store.get("a/none")


def test_put_new_never_overwrites(store: Store) -> None:
    assert store.put_new("results/part-00000000.jsonl", b"first", metadata={"rows": "1"})
    assert not store.put_new("results/part-00000000.jsonl", b"second")
    assert store.get("results/part-00000000.jsonl") == b"first"
    store.check_conditional_put()
    store.check_conditional_put()  # what the first probe left is no obstacle


def test_s3_keeps_metadata(s3_server: S3Server) -> None:
    store = open_store("s3://blip")
    store.put_new("part", b"x", metadata={"rows": "512", "sha256": "ab"})
    info = store.head("part")
    assert info is not None
    assert dict(info.metadata) == {"rows": "512", "sha256": "ab"}


def test_exactly_one_of_many_writers_wins(store: Store) -> None:
    won: list[int] = []

    def write(number: int) -> None:
        if store.put_new("contended", b"%d" % number * 10_000):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get("contended") == b"%d" % won[0] * 10_000


def test_listing_is_in_key_order_on_both(store: Store) -> None:
    keys = ["a-b.txt", "a.txt", "a/b.txt", "a/c/d.txt", "ab.txt", "é.txt", "z.txt"]
    for key in reversed(keys):
        store.put(key, b"x")
    assert [info.key for info in store.list()] == sorted(keys, key=str.encode)
    assert [info.key for info in store.list("a/")] == ["a/b.txt", "a/c/d.txt"]
    assert [info.key for info in store.list("a")] == sorted(keys[:5], key=str.encode)
    assert list(store.list("nothing/")) == []


def test_another_version_is_noticed(store: Store) -> None:
    store.put("manifest", b"one\n" * 10)
    info = store.head("manifest")
    assert info is not None
    assert store.get("manifest", 0, 4, etag=info.etag) == b"one\n"
    store.put("manifest", b"two\n" * 10)
    with pytest.raises(ObjectChanged, match="manifest"):
        store.get("manifest", 0, 4, etag=info.etag)
    with pytest.raises(ObjectChanged):
        store.get("manifest", 0, 4000, etag=info.etag)


def test_files_of_any_size_are_uploaded(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "big"
    source.write_bytes(bytes(range(256)) * 40_000)  # 10 MB: several parts on S3
    store.put_file("errors.jsonl", source)
    info = store.head("errors.jsonl")
    assert info is not None
    assert info.size == 10_240_000
    assert store.get("errors.jsonl", 8_388_600, 8_388_616) == source.read_bytes()[8_388_600:8_388_616]


@pytest.mark.parametrize("size", [100, 10_240_000])  # 10 MB: several parts on S3
def test_a_file_is_written_once(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """The first one stays as it is, its version too, also for a writer that did not see it when it looked."""
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(name.encode() * size)
    assert store.put_file_new("plan/rows", tmp_path / "first")
    before = store.head("plan/rows")
    assert not store.put_file_new("plan/rows", tmp_path / "second")
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "head", lambda *_: None)
        patch.setattr(os.path, "lexists", lambda _: False)
        assert not store.put_file_new("plan/rows", tmp_path / "second")
    assert store.head("plan/rows") == before
    assert store.get("plan/rows") == (tmp_path / "first").read_bytes()
    assert [info.key for info in store.list()] == ["plan/rows"]


def test_no_upload_is_left_behind(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the one that was second, nor by one that fails."""
    store, client = open_store("s3://blip"), s3_client(5.0)
    (tmp_path / "big").write_bytes(b"x" * 10_000_000)
    assert store.put_file_new("rows", tmp_path / "big")
    monkeypatch.setattr(type(store), "head", lambda *_: None)  # as if the other one was not there yet
    assert not store.put_file_new("rows", tmp_path / "big")
    with pytest.raises(FileNotFoundError):
        store._put_pieces("rows", tmp_path / "absent", 10_000_000)  # type: ignore[attr-defined]
    assert "Uploads" not in client.list_multipart_uploads(Bucket="blip")


def test_a_store_without_conditional_put_is_refused_until_it_is_accepted(
    rclone_s3: RcloneServer, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match="BLIP_ALLOW_UNCONDITIONAL_PUT"):
        open_store("s3://blip/out").check_conditional_put()
    accepting = open_store("s3://blip/out2", load_settings(allow_unconditional_put=True))
    accepting.check_conditional_put()
    assert accepting.put_new("part", b"first")
    assert not accepting.put_new("part", b"second")
    assert accepting.get("part") == b"first"
    (tmp_path / "rows").write_bytes(b"rows")
    assert [accepting.put_file_new("rows", tmp_path / "rows") for _ in range(2)] == [True, False]
    head = accepting.head("part")
    assert head is not None
    assert accepting.get("part", 1, 3, etag=head.etag) == b"ir"
    assert [info.key for info in accepting.list()] == ["part", "plan/probe", "rows"]


def test_mistakes_are_named(s3_server: S3Server, tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound, match="s3://absent/out/plan/probe: no such object or bucket"):
        open_store("s3://absent/out").check_conditional_put()
    with pytest.raises(UsageError, match="gs://bucket"):
        open_store("gs://bucket/prefix")
    with pytest.raises(UsageError, match="names no bucket"):
        open_store("s3://")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file"):
        open_store(str(tmp_path / "file")).check_conditional_put()
    with pytest.raises(StorageError, match="not a key"):
        open_store(str(tmp_path)).get("../secret")


def test_credentials_are_asked_for(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    s3_client.cache_clear()
    with pytest.raises(AccessDenied, match="no S3 credentials"):
        open_store("s3://blip", load_settings(storage_retry_seconds=0.5)).head("x")


@pytest.mark.parametrize(
    ("variables", "region"),
    [
        ({}, "us-east-1"),
        ({"AWS_REGION": "eu-central-1"}, "eu-central-1"),
        ({"AWS_REGION": ""}, "us-east-1"),
        ({"AWS_REGION": "eu-central-1", "AWS_DEFAULT_REGION": "eu-west-3"}, "eu-west-3"),
        ({"AWS_REGION": "eu-central-1", "AWS_PROFILE": "work"}, "ap-south-1"),
    ],
)
def test_the_region(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], region: str
) -> None:
    """It is what requests are signed for: the client's own, and those for images."""
    (tmp_path / "config").write_text("[profile work]\nregion = ap-south-1\n")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    for name, value in {**variables, "AWS_CONFIG_FILE": str(tmp_path / "config")}.items():
        monkeypatch.setenv(name, value)
    s3_client.cache_clear()
    open_store("s3://blip").put("a.jpg", b"x")
    for _ in range(2):  # the second one is signed without the client
        assert fetch("s3://blip/a.jpg", 10, 5) == b"x"
    client = s3_client(5 / 3)
    assert client.meta.region_name == region
    assert s3_images._getter_of(client)._places["blip"].region == region


def test_hidden_and_half_written_files_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".put-123").write_bytes(b"half")
    (tmp_path / ".DS_Store").write_bytes(b"")
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert [info.key for info in LocalStore(tmp_path).list()] == ["a.jpg"]


def test_files_that_vanish_or_cannot_be_looked_at_while_they_are_listed(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c/d.jpg", "e.jpg"):
        LocalStore(tmp_path).put(name, b"x")
    (tmp_path / "f.jpg").symlink_to("nowhere")
    (tmp_path / "g.jpg").symlink_to("g.jpg")
    listing = LocalStore(tmp_path).list()
    found = [next(listing).key]
    (tmp_path / "b.jpg").unlink()
    shutil.rmtree(tmp_path / "c")
    found.append(next(listing).key)
    assert found == ["a.jpg", "e.jpg"]
    with pytest.raises(StorageError, match=r"g\.jpg: Too many levels of symbolic links"):
        next(listing)


def test_one_object_by_uri(tmp_path: Path) -> None:
    store, key = open_object(str(tmp_path / "rows.jsonl"))
    assert (store.root, key) == (str(tmp_path), "rows.jsonl")
    make = open_object("/rows.jsonl")
    assert (make[0].root, make[1]) == ("/", "rows.jsonl")


def test_bucket_helper(s3_server: S3Server) -> None:
    make_bucket("second")
    open_store("s3://second").put("k", b"v")
    assert open_store("s3://second").get("k") == b"v"
