"""The API's server: uvicorn in a thread beside the control loop, on a socket that is bound before either starts."""

import logging
import socket
import threading
from collections.abc import Callable

import uvicorn

from ..errors import UsageError
from ..ledger import Ledger
from ..settings import Settings
from .app import create_app
from .guard import NO_TOKEN, check_access

GRACE_SECONDS = 3  # for answers that are under way when we stop

log = logging.getLogger(__name__)


class ApiServer:
    """Serves the API from `start` to `close`; `stop` may be called by a signal handler."""

    def __init__(self, settings: Settings, ailing: Callable[[], str | None]) -> None:
        """Binds the address. Raises UsageError when it cannot be had, or would be open to all by mistake."""
        check_access(settings)
        self._ledger = Ledger.connect(settings)
        self._stopping = threading.Event()
        self._socket = _bind(settings.api_host, settings.api_port)
        self.port = int(self._socket.getsockname()[1])
        app = create_app(self._ledger, settings, ailing=ailing, stopping=self._stopping.is_set)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, lifespan="off", log_config=None, access_log=False, server_header=False, proxy_headers=False,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )  # fmt: skip
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="api", daemon=True)
        token = "no token is asked for" if settings.api_token in {"", NO_TOKEN} else "with a token"
        self._where = f"http://{settings.api_host}:{self.port}, {token}"

    def start(self) -> None:
        self._thread.start()
        log.info("API at %s", self._where)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """No new requests, and streams end."""
        self._stopping.set()
        self._server.should_exit = True

    def close(self) -> None:
        """Returns when requests have ended, or a few seconds later."""
        self.stop()
        if self.alive:
            self._thread.join(GRACE_SECONDS + 2)
        self._socket.close()
        self._ledger.close()


def _bind(host: str, port: int) -> socket.socket:
    listener = None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # By its protocol asyncio knows that small answers must not wait for acknowledgements (TCP_NODELAY).
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)  # requests wait until the server is up, and are not refused
    except OSError as error:
        if listener is not None:
            listener.close()
        why = f"{error.strerror or error}; choose another port (0: any free one)"
        raise UsageError(f"BLIP_API_HOST={host} BLIP_API_PORT={port}: {why}") from None
    return listener
