"""One way to log for every process: a line an event, JSON for machines, text on a terminal. Standard library only.

    configure("info", "auto")
    with fields(job="job-1", chunk=7, attempt=1):
        log.info("chunk done", extra=more(rows=500, seconds=3.2))

A line is about a process, a job or a chunk, never about a row: what happened to rows is in their records.
"""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import MappingProxyType
from typing import IO, Any, Final, Literal, TypeAlias
from urllib.parse import unquote, urlsplit

LogFormat: TypeAlias = Literal["auto", "json", "text"]
LEVELS: Final = ("debug", "info", "warning", "error")

_context: ContextVar[Mapping[str, Any]] = ContextVar("fields", default=MappingProxyType({}))
_SECRET_VARIABLES: Final = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "BLIP_API_TOKEN", "HF_TOKEN")
_CHATTY: Final = ("boto3", "botocore", "httpx", "urllib3")  # a line for each request
_SHORTEST_SECRET: Final = 8  # shorter ones ("none", "test") are words that stand in other places too
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PATTERNS: Final = (
    (re.compile(r"(?<=://)[^/\s@]*:[^/\s]*@"), "***@"),  # user:password@ of a URL
    (re.compile(r"((?:X-Amz-(?:Signature|Credential|Security-Token)|sig|token)=)[^&\s\"']+", re.IGNORECASE), r"\1***"),
    (re.compile(r"\b(Bearer|Basic) +[\w+/.=~-]{4,}", re.IGNORECASE), r"\1 ***"),
)


@contextmanager
def fields(**more_fields: object) -> Iterator[None]:
    """Lines that this thread logs inside the block have these fields."""
    token = _context.set({**_context.get(), **more_fields})
    try:
        yield
    finally:
        _context.reset(token)


def more(**own: object) -> dict[str, Any]:
    """Fields of one line: `log.info("…", extra=more(rows=5))`."""
    return {"fields": own}


def configure(level: str = "info", form: str | None = None, stream: IO[str] | None = None) -> None:
    """Log to `stream` (standard error) from `level` on. `form` None: as BLIP_LOG_FORMAT says. Again: replaces that."""
    stream = stream or sys.stderr
    form = form or os.environ.get("BLIP_LOG_FORMAT", "auto")
    as_json = form == "json" or (form != "text" and not stream.isatty())
    handler = _Handler(stream)
    handler.setFormatter((_JsonFormatter if as_json else _TextFormatter)(_secrets()))
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


class _Handler(logging.StreamHandler[IO[str]]):
    """Ours, among others that a test or a program may have put there."""


class _Formatter(logging.Formatter):
    def __init__(self, secrets: tuple[str, ...]) -> None:
        super().__init__()
        self.converter = time.gmtime
        self._secrets = secrets

    def hidden(self, text: str) -> str:
        """The text without what looks like a secret, or is one."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        for pattern, instead in _PATTERNS:
            text = pattern.sub(instead, text)
        return text

    def time_of(self, record: logging.LogRecord) -> str:
        return f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z"


class _JsonFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.time_of(record), "level": record.levelname.lower(), "logger": record.name,
            "message": record.getMessage(), "pid": record.process, **_context.get(), **getattr(record, "fields", {}),
        }  # fmt: skip
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: self._safe(value) for name, value in line.items()}, ensure_ascii=False)

    def _safe(self, value: object) -> object:
        return value if isinstance(value, int | float | None) else self.hidden(str(value))


class _TextFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = _CONTROL.sub(lambda found: repr(found[0])[1:-1], record.getMessage())  # one event is one line
        line = f"{self.time_of(record)} {record.levelname} {record.name}: {message}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return self.hidden(line)


def _secrets() -> tuple[str, ...]:
    """What the environment holds of them, the longest first."""
    found = {os.environ.get(name, "") for name in _SECRET_VARIABLES}
    with suppress(ValueError):  # no URL at all: whoever connects to it says so
        password = urlsplit(os.environ.get("BLIP_REDIS_URL", "")).password or ""
        found |= {password, unquote(password)}
    return tuple(sorted((secret for secret in found if len(secret) >= _SHORTEST_SECRET), key=len, reverse=True))
