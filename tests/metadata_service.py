"""What a machine of AWS gets its credentials from (IMDS), as a server that answers as a test says."""

import json
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

from loopback import LoopbackServer

_ROLE = {
    "Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": "test", "SecretAccessKey": "secret", "Token": "token",
    "LastUpdated": "2020-01-01T00:00:00Z", "Expiration": "2099-01-01T00:00:00Z",
}  # fmt: skip


class MetadataService(LoopbackServer):
    """`status`: what it answers; `seconds`: after what time."""

    def __init__(self) -> None:
        self.status, self.seconds = 200, 0.0
        self.seen: list[str] = []  # paths, in order
        super().__init__(_Handler)


class _Handler(BaseHTTPRequestHandler):
    owner: MetadataService

    def do_PUT(self) -> None:
        self._answer("session")

    def do_GET(self) -> None:
        self._answer("role" if self.path.endswith("security-credentials/") else json.dumps(_ROLE))

    def _answer(self, text: str) -> None:
        self.owner.seen.append(self.path)
        time.sleep(self.owner.seconds)
        try:
            self.send_response(self.owner.status)
            self.end_headers()
            self.wfile.write(text.encode())
        except OSError:  # nobody waits any longer
            pass

    def log_message(self, *_: Any) -> None:
        """Quiet."""
