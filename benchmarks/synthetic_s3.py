"""An S3 server of one bucket whose objects are manifests that exist nowhere: their bytes are made when asked for.

    python -m benchmarks.synthetic_s3 PORT [SECONDS]

`s3://bench/rows-<N>.jsonl` has N rows of ROW_BYTES bytes each. The server knows HeadObject and GetObject with Range and
If-Match, which is all that reading a manifest takes. SECONDS: what each GET waits, as one to a store far away does.
"""

import re
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

ROW_BYTES = 100
_LINE = b'{"image": "s3://bench/photos/%09d.jpg", "id": "r%09d", "prompt": "a photo of a big city"}'
_BLOCK = 10_000  # rows; their last four digits are always the same ones
_KEY = re.compile(r"/bench/rows-([1-9]\d{0,8})\.jsonl")
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


def _block() -> "tuple[np.ndarray[Any, Any], list[int]]":
    """The first block of rows as (rows, bytes), and the columns where the numbers in it begin."""
    lines = [(_LINE % (n, n)).ljust(ROW_BYTES - 1) + b"\n" for n in range(_BLOCK)]
    marks = (_LINE % (123456789, 123456789)).decode()
    starts = [found.start() for found in re.finditer("123456789", marks)]
    return np.frombuffer(b"".join(lines), np.uint8).reshape(_BLOCK, ROW_BYTES).copy(), starts


_FIRST, _NUMBERS = _block()


def rows(start: int, end: int) -> Iterator[bytes]:
    """Bytes [start, end) of the endless manifest."""
    size = _BLOCK * ROW_BYTES
    for number in range(start // size, -(-end // size)):
        block = _FIRST.copy()
        high = np.frombuffer(b"%05d" % number, np.uint8)
        for column in _NUMBERS:
            block[:, column : column + 5] = high
        base = number * size
        yield block.tobytes()[max(0, start - base) : end - base]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wait = 0.0  # seconds, of each GET

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        found = _KEY.fullmatch(self.path.partition("?")[0])
        if found is None:
            self._headers(404, 0)
            return
        size, etag = int(found[1]) * ROW_BYTES, f'"{found[1]}"'
        if self.headers.get("If-Match", etag) != etag:
            self._headers(412, 0)
            return
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        start, end = (int(asked[1]), min(size, int(asked[2]) + 1)) if asked else (0, size)
        more = {"Content-Range": f"bytes {start}-{end - 1}/{size}"} if asked else {}
        self._headers(206 if asked else 200, end - start, {"ETag": etag, **more})
        time.sleep(self.wait if body else 0)
        for part in rows(start, end) if body else ():
            self.wfile.write(part)

    def _headers(self, status: int, length: int, more: "dict[str, str] | None" = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Last-Modified", "Tue, 24 Nov 2026 00:00:00 GMT")
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing: there are thousands of requests."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True


if __name__ == "__main__":
    _Handler.wait = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    _Server(("127.0.0.1", int(sys.argv[1])), _Handler).serve_forever()
