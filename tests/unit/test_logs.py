"""Log lines: one an event, JSON or text, with the fields of the chunk they are about and without secrets."""

import io
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator import logs
from orchestrator.errors import UsageError
from orchestrator.settings import load_settings

LOG = logging.getLogger("tests.logs")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _root_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def logged(*events: Any, form: str | None = "json", stream: io.StringIO | None = None) -> str:
    stream = stream or io.StringIO()
    logs.configure("info", form, stream)
    for event in events:
        event()
    return stream.getvalue()


def as_json(*events: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in logged(*events).splitlines()]


def test_a_line_has_time_level_logger_and_the_fields_around_it() -> None:
    def chunk() -> None:
        with logs.fields(job="job-1"), logs.fields(chunk=7, attempt=2):
            LOG.info("chunk %d done", 7, extra=logs.more(rows=500, seconds=3.25))
        LOG.warning("after it")

    first, second = as_json(chunk)
    assert first.pop("time").endswith("Z")
    assert first.pop("pid") > 0
    assert first == {
        "level": "info", "logger": "tests.logs", "message": "chunk 7 done", "job": "job-1", "chunk": 7, "attempt": 2,
        "rows": 500, "seconds": 3.25,
    }  # fmt: skip
    assert second["level"] == "warning"
    assert "job" not in second


def test_fields_are_of_their_thread() -> None:
    def both() -> None:
        with logs.fields(job="mine"):
            other = threading.Thread(target=lambda: LOG.info("other"))
            other.start()
            other.join()

    assert "job" not in as_json(both)[0]


def test_an_exception_stays_in_its_line() -> None:
    def broken() -> None:
        try:
            raise ValueError("what\nhappened")
        except ValueError:
            LOG.exception("broken")

    (line,) = as_json(broken)
    assert "ValueError: what\nhappened" in line["exception"]


@pytest.mark.parametrize(
    ("form", "stream", "is_json"),
    [
        ("auto", io.StringIO(), True), ("auto", Terminal(), False), ("text", io.StringIO(), False),
        ("json", Terminal(), True),
    ],
)  # fmt: skip
def test_the_format(form: str, stream: io.StringIO, is_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP_LOG_FORMAT", form)
    text = logged(lambda: LOG.info("hello"), form=None, stream=stream)
    assert text.startswith("{") == is_json
    assert "hello" in text


def test_a_hostile_name_makes_no_line_of_its_own_and_moves_no_cursor() -> None:
    text = logged(lambda: LOG.info("image %s", "a\n2026 CRITICAL all is lost\x1b[2J\r"), form="text")
    assert text.count("\n") == 1
    assert "\x1b" not in text
    assert "\r" not in text


@pytest.mark.parametrize("form", ["json", "text"])
def test_secrets_are_left_out(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    monkeypatch.setenv("BLIP_API_TOKEN", "token-of-the-api")
    monkeypatch.setenv("BLIP_REDIS_URL", "rediss://user:p%40ssword-1@redis:6379/0")

    def say() -> None:
        LOG.info("key wJalrXUtnFEMI/K7MDENG, then p@ssword-1 and p%40ssword-1")
        LOG.info(
            "%s",
            {"Authorization": "Bearer token-of-the-api"},
            extra=logs.more(why=KeyError("token-of-the-api"), at="token-of-the-api"),
        )
        LOG.info("rediss://user:other-one@redis:6379/0 and https://s3/o?X-Amz-Signature=abcdef0123&X-Amz-Expires=3")
        LOG.info("Authorization: Bearer abc.def-123")
        try:
            raise OSError("redis://:in-a-traceback@host refused")
        except OSError:
            LOG.exception("no")

    text = logged(say, form=form)
    for secret in ("wJalr", "ssword", "token-of-the-api", "other-one", "abcdef0123", "abc.def", "in-a-traceback"):
        assert secret not in text
    assert "@redis:6379" in text
    assert "X-Amz-Expires=3" in text


def test_short_words_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP_API_TOKEN", "none")
    monkeypatch.setenv("BLIP_REDIS_URL", "redis://[broken")
    assert "none of them" in logged(lambda: LOG.info("none of them"))


def test_configured_twice_it_says_things_once() -> None:
    stream = io.StringIO()
    logs.configure("info", "text", stream)
    assert logged(lambda: LOG.info("once"), stream=stream).count("once") == 1


def test_an_unknown_format_is_refused_with_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP_LOG_FORMAT", "xml")
    with pytest.raises(UsageError, match="BLIP_LOG_FORMAT='xml'"):
        load_settings()
