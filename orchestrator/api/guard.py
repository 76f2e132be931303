"""Before any route: the token, and the size of bodies. Plain ASGI, so that nothing is read or parsed for strangers."""

import hmac
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import UsageError
from ..settings import Settings
from .problems import problem

MAX_BODY: Final = 256 * 2**10  # bytes; a submission has a few hundred
_TOO_LARGE: Final = f"a body may have {MAX_BODY} bytes"
_CLOSE: Final = {"Connection": "close"}  # the rest of the body is not read: the connection cannot be used again
NO_TOKEN: Final = "none"  # noqa: S105 -- the word that means that there is none
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


def check_access(settings: Settings) -> None:
    """Raises UsageError for a token that no header can carry, and for an open API on a network that nobody chose."""
    token = settings.api_token
    if not token and settings.api_host not in _LOOPBACK:
        raise UsageError(
            f"BLIP_API_HOST={settings.api_host} offers the API to the network: set BLIP_API_TOKEN, or say "
            "BLIP_API_TOKEN=none to do without"
        )
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise UsageError("BLIP_API_TOKEN must be of printable ASCII characters, without spaces")


class Guard:
    """Refuses requests to /v1 without the token, and all bodies above MAX_BODY."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._token = b"" if settings.api_token == NO_TOKEN else settings.api_token.encode()
        self._loopback_only = not settings.api_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["path"].startswith("/v1") and (refused := self._refusal(headers)):
            await problem(*refused)(scope, receive, send)
        elif _declared(headers) > MAX_BODY:
            await problem("too_large", _TOO_LARGE, _CLOSE)(scope, receive, send)
        else:
            await self._app(scope, _counted(receive), send)

    def _refusal(self, headers: Headers) -> tuple[str, str, dict[str, str]] | None:
        if self._token:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token):
                return None
            why = "the token is not the one of BLIP_API_TOKEN" if scheme else "send the header Authorization: Bearer …"
            return "unauthorized", why, {"WWW-Authenticate": 'Bearer realm="blip-batch"'}
        # Without a token any web page in this machine's browser could reach us: by a request of its own, or by a name
        # that it made to mean this machine.
        if self._loopback_only and ("origin" in headers or _named_host(headers) not in _LOOPBACK):
            return "forbidden", "without BLIP_API_TOKEN only programs on this machine are answered", {}
        return None


def _named_host(headers: Headers) -> str | None:
    try:
        return urlsplit("//" + headers.get("host", "")).hostname
    except ValueError:  # no host at all
        return None


def _declared(headers: Headers) -> int:
    length = headers.get("content-length", "")
    return int(length) if length.isdecimal() else 0


def _counted(receive: Receive) -> Receive:
    """`receive`, until a body without a declared length has gone over the limit."""
    size = 0

    async def limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY:
            raise HTTPException(413, _TOO_LARGE, _CLOSE)
        return message

    return limited
