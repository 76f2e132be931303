"""What object stores do on bad days, over real HTTP: bounded, jittered retries; nothing half, nothing twice."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_proxy import Fault, FaultyProxy
from servers import S3Server

from orchestrator.errors import AccessDenied, FetchError, StorageError, StoreUnavailable
from orchestrator.fetch import fetch
from orchestrator.s3 import s3_client
from orchestrator.settings import load_settings
from orchestrator.storage import Store, open_store

DATA = b"0123456789" * 1000


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3_server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
    s3_client.cache_clear()
    yield proxy
    proxy.close()


@pytest.fixture
def store(proxy: FaultyProxy) -> Store:
    return open_store("s3://blip/out", load_settings(storage_retry_seconds=2))


@pytest.mark.parametrize("fault", [503, 500, 409, 429, "reset"])
def test_passing_failures_are_retried(proxy: FaultyProxy, store: Store, fault: Fault) -> None:
    proxy.script.extend([fault, fault])
    assert store.put_new("part", DATA)
    proxy.script.extend([fault, fault])
    assert store.get("part") == DATA
    proxy.script.extend([fault])
    assert store.head("part") is not None
    assert len(proxy.seen) == 3 + 3 + 2


@pytest.mark.parametrize("fault", ["reset_after", "hang_after"])
def test_a_put_whose_answer_was_lost_is_there_once(proxy: FaultyProxy, store: Store, fault: Fault) -> None:
    proxy.script.append(fault)
    assert not store.put_new("part", DATA)  # the first try was obeyed: the second meets 412, as if another was first
    assert store.get("part") == DATA
    assert not store.put_new("part", b"other")


@pytest.mark.parametrize("fault", ["reset_after", 503])
@pytest.mark.parametrize("nth", [0, 1, 2, 3])
def test_a_large_file_is_there_once_whatever_fails(
    proxy: FaultyProxy, store: Store, tmp_path: Path, fault: Fault, nth: int
) -> None:
    """`nth`: the request that fails: one to begin, two pieces, and the conditional end."""
    proxy.methods = {"POST", "PUT"}
    (tmp_path / "rows").write_bytes(DATA * 900)
    proxy.script.extend(["pass"] * nth + [fault])
    assert store.put_file_new("plan/rows", tmp_path / "rows")  # ending an upload that has ended is no error
    assert store.get("plan/rows") == DATA * 900
    assert not store.put_file_new("plan/rows", tmp_path / "rows")


def test_a_412_is_an_answer_not_a_failure(proxy: FaultyProxy, store: Store) -> None:
    proxy.script.append(412)
    assert not store.put_new("part", DATA)
    assert len(proxy.seen) == 1


def test_a_body_cut_short_is_never_taken_for_whole(proxy: FaultyProxy, store: Store) -> None:
    store.put("part", DATA)
    proxy.script.extend(["truncate", "truncate"])
    assert store.get("part") == DATA
    proxy.script.extend(["truncate"])
    assert store.get("part", 100, 5000) == DATA[100:5000]
    proxy.always = "truncate"
    with pytest.raises(StoreUnavailable, match="s3://blip/out/part"):
        store.get("part")


def test_an_outage_ends_in_one_clear_error_within_the_time(proxy: FaultyProxy, store: Store) -> None:
    proxy.always = 503
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"s3://blip/out/part.* 503"):
        store.put_new("part", DATA)
    assert time.monotonic() - began < 10
    assert 3 <= len(proxy.seen) < 15  # it backs off
    proxy.always = "pass"
    assert store.put_new("part", DATA)  # nothing was half written


def test_what_will_not_pass_is_not_retried(proxy: FaultyProxy, store: Store) -> None:
    proxy.script.append(403)
    with pytest.raises(AccessDenied, match="access denied"):
        store.put_new("part", DATA)
    proxy.script.append(501)
    with pytest.raises(StorageError, match="501"):
        store.put_new("part", DATA)
    assert len(proxy.seen) == 2


def test_nobody_listens() -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        s3_client.cache_clear()
        with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:9"):
            open_store("s3://blip/out", load_settings(storage_retry_seconds=0.5)).head("x")
    s3_client.cache_clear()


def test_images_are_fetched_whole_or_not_at_all(proxy: FaultyProxy, store: Store) -> None:
    store.put("a.jpg", DATA)
    uri = "s3://blip/out/a.jpg"
    proxy.script.extend([503, "reset", "truncate"])
    assert fetch(uri, 10_000, 5) == DATA
    assert fetch(uri, len(DATA), 5) == DATA
    for max_bytes, location, script, code in (
        (9_999, uri, [], "image_too_large"),
        (10_000, "s3://blip/out/none.jpg", [], "image_not_found"),
        (10_000, "s3://absent/a.jpg", [], "image_not_found"),
        (10_000, uri, [403], "access_denied"),
        (10_000, uri, [503] * 50, "fetch_failed"),
        (10_000, uri, ["hang"] * 50, "fetch_timeout"),
    ):
        proxy.script.clear()
        proxy.script.extend(script)  # type: ignore[arg-type]
        began = time.monotonic()
        with pytest.raises(FetchError) as caught:
            fetch(location, max_bytes, 1.5)
        assert caught.value.code == code
        assert time.monotonic() - began < 10
