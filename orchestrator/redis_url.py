"""What BLIP_REDIS_URL says, for both clients of it: the ledger's and Celery's.

redis://, rediss:// and unix://[USER:PASSWORD@]/PATH[?db=N] name a server.
sentinel://[USER:PASSWORD@]HOST:PORT,HOST:PORT/MASTER[/DB] names Sentinels, which know who the master is at the moment;
`?sentinel_password=…` where they want one themselves.
"""

from dataclasses import dataclass
from typing import Any, Final, cast
from urllib.parse import parse_qs, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from .errors import UsageError

_SOCKET: Final = "unix"
_SENTINEL: Final = "sentinel"
_SENTINEL_PORT: Final = 26379
#: A Sentinel that is away is passed over at once: the next one knows as much. The default are seconds of retries.
_ASKING: Final = {"socket_timeout": 5, "socket_connect_timeout": 5, "retry": Retry(NoBackoff(), 0)}


@dataclass(frozen=True, slots=True)
class _Sentinels:
    hosts: tuple[tuple[str, int], ...]
    master: str
    db: int
    username: str | None
    password: str | None  # of the master
    own: dict[str, Any]  # how the Sentinels are asked


def client(url: str, **options: Any) -> "redis.Redis":  # type: ignore[type-arg,unused-ignore]
    """A client with `options` of redis.Redis. Raises UsageError for a URL that is none; does not connect yet."""
    scheme = urlsplit(url).scheme
    if scheme == _SOCKET:
        options.pop("socket_keepalive", None)  # of TCP
    try:
        if scheme != _SENTINEL:
            return redis.Redis.from_url(url, **options)
        found = _sentinels(url)
        named = {"db": found.db, "username": found.username, "password": found.password}
        sentinel: Any = Sentinel(list(found.hosts), sentinel_kwargs=found.own)  # type: ignore[no-untyped-call]
        return cast("redis.Redis", sentinel.master_for(found.master, **named, **options))
    except ValueError as error:
        raise UsageError(f"setting BLIP_REDIS_URL: {error}") from None


def broker(url: str) -> tuple[str, dict[str, Any]]:
    """The broker's URL as Celery takes it, and transport options for it. Raises UsageError."""
    parts = urlsplit(url)
    if parts.scheme == "rediss" and "ssl_cert_reqs" not in parse_qs(parts.query):
        # Left to itself, kombu would take any certificate.
        return f"{url}{'&' if parts.query else '?'}ssl_cert_reqs=required", {}
    if parts.scheme == _SOCKET:
        db = parse_qs(parts.query).get("db", ["0"])[0]
        return f"redis+socket://{parts.netloc}{parts.path}?virtual_host={db}", {}
    if parts.scheme != _SENTINEL:
        return url, {}
    try:
        found = _sentinels(url)
    except ValueError as error:
        raise UsageError(f"setting BLIP_REDIS_URL: {error}") from None
    login = parts.netloc.rpartition("@")[0]
    prefix = f"sentinel://{login}@" if login else "sentinel://"
    urls = ";".join(f"{prefix}{host}:{port}/{found.db}" for host, port in found.hosts)
    return urls, {"master_name": found.master, "sentinel_kwargs": found.own}


def _sentinels(url: str) -> _Sentinels:
    """Raises ValueError with the reason."""
    parts = urlsplit(url)
    login, _, places = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    master, _, db = parts.path.strip("/").partition("/")
    if not master or not places:
        raise ValueError("name the Sentinels and the master: sentinel://HOST:PORT,HOST:PORT/MASTER")
    asked = parse_qs(parts.query)
    own = {"password": asked["sentinel_password"][0]} if "sentinel_password" in asked else {}
    return _Sentinels(
        tuple(_place(place) for place in places.split(",")), unquote(master), int(db or 0),
        unquote(user) or None, unquote(password) or None, _ASKING | own,
    )  # fmt: skip


def _place(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":") if ":" in text else (text, "", str(_SENTINEL_PORT))
    if not host or not port.isdigit():
        raise ValueError(f"{text!r} is no HOST:PORT of a Sentinel")
    return host, int(port)
