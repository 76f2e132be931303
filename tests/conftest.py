"""Fixtures for everyone: real servers, started once a session where state can be wiped, once a test otherwise."""

import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import MotoServer, RcloneServer, RedisServer, S3Server

from orchestrator.control import Controller
from orchestrator.s3 import s3_client
from orchestrator.settings import Settings, load_settings

#: Settings with which a lost chunk is found within seconds.
FAST = {
    "lease_seconds": 1.0, "renew_seconds": 0.3, "reconcile_seconds": 0.1, "poll_seconds": 0.02, "lead_seconds": 1.0,
    "storage_retry_seconds": 2.0,
}  # fmt: skip

S3_VARIABLES = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION",
    "AWS_REGION", "AWS_PROFILE", "AWS_SESSION_TOKEN",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own BLIP_* and AWS_* settings stay out of the tests."""
    for name in [*S3_VARIABLES, *(name for name in os.environ if name.startswith("BLIP_"))]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def _shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def redis_server(_shared_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> RedisServer:
    """An empty Redis; BLIP_REDIS_URL points at it. It may be killed, paused and started again (same port)."""
    if _shared_redis.process is None or _shared_redis.process.poll() is not None:
        _shared_redis.start()
    client = _shared_redis.client()
    client.flushall()
    client.close()
    monkeypatch.setenv("BLIP_REDIS_URL", _shared_redis.url)
    return _shared_redis


@pytest.fixture(scope="session")
def _shared_moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MotoServer]:
    server = MotoServer(tmp_path_factory.mktemp("moto"))
    server.start()
    yield server
    server.kill()


def _point_at(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.s3_environment().items():
        monkeypatch.setenv(name, value)
    s3_client.cache_clear()  # clients remember the endpoint that they were made for


def make_bucket(name: str) -> None:
    """Makes a bucket on the server that the environment points at."""
    s3_client(5.0).create_bucket(Bucket=name)


@pytest.fixture
def s3_server(_shared_moto: MotoServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[MotoServer]:
    """moto over HTTP with an empty bucket `blip`; the AWS variables point at it."""
    reset = urllib.request.Request(f"{_shared_moto.endpoint}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset, timeout=10).close()
    _point_at(_shared_moto, monkeypatch)
    make_bucket("blip")
    yield _shared_moto
    _forget_clients()


@pytest.fixture
def rclone_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RcloneServer]:
    """`rclone serve s3` with an empty bucket `blip`; the AWS variables point at it."""
    server = RcloneServer(tmp_path)
    server.start()
    _point_at(server, monkeypatch)
    make_bucket("blip")
    yield server
    _forget_clients()
    server.kill()


def _forget_clients() -> None:
    s3_client.cache_clear()


@pytest.fixture
def settings(redis_server: RedisServer) -> Settings:
    """Settings of an empty Redis, with short times."""
    return load_settings(**FAST)


@pytest.fixture
def controller(settings: Settings) -> Iterator[Controller]:
    """A control loop, to be stepped."""
    controller = Controller(settings)
    yield controller
    controller.close()
