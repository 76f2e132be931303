"""The worker's HTTP endpoint: /metrics for Prometheus, /healthz and /readyz for probes. Nothing in it is secret."""

import socket
import socketserver
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Protocol

from prometheus_client import CollectorRegistry

from orchestrator.errors import UsageError
from orchestrator.metrics import exposition
from orchestrator.settings import Settings


class Judge(Protocol):
    """`health.Health`."""

    def problem(self) -> str | None: ...

    def unready(self) -> str | None: ...


class Endpoint:
    """Serves from a thread of its own until `close`; without BLIP_METRICS_PORT it serves nothing."""

    def __init__(self, settings: Settings, registry: CollectorRegistry, health: Judge) -> None:
        """Raises UsageError when it cannot listen there."""
        self._server: _Server | None = None
        if settings.metrics_port == 0:
            return
        try:
            self._server = _Server((settings.metrics_host, settings.metrics_port), registry, health)
        except OSError as error:
            where = f"BLIP_METRICS_HOST={settings.metrics_host} BLIP_METRICS_PORT={settings.metrics_port}"
            raise UsageError(f"settings {where}: cannot listen there: {error}") from None
        threading.Thread(target=self._server.serve_forever, name="endpoint", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a scrape under way does not hold up the worker's end

    def __init__(self, address: tuple[str, int], registry: CollectorRegistry, health: Judge) -> None:
        self.registry, self.health = registry, health
        if ":" in address[0]:  # "::" is every address, of both kinds
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's also asks the name service who we are, perhaps for long
        self.server_name, self.server_port = "worker", self.server_address[1]


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10  # seconds for a request to come

    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/metrics":
                self._answer(200, *exposition(self.server.registry, self.headers.get("Accept", "")))
            case "/healthz":
                self._judge(self.server.health.problem())
            case "/readyz":
                self._judge(self.server.health.unready())
            case _:
                self._answer(404, b"there are /metrics, /healthz and /readyz\n")

    def _judge(self, problem: str | None) -> None:
        self._answer(200 if problem is None else 503, f"{problem or 'ok'}\n".encode())

    def _answer(self, status: int, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class calls it so
        """Scrapes and probes come every few seconds: no lines for them."""
