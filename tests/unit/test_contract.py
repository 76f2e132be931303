"""What crosses processes, what a row may point to, and what a user can get wrong."""

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.contract import (
    HINT_BYTES,
    RESULT_FORMATS,
    BadRow,
    Hint,
    ResultFormat,
    Row,
    error_row,
    result_row,
    to_line,
)
from orchestrator.errors import FetchError, UsageError
from orchestrator.fetch import ImagePolicy, fetch
from orchestrator.jobs import make_spec
from orchestrator.parts import PartError, check, chunk_of, describe, part_key, put_part
from orchestrator.settings import load_settings
from orchestrator.storage import open_store

HINT = Hint("job-1", 2, "p" * 32, 100, 200, 20, 3)


@given(
    chunk=st.integers(0, 2**31), start=st.integers(0, 2**50), size=st.integers(1, 2**31), rows=st.integers(1, 512),
    first=st.integers(0, 2**40),
)  # fmt: skip
def test_hints_round_trip_and_stay_small(chunk: int, start: int, size: int, rows: int, first: int) -> None:
    hint = Hint("job-" + "a" * 20, chunk, "b" * 32, start, start + max(size, rows), first, rows)
    text = json.dumps(hint.to_message())
    assert len(text) < HINT_BYTES
    assert Hint.from_message(json.loads(text)) == hint


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=2)
)


@given(change=st.dictionaries(st.sampled_from([*HINT.to_message(), "extra"]), json_values, min_size=1, max_size=3))
def test_odd_messages_are_refused_and_never_crash(change: dict[str, object]) -> None:
    message = {**HINT.to_message(), **change}
    try:
        hint = Hint.from_message(message)
    except UsageError:
        return
    assert hint.to_message() == message
    assert hint.rows >= 1


@pytest.mark.parametrize("message", [None, [], "x", 7, {}, {**HINT.to_message(), "rows": True}])
def test_what_is_no_hint(message: object) -> None:
    with pytest.raises(UsageError, match="not a hint"):
        Hint.from_message(message)


def test_records_have_the_published_fields() -> None:
    row = Row(17, "a.jpg", "x", ("",), False, {"k": 1})
    assert result_row(row, "caption", {"caption": "a dog"}) == {
        "row": 17, "id": "x", "image": "a.jpg", "task": "caption", "result": {"caption": "a dog"}, "error": None,
        "input": {"k": 1},
    }  # fmt: skip
    bad = BadRow(3, "row_invalid", "not JSON", None, None, {"line": "x"})
    assert error_row(bad, "vqa", bad.code, bad.message)["error"] == {"code": "row_invalid", "message": "not JSON"}


@given(value=st.text())
def test_any_text_can_be_written_as_a_line(value: str) -> None:
    written = to_line({"text": value})
    assert written.count(b"\n") == 1
    assert json.loads(written.decode())["text"] == value


def test_what_is_not_json_is_never_written() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        to_line({"score": float("nan")})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data/sub").mkdir(parents=True)
    (tmp_path / "data/a.jpg").write_bytes(b"image")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "data/link.jpg").symlink_to(tmp_path / "secret.jpg")
    return tmp_path / "data"


def policy(folder: Path, *allowed: str) -> ImagePolicy:
    return ImagePolicy.of(str(folder / "m.jsonl"), False, load_settings(allowed_buckets=",".join(allowed)))


def refused(policy: ImagePolicy, image: str) -> str:
    with pytest.raises(FetchError) as caught:
        policy.resolve(image)
    assert "\n" not in str(caught.value)
    return caught.value.code


def test_files_below_the_manifest_and_nothing_else(folder: Path) -> None:
    local = policy(folder)
    assert local.resolve("a.jpg") == str(folder / "a.jpg")
    assert local.resolve("sub/../a.jpg") == str(folder / "a.jpg")
    assert local.resolve(str(folder / "a.jpg")) == str(folder / "a.jpg")
    for image in ("../secret.jpg", "/etc/passwd", "link.jpg", "sub/../../secret.jpg", "."):
        assert refused(local, image) == "uri_not_allowed"
    for image in ("file:///etc/passwd", "ftp://x/y", "data:image/png;base64,xx", "a\0b", "http://169.254.169.254/latest",
                  "https://example.com/a.jpg"):  # fmt: skip
        assert refused(local, image) == "unsupported_uri"


