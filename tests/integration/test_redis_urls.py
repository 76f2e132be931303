"""BLIP_REDIS_URL beyond redis://: TLS with certificates that are checked, and Sentinels through a failover."""

import datetime
import ipaddress
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from servers import RedisServer, free_port, redis_binary

from orchestrator.broker import make_celery, publish
from orchestrator.contract import Hint
from orchestrator.errors import RedisUnavailable, UsageError
from orchestrator.ledger import QUEUE, Ledger
from orchestrator.settings import Settings

HINT = Hint("job-1", 0, "plan", 0, 1000, 0, 10)


def speaks(settings: Settings) -> None:
    """Both clients of the URL write, and what they wrote is read. Raises RedisUnavailable."""
    with closing(Ledger.connect(settings)) as ledger, make_celery(settings) as app:
        before = ledger.queue_length()
        assert publish(app, [HINT]) == 1
        assert ledger.queue_length() == before + 1


# A socket of this machine


class SocketServer(RedisServer):
    """Redis that also listens at `redis.sock` in its folder."""

    def command(self) -> list[str]:
        return [*super().command(), "--unixsocket", str(self.folder / "redis.sock"), "--requirepass", "s3/cret"]


def test_unix_socket(tmp_path: Path) -> None:
    server = SocketServer(tmp_path)
    server.start()
    try:
        speaks(Settings(redis_url=f"unix://:s3%2Fcret@{tmp_path}/redis.sock?db=3"))
        with redis.Redis(port=server.port, db=3, password="s3/cret") as client:
            assert client.llen(QUEUE) == 1
        with pytest.raises(RedisUnavailable, match="check BLIP_REDIS_URL"):
            speaks(Settings(redis_url=f"unix://{tmp_path}/none.sock"))
    finally:
        server.kill()


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of 127.0.0.1 with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test's Redis")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1)).add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256())
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tls") / "ca.crt"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return path


@pytest.fixture
def tls_port(redis_server: RedisServer, certificate: Path) -> Iterator[int]:
    """Speaks TLS, and passes what it hears on to Redis."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    plain, _ = listener.accept()
                except OSError:  # the test is over
                    return
                threading.Thread(target=serve, args=(plain,), daemon=True).start()

        def serve(plain: socket.socket) -> None:
            with (
                suppress(OSError),
                context.wrap_socket(plain, server_side=True) as client,
                socket.create_connection(("127.0.0.1", redis_server.port)) as behind,
            ):
                threading.Thread(target=pump, args=(behind, client), daemon=True).start()
                pump(client, behind)

        def pump(source: socket.socket, target: socket.socket) -> None:
            with suppress(OSError):
                while data := source.recv(65536):
                    target.sendall(data)

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_tls_with_the_authority_that_the_url_names(tls_port: int, certificate: Path) -> None:
    speaks(Settings(redis_url=f"rediss://127.0.0.1:{tls_port}/0?ssl_ca_certs={certificate}"))


def test_a_certificate_of_nobody_we_trust_is_refused_by_both_clients(tls_port: int) -> None:
    settings = Settings(redis_url=f"rediss://127.0.0.1:{tls_port}/0")
    with closing(Ledger.connect(settings)) as ledger, pytest.raises(RedisUnavailable, match="certificate"):
        ledger.ping()
    with make_celery(settings) as app, pytest.raises(RedisUnavailable, match="certificate"):
        publish(app, [HINT])


# Sentinels


@contextmanager
def server(folder: Path, port: int, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    folder.mkdir()
    command = [redis_binary(), *arguments, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A URL of Sentinels that watch a master and its replica, and the master's process."""
    master, replica, *watching = (free_port() for _ in range(4))
    login = ("--requirepass", "of-redis", "--masterauth", "of-redis", "--save", "", "--repl-diskless-sync-delay", "0")
    files = []
    for number in range(2):
        files.append(tmp_path / f"sentinel-{number}.conf")
        files[-1].write_text(
            f"sentinel monitor blip 127.0.0.1 {master} 2\nsentinel auth-pass blip of-redis\nrequirepass of-sentinels\n"
            f"sentinel sentinel-pass of-sentinels\nsentinel down-after-milliseconds blip 500\n"
            "sentinel failover-timeout blip 1000\n"
        )
    with (
        server(tmp_path / "master", master, *login) as process,
        server(tmp_path / "replica", replica, *login, "--replicaof", "127.0.0.1", str(master)),
        server(tmp_path / "one", watching[0], str(files[0]), "--sentinel"),
        server(tmp_path / "two", watching[1], str(files[1]), "--sentinel"),
    ):
        for port in watching:
            wait_for(lambda port=port: _knows_all(port))  # type: ignore[misc]
        hosts = ",".join(f"127.0.0.1:{port}" for port in (free_port(), *watching))  # the first one is away
        yield f"sentinel://:of-redis@{hosts}/blip/0?sentinel_password=of-sentinels", process


def _knows_all(port: int) -> bool:
    with redis.Redis(port=port, password="of-sentinels", decode_responses=True) as sentinel:
        state = sentinel.sentinel_master("blip")
        return int(state["num-slaves"]) == 1 and int(state["num-other-sentinels"]) == 1


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(redis.RedisError, RedisUnavailable, KeyError):
            if condition() is not False:
                return
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_sentinels_lead_both_clients_to_the_new_master(
    sentinels: tuple[str, "subprocess.Popen[bytes]"],
) -> None:
    url, master = sentinels
    settings = Settings(redis_url=url)
    with closing(Ledger.connect(settings)) as ledger, make_celery(settings) as app:
        publish(app, [HINT])
        assert ledger.queue_length() == 1
        master.kill()
        wait_for(lambda: publish(app, [HINT]))
        wait_for(ledger.queue_length)
        with app.connection_for_read() as connection, connection.SimpleQueue(QUEUE) as queue:
            message = queue.get(timeout=10)
            assert Hint.from_message(message.payload[0][0]) == HINT
            message.ack()


@pytest.mark.parametrize(
    "url", ["sentinel://host:26379", "sentinel://host:26379/", "sentinel:///blip", "sentinel://a:x/blip", "http://host"]
)
def test_a_url_that_is_none_is_one_line_with_the_settings_name(url: str) -> None:
    with pytest.raises(UsageError, match="setting BLIP_REDIS_URL: "):
        Ledger.connect(Settings(redis_url=url))
