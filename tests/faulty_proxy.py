"""An HTTP proxy before an S3 server that does to requests what a test scripts: the faults of real object stores."""

import http.client
import socket
import struct
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler
from typing import Literal, TypeAlias

from loopback import LoopbackServer

Fault: TypeAlias = int | Literal["pass", "reset", "reset_after", "truncate", "hang", "hang_after"]


class FaultyProxy(LoopbackServer):
    """Forwards to `port`. Each request whose method is in `methods` takes the next fault of `script`, then `always`.

    A number is answered in the store's place; `reset` and `hang` come before the store sees the request, their
    `…_after` once it has obeyed; `truncate` cuts the body short.
    """

    def __init__(self, port: int) -> None:
        self.upstream = port
        self.script: deque[Fault] = deque()
        self.always: Fault = "pass"
        self.methods = {"GET", "PUT", "HEAD"}
        self.seconds = dict[str, float]()  # method -> how long the store thinks
        self.seen: list[str] = []  # methods, in order
        self.connections = 0
        self.requests: list[tuple[str, str]] = []  # methods and paths, in order
        self.released = threading.Event()  # ends all hangs
        super().__init__(_Handler)

    def close(self) -> None:
        self.released.set()
        super().close()

    def next_fault(self, method: str) -> Fault:
        self.seen.append(method)
        if method not in self.methods:
            return "pass"
        return self.script.popleft() if self.script else self.always


class _Handler(BaseHTTPRequestHandler):
    owner: FaultyProxy
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.owner.requests.append((self.command, self.path.partition("?")[0]))
        self.owner.released.wait(self.owner.seconds.get(self.command, 0))
        fault = self.owner.next_fault(self.command)
        if isinstance(fault, int):
            self.answer(fault, [], b"")
        elif fault == "reset":
            self.reset()
        elif fault == "hang":
            self.hang()
        else:
            self.forward(body, fault)

    def __getattr__(self, name: str) -> object:
        if name.startswith("do_"):
            return self.handle_any
        raise AttributeError(name)

    def forward(self, body: bytes, fault: Fault) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.owner.upstream, timeout=10)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        if fault == "reset_after":
            self.reset()
        elif fault == "hang_after":
            self.hang()
        else:
            self.answer(answer.status, answer.getheaders(), data, cut=fault == "truncate")

    def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in {"content-length", "connection", "transfer-encoding"}:
                self.send_header(name, value)
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(data)))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def hang(self) -> None:
        self.owner.released.wait(30)
        self.close_connection = True

    def handle(self) -> None:
        self.owner.connections += 1
        try:
            super().handle()
        except OSError:  # the client hung up, or `reset` did
            self.close_connection = True

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):  # already closed by `reset`
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Quiet."""
