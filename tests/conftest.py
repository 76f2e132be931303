"""Fixtures for everyone: real servers, started once a session where state can be wiped, once a test otherwise."""

import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from servers import MotoServer, RcloneServer, RedisServer, S3Server

from orchestrator.control import Controller
from orchestrator.s3 import s3_client
from orchestrator.settings import Settings, load_settings

if TYPE_CHECKING:
    import torch

#: Settings with which a lost chunk is found within seconds.
FAST = {
    "lease_seconds": 1.0, "renew_seconds": 0.3, "reconcile_seconds": 0.1, "poll_seconds": 0.02, "lead_seconds": 1.0,
    "storage_retry_seconds": 2.0,
}  # fmt: skip

S3_VARIABLES = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION",
    "AWS_REGION", "AWS_PROFILE", "AWS_SESSION_TOKEN",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="what tests of the engine run on: cpu, cuda, cuda:N")


def pytest_configure(config: pytest.Config) -> None:
    # Where it is ignored, as in a shell's background job, the processes of tests would not hear of a Ctrl-C either.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if (device := config.getoption("--device")) != "cpu":
        import torch  # noqa: PLC0415 - most tests do without

        if not (device.startswith("cuda") and torch.cuda.is_available()):
            raise pytest.UsageError(f"--device {device}: torch sees no such device here")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`gpu` are the tests of tests/gpu and, on a GPU, all that use `device`. Without a GPU none is there."""
    on_gpu = config.getoption("--device") != "cpu"
    for item in items:
        if on_gpu and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
    if not on_gpu:
        away = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=away)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> "torch.device":
    """What `--device` says: tests that use it run on a GPU with the same body as on a CPU."""
    import torch  # noqa: PLC0415

    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random checkpoint of each of the engine's tasks, named as the task. Not to be changed."""
    from small_models import save_checkpoint  # noqa: PLC0415 - loads torch

    from blip_engine.requests import TASKS  # noqa: PLC0415

    root = tmp_path_factory.mktemp("models")
    for task in TASKS:
        save_checkpoint(root / task, task)
    return root


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own BLIP_* and AWS_* settings stay out of the tests."""
    for name in [*S3_VARIABLES, *(name for name in os.environ if name.startswith("BLIP_"))]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("BLIP_API_PORT", "0")  # an orchestrator takes any free port


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
