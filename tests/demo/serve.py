"""A small HTTP/1.1 server of a directory of blobs, with ranges, on loopback.

Also a program: `python -m tests.demo.serve DIRECTORY [PORT]`.
"""

from __future__ import annotations

import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

__all__ = ["BlobServer"]

_RANGE = re.compile(r"bytes=(\d{1,19})-(\d{1,19})")
_NAME = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z._-]{0,254}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are written apart; the delayed ACK of the one would hold the other.
    disable_nagle_algorithm = True
    timeout = 60
    server: BlobServer

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        name = self.path.rpartition("/")[2]
        path = self.server.directory / name
        if not _NAME.fullmatch(name) or not path.is_file():
            self._headers(404, 0)
            return
        with path.open("rb") as file:
            size = path.stat().st_size
            start, end = 0, size
            asked = _RANGE.fullmatch(self.headers.get("Range", ""))
            if asked is None:
                self._headers(200, size)
            else:
                start, end = int(asked[1]), min(int(asked[2]) + 1, size)
                if start >= end:
                    self._headers(416, 0)
                    return
                self._headers(206, end - start, f"bytes {start}-{end - 1}/{size}")
            if with_body:
                # Before the bytes: whoever got them finds them counted.
                self.server.count(end - start)
                self.connection.sendfile(file, start, end - start)

    def _headers(self, status: int, length: int, content_range: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if content_range is not None:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- of http.server
        pass


class BlobServer(ThreadingHTTPServer):
    """Serves `directory` at `address` from its making to `close`; counts what it gives.

    Raises `OSError` when the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, directory: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.directory = directory
        self.port: int = self.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._lock = threading.Lock()
        self._requests = self._bytes = 0
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def count(self, length: int) -> None:
        """Count one request for data."""
        with self._lock:
            self._requests += 1
            self._bytes += length

    def counters(self) -> tuple[int, int]:
        """Return how many requests for data came and how many bytes they were given."""
        with self._lock:
            return self._requests, self._bytes

    def close(self) -> None:
        """Stop serving."""
        self.shutdown()
        self.server_close()
        self._thread.join()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that hangs up is none of our business."""


def main(arguments: list[str]) -> int:
    """Serve until Ctrl-C."""
    if not 1 <= len(arguments) <= 2:
        print("usage: python -m tests.demo.serve DIRECTORY [PORT]", file=sys.stderr)
        return 2
    server = BlobServer(Path(arguments[0]), int(arguments[1]) if arguments[1:] else 0)
    print(f"serving {arguments[0]} at {server.address}, Ctrl-C ends", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
