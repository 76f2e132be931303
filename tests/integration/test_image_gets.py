"""Images from S3 servers: signed here or by boto3's client, the outcomes are the same, and so are their words."""

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from faulty_proxy import Fault, FaultyProxy
from servers import S3Server

from orchestrator import s3_images
from orchestrator.errors import FetchError
from orchestrator.fetch import fetch
from orchestrator.s3 import s3_client
from orchestrator.s3_images import _Getter

DATA = b"0123456789" * 1000
KEYS = (
    "plain.jpg", "a folder/with spaces.jpg", "plus+and&and=.jpg", "100%.jpg", "%41.jpg", "ä/漢字/🙂.jpg",
    "a'b(c)!*.jpg",
    "semi;colon,at@tilde~.jpg", "q?mark#hash.jpg", "dots/../not.a.path.jpg", "two//slashes.jpg", "a:b$c.jpg",
)  # fmt: skip


@pytest.fixture(params=["s3_server", "rclone_s3"])
def server(request: pytest.FixtureRequest) -> S3Server:
    found: S3Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3_server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
    s3_client.cache_clear()
    yield proxy
    proxy.close()


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that were got without the client."""
    seen: list[str] = []
    real = _Getter._direct

    def noted(self: _Getter, place: Any, key: str) -> Any:
        seen.append(key)
        return real(self, place, key)

    monkeypatch.setattr(_Getter, "_direct", noted)
    return seen


@pytest.fixture
def by_client(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it to have all GETs go through the client from then on."""
    return lambda: monkeypatch.setattr(s3_images, "_place", lambda *_: None)


def put(key: str, data: bytes = DATA) -> str:
    s3_client(5.0).put_object(Bucket="blip", Key=key, Body=data)
    return f"s3://blip/{key}"


def test_any_key_is_signed_as_the_store_expects(server: S3Server, direct: list[str]) -> None:
    assert fetch(put("first.jpg"), 10**6, 5) == DATA
    on_disk = type(server).__name__ == "RcloneServer"  # its keys are paths of a file system
    keys = [key for key in KEYS if not (on_disk and ("//" in key or ".." in key))]
    for number, key in enumerate(keys):
        data = os.urandom(100 + number)
        assert fetch(put(key, data), 10**6, 5) == data, key
    assert direct == keys


def test_a_version_is_the_clients(s3_server: S3Server, direct: list[str]) -> None:
    client = s3_client(5.0)
    client.put_bucket_versioning(Bucket="blip", VersioningConfiguration={"Status": "Enabled"})
    old = client.put_object(Bucket="blip", Key="a.jpg", Body=b"old")["VersionId"]
    uri = put("a.jpg", b"new")
    assert [fetch(uri, 100, 5), fetch(f"{uri}?versionId={old}", 100, 5), fetch(uri, 100, 5)] == [b"new", b"old", b"new"]
    assert direct == ["a.jpg"]


def test_a_token_is_sent_and_signed(rclone_s3: S3Server, direct: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "temporary")
    s3_client.cache_clear()
    uri = put("a.jpg")
    assert fetch(uri, 10**6, 5) == fetch(uri, 10**6, 5) == DATA
    assert direct == ["a.jpg"]


def test_a_wrong_secret_is_denied(rclone_s3: S3Server, direct: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    uri = put("a.jpg")
    assert fetch(uri, 10**6, 5) == DATA
    monkeypatch.setattr(_Getter, "_key", lambda *_: b"another")
    with pytest.raises(FetchError, match="access denied") as caught:
        fetch(uri, 10**6, 5)
    assert caught.value.code == "access_denied"
    assert direct == ["a.jpg"]


def test_one_request_and_one_connection(proxy: FaultyProxy) -> None:
    uris = [put(f"{n}.jpg") for n in range(5)]
    fetch(uris[0], 10**6, 5)
    before = len(proxy.seen)
    connections = proxy.connections
    for uri in uris:
        fetch(uri, 10**6, 5)
    assert proxy.seen[before:] == ["GET"] * 5
    assert proxy.connections == connections


FAULTS: list[tuple[list[Fault], str]] = [
    ([], "a.jpg"), ([], "absent.jpg"), ([403], "a.jpg"), ([401], "a.jpg"), ([404], "a.jpg"), ([500, 429], "a.jpg"),
    ([503] * 50, "a.jpg"), ([501], "a.jpg"), (["reset", "truncate"], "a.jpg"), (["truncate"] * 50, "a.jpg"),
    (["reset"] * 50, "a.jpg"), (["hang"] * 50, "a.jpg"), ([412], "a.jpg"), ([416], "a.jpg"),
]  # fmt: skip


def outcome(uri: str, limit: int) -> object:
    try:
        return fetch(uri, limit, 1.0)
    except FetchError as error:
        return error.code, str(error)


@pytest.mark.parametrize(
    ("script", "key", "limit"), [*((*fault, len(DATA)) for fault in FAULTS), ([], "a.jpg", len(DATA) - 1)]
)
def test_faults_end_as_through_the_client(
    proxy: FaultyProxy,
    direct: list[str],
    by_client: Any,
    script: list[Fault],
    key: str,
    limit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Tries at 0, 0.2 and 0.6 seconds: with jitter the last one could end just behind the deadline, in one way only.
    monkeypatch.setattr("orchestrator.s3.random.uniform", lambda _, most: most)
    uri = put("a.jpg").replace("a.jpg", key)
    fetch("s3://blip/a.jpg", 10**6, 1.0)  # with the same time-out: it has a client of its own
    found = []
    for way in ("direct", "client"):
        if way == "client":
            by_client()
            s3_client.cache_clear()
        proxy.script.clear()
        proxy.script.extend(script)
        began = time.monotonic()
        found.append(outcome(uri, limit))
        assert time.monotonic() - began < 10
    assert found[0] == found[1]
    assert bool(direct)


def test_a_bucket_that_moved_is_asked_anew(proxy: FaultyProxy, direct: list[str]) -> None:
    uri = put("a.jpg")
    fetch(uri, 10**6, 5)
    proxy.script.append(400)  # as S3 answers a signature for another region
    assert fetch(uri, 10**6, 5) == DATA
    assert fetch(uri, 10**6, 5) == DATA
    assert direct == ["a.jpg", "a.jpg"]


@pytest.mark.parametrize("missing", ["_endpoint", "_request_signer"])
def test_a_client_of_another_make_serves_alone(s3_server: S3Server, direct: list[str], missing: str) -> None:
    uri = put("a.jpg")
    client = s3_client(2.0)
    getter = _Getter(_Without(client, missing))
    for _ in range(2):
        body, size = getter.get("blip", "a.jpg")
        assert (body.read(), size) == (DATA, len(DATA))
    assert uri
    assert not direct


class _Without:
    """A client that lacks an attribute."""

    def __init__(self, client: Any, missing: str) -> None:
        self._client, self._missing = client, missing

    def __getattr__(self, name: str) -> Any:
        if name == self._missing:
            raise AttributeError(name)
        return getattr(self._client, name)