def test_folders_that_were_looked_at_before(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers, with one look at a file instead of one at every folder above it."""
    (folder / "inside").symlink_to(folder / "sub")
    (folder / "outside").symlink_to(tmp_path)
    (folder / "sub/b.jpg").symlink_to(folder / "a.jpg")
    names = ["a.jpg", "sub/b.jpg", "inside/b.jpg", "outside/secret.jpg", "link.jpg", "sub/..", "sub/", "none/x.jpg",
             "a.jpg/x", "x" * 300, str(folder / "a.jpg"), "/etc/passwd", "./a.jpg", "sub/../a.jpg", "a\0b"]  # fmt: skip
    local, known = policy(folder), dict[str, str]()

    def outcome(name: str, *known: dict[str, str]) -> str:
        try:
            return local.resolve(name, *known)
        except FetchError as error:
            return str(error)

    for _ in range(2):
        assert [outcome(name, known) for name in names] == [outcome(name) for name in names]
    looks: list[object] = []
    real = os.lstat

    def seen(path: object) -> os.stat_result:
        looks.append(path)
        return real(str(path))

    monkeypatch.setattr(os, "lstat", seen)
    local.resolve("a.jpg", known)
    assert looks == [str(folder / "a.jpg")]


def test_folders_that_are_allowed_besides(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/link.jpg").symlink_to(tmp_path / "secret.jpg")
    loaded = load_settings(allowed_folders=f" {folder}, {tmp_path}/none ,")
    other = ImagePolicy.of(str(tmp_path / "elsewhere/m.jsonl"), False, loaded)
    named = policy(folder).absolute("a.jpg")
    assert other.resolve(named) == named == str(folder / "a.jpg")
    for image in (str(tmp_path / "secret.jpg"), f"{folder}/../secret.jpg", f"{folder}/link.jpg", "link.jpg"):
        assert refused(other, image) == "uri_not_allowed"
    assert policy(folder).absolute("s3://b/a.jpg") == "s3://b/a.jpg"
    assert policy(folder).absolute("http://h/a.jpg") == "http://h/a.jpg"
    assert policy(folder).absolute("/x/a.jpg") == "/x/a.jpg"
    assert ImagePolicy.of("s3://b/m.jsonl", False, loaded).absolute("s3://c/x") == "s3://c/x"


def test_a_refused_file_s_message_names_the_folder_to_add(folder: Path, tmp_path: Path) -> None:
    (folder / "outside").symlink_to(tmp_path)
    local = policy(folder)

    def said(image: str, policy: ImagePolicy = local) -> str:
        with pytest.raises(FetchError) as caught:
            policy.resolve(image)
        return str(caught.value)

    outside = f"outside of the manifest's folder {folder}; add"
    assert said("/photos/a/1.jpg") == f"/photos/a/1.jpg is {outside} /photos/a to BLIP_ALLOWED_FOLDERS to read from it"
    assert said("../x/1.jpg").endswith(f"is {outside} {tmp_path}/x to BLIP_ALLOWED_FOLDERS to read from it")
    for link in ("link.jpg", "outside/secret.jpg"):
        assert said(link).startswith(f"{link} is a link that leads {outside} the folder that it leads to")
        assert "secret" not in said(link).removeprefix(link)  # others may read it
        assert said(link, replace(local, tells_links=True)) == (
            f"{link} is a link to {tmp_path}/secret.jpg, {outside} {tmp_path} to BLIP_ALLOWED_FOLDERS to read from it"
        )


def test_allowed_buckets(folder: Path) -> None:
    assert refused(policy(folder), "s3://photos/a.jpg") == "uri_not_allowed"
    assert policy(folder, "photos").resolve("s3://photos/a.jpg") == "s3://photos/a.jpg"
    assert policy(folder, "*").resolve("s3://any/a.jpg")
    some = policy(folder, "photos/2024/", "other")
    assert some.resolve("s3://photos/2024/a.jpg")
    assert some.resolve("s3://other/x")
    assert refused(some, "s3://photos/2023/a.jpg") == "uri_not_allowed"
    assert refused(some, "s3://photos-2024/a.jpg") == "uri_not_allowed"
    remote = ImagePolicy.of("s3://mine/in/m.jsonl", False, load_settings())
    assert remote.resolve("s3://mine/elsewhere/a.jpg")
    assert refused(remote, "s3://foreign/a.jpg") == "uri_not_allowed"
    assert refused(remote, "a.jpg") == "unsupported_uri"
    assert refused(remote, "/etc/passwd") == "unsupported_uri"
    assert refused(remote, "s3://mine") == "unsupported_uri"
    assert refused(remote, "s3://") == "unsupported_uri"


def test_local_files_that_are_no_images_to_read(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")
    (folder / "closed.jpg").write_bytes(b"x")
    assert fetch(str(folder / "a.jpg"), 5, 1) == b"image"
    cases = {"none.jpg": "image_not_found", "sub": "image_unreadable", "pipe.jpg": "image_unreadable",
             "x" * 300: "image_not_found", "a.jpg/b": "image_not_found"}  # fmt: skip
    for name, code in cases.items():
        with pytest.raises(FetchError) as caught:
            fetch(str(folder / name), 100, 1)
        assert caught.value.code == code
    with pytest.raises(FetchError) as caught:
        fetch(str(folder / "a.jpg"), 4, 1)
    assert caught.value.code == "image_too_large"


def test_parts_are_checked_against_their_chunk(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    rows = [Row(number, f"{number}.jpg", None, ("",), False, {}) for number in range(20, 23)]
    records = [result_row(row, "caption", {"caption": "x"}) for row in rows]
    with pytest.raises(PartError, match="its records are not its rows"):
        put_part(store, HINT, records[:2], "w")
    records[1] = error_row(rows[1], "caption", "crashed", "died")
    info = put_part(store, HINT, records, "w")
    assert (info.rows, info.failed) == (3, 1)
    assert put_part(store, HINT, [result_row(row, "caption", {"caption": "y"}) for row in rows], "w") == info
    assert describe(store, part_key(2), HINT.plan) == info
    assert check(store, HINT.as_chunk()).failures == [records[1]]
    good = (tmp_path / part_key(2)).read_bytes()
    for content, says in (
        (good[:-5], "cut off"),
        (good[: good.index(b"\n") + 1], "1 rows instead of 3"),
        (good + good, "6 rows instead of 3"),
        (good.replace(b'"row":21', b'"row":22'), "row 22 where row 21"),
        (good.replace(b"crashed", b"bored"), "unknown error code"),
        (good.replace(b'"error":null', b'"error":{"code":"internal"}', 1), "neither result nor error, or both"),
        (b"{]\n" + good, "line 1: not a JSON object"),
        (good.replace(b'{"code":"crashed","message":"died"}', b'"died"'), "record 2: `error` is str"),
        (good.replace(b'"code":"crashed"', b'"code":["crashed"]'), "record 2 has an unknown error code"),
        (good.replace(b'{"caption":"x"}', b'"x"', 1), "record 1: `result` is str"),
        (good.replace(b'"input":{}', b'"input":null', 1), "record 1: `input` is NoneType"),
        (good.replace(b'"input":{}', b'"output":{}', 1), "record 1 has other keys than error, id"),
    ):
        (tmp_path / part_key(2)).write_bytes(content)
        with pytest.raises(PartError, match=says):
            check(store, HINT.as_chunk())
    for text in (b'"error":"died"', b'"error":{}', b'"error":{"code":{}}'):
        damaged = re.sub(rb'"error":\{[^}]*\}', text, good)
        (tmp_path / part_key(2)).write_bytes(damaged)
        with pytest.raises(PartError, match="record 2"):
            describe(store, part_key(2), HINT.plan)


@pytest.mark.parametrize("results", RESULT_FORMATS)
def test_a_record_that_cannot_be_written_is_an_error_record(tmp_path: Path, results: ResultFormat) -> None:
    store, deep = open_store(str(tmp_path)), list[Any]()
    for _ in range(2000):
        deep = [deep]
    inputs: list[dict[str, Any]] = [{"x": math.nan}, {"k": 1}, {"x": deep}]
    rows = [Row(number, f"{number}.jpg", number, ("",), False, inputs[number - 20]) for number in range(20, 23)]
    records = [result_row(row, "caption", {"caption": "x", "score": -0.5, "tokens": 1}) for row in rows]
    info = put_part(store, HINT, records, "w", results=results)
    assert (info.rows, info.failed, info.codes) == (3, 2, "row_invalid=2")
    first, good, last = check(store, HINT.as_chunk(), results=results).records
    assert good == records[1]
    for record, number in ((first, 20), (last, 22)):
        assert (record["id"], record["image"], record["result"], record["input"]) == (number, f"{number}.jpg", None, {})
        assert record["error"]["code"] == "row_invalid"


def test_part_names() -> None:
    assert part_key(42) == "results/part-00000042.jsonl"
    assert chunk_of(part_key(123_456_789)) == 123_456_789
    for key in (
        "results/part-42.jsonl",
        "results/part-0000004x.jsonl",
        "results/other",
        "results/part-00000042.jsonl.gz",
    ):
        assert chunk_of(key) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"task": "embroider"}, "unknown task 'embroider'"),
        ({"manifest_format": "xml"}, "unknown manifest format 'xml'"),
        ({"manifest": "/nonexistent/m.jsonl"}, "does not exist"),
        ({"manifest": "http://x/m.jsonl"}, "only s3://"),
        ({"manifest": "s3://"}, "names no bucket"),
        ({"manifest": ""}, "is not a path"),
        ({"manifest": "x" * 5000}, "does not exist"),
        ({"model": "x" * 5000}, "neither an existing directory"),
        ({"output": "gs://x"}, "only s3://"),
        ({"output": "/etc/passwd"}, "is a file"),
        ({"model": "no such model"}, "neither an existing directory"),
        ({"model": "/nonexistent/model"}, "neither an existing directory"),
        ({"model": "./model"}, "neither an existing directory"),
        ({"model": "../model"}, "neither an existing directory"),
        ({"model": "owner/../model"}, "neither an existing directory"),
        ({"model": "models/of/mine"}, "neither an existing directory"),
        ({"options": {"beams": 3}}, "no option 'beams'"),
        ({"options": {"num_beams": "3"}}, "whole number"),
        ({"chunk_rows": 0}, "chunk_rows"),
        ({"max_error_ratio": 2.0}, "max_error_ratio"),
    ],
)
def test_mistakes_are_named_before_anything_starts(tmp_path: Path, change: dict[str, object], says: str) -> None:
    (tmp_path / "m.jsonl").write_text("{}\n")
    good = {"manifest": str(tmp_path / "m.jsonl"), "task": "caption", "output": str(tmp_path / "out"), "model": "demo"}
    with pytest.raises(UsageError, match=says) as caught:
        make_spec(**{**good, **change})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_the_same_work_has_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    first = make_spec("m.jsonl", "caption", "out")
    assert first.model == "Salesforce/blip-image-captioning-base"
    assert first.manifest == str(tmp_path / "m.jsonl")
    assert make_spec(str(tmp_path / "m.jsonl"), "caption", str(tmp_path / "out"), max_error_ratio=0.9).id == first.id
    assert make_spec("m.jsonl", "caption", "out2").id != first.id
    assert make_spec("m.jsonl", "caption", "out", options={"num_beams": 1}).id != first.id
    assert make_spec("s3://b/p/", "caption", "s3://b/out/").output == "s3://b/out"


def test_settings_come_from_the_environment_and_mistakes_name_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP_ALLOWED_BUCKETS", "s3://a, b/c/,")
    monkeypatch.setenv("BLIP_LEASE_SECONDS", "70")
    loaded = load_settings(redis_url="redis://h:1/0", device=None)
    assert (loaded.allowed_buckets, loaded.lease_seconds, loaded.redis_url) == (("a", "b/c/"), 70, "redis://h:1/0")
    monkeypatch.setenv("BLIP_LEASE_SECONDS", "soon")
    with pytest.raises(UsageError, match="BLIP_LEASE_SECONDS='soon'"):
        load_settings()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lease_seconds": 10}, "BLIP_LEASE_SECONDS=10 is less than twice BLIP_RENEW_SECONDS=15: every lease"),
        ({"renew_seconds": 31}, "BLIP_LEASE_SECONDS=60 is less than twice BLIP_RENEW_SECONDS=31"),
        ({"slots": 1}, "BLIP_SLOTS=1 is less than BLIP_WORKER_THREADS=2: a thread without a slot"),
        ({"worker_threads": 513}, "BLIP_SLOTS=512 is less than BLIP_WORKER_THREADS=513"),
        ({"loader_timeout_seconds": 9.5}, "BLIP_LOADER_TIMEOUT_SECONDS=9.5 is less than BLIP_FETCH_TIMEOUT_SECONDS=30"),
        ({"fetch_timeout_seconds": 61}, "BLIP_LOADER_TIMEOUT_SECONDS=60 is less than BLIP_FETCH_TIMEOUT_SECONDS=61"),
    ],
)
def test_settings_that_cannot_work_together_are_refused_with_both_names(change: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=f"^setting {re.escape(says)}.*; raise the one or lower the other$"):
        load_settings(**change)


def test_settings_that_just_go_together() -> None:
    load_settings(lease_seconds=30, renew_seconds=15, slots=2, loader_timeout_seconds=30)
