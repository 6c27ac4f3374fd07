"""A real HTTP/1.1 server of blobs with ranges on loopback, which misbehaves on request."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_request(self, code="-", size="-"):
        pass

    def log_error(self, *args):
        pass

    def address_string(self):
        return "client"

    def setup(self):
        # Head and body are written one after the other.
        self.disable_nagle_algorithm = self.request.family == socket.AF_INET
        super().setup()
        fake = self.server.fake
        with fake.lock:
            fake.connections += 1
            fake.sockets.add(self.connection)

    def finish(self):
        with self.server.fake.lock:
            self.server.fake.sockets.discard(self.connection)
        super().finish()

    def do_HEAD(self):
        blob = self.server.fake.find(self.path)
        if blob is None:
            self._status(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(blob)))
        self.end_headers()

    def do_GET(self):
        fake = self.server.fake
        blob_id = self.path.rsplit("/", 1)[-1]
        with fake.lock:
            fake.requests[blob_id] += 1
            fake.ranges.append((blob_id, self.headers.get("Range")))
            fake.headers.append(dict(self.headers))
        fault = fake.take_fault()
        if isinstance(fault, int):
            self._status(fault)
            return
        if fault == "reset":
            self._reset()
            return
        if fault == "stall":
            fake.released.wait(300)
            self.close_connection = True
            return
        blob = fake.find(self.path)
        if blob is None:
            self._status(404)
            return
        self._send_range(fake, blob_id, blob, fault)

    def _send_range(self, fake, blob_id, blob, fault):
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if fault == "ignore-range" or match is None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(blob)))
            self.end_headers()
            if fault == "truncate":
                self._write(fake, blob_id, blob[: len(blob) // 2])
                self.close_connection = True
            else:
                self._write(fake, blob_id, blob)
            return
        first, last = int(match[1]), min(int(match[2] or len(blob)), len(blob) - 1)
        if first >= len(blob):
            self._status(416)
            return
        body = blob[first : last + 1]
        shift = 4096 if fault == "wrong-range" else 0
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first + shift}-{last + shift}/{len(blob)}")
        if fault == "long":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            body += b"x"
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
            return
        if fault == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
            return
        if fault == "long-length":
            body += b"x"
        elif fault == "short-length":
            body = body[:-1]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "truncate":
            self._write(fake, blob_id, body[: len(body) // 2])
            self.close_connection = True
        elif fault == "drip":
            for byte in body:
                self.wfile.write(bytes([byte]))
                if fake.released.wait(0.02):
                    break
            self.close_connection = True
        else:
            self._write(fake, blob_id, body)

    def _write(self, fake, blob_id, body):
        self.wfile.write(body)
        with fake.lock:
            fake.bytes_sent[blob_id] += len(body)

    def _status(self, status):
        self.send_response(status)
        if status == 429 and self.server.fake.retry_after is not None:
            self.send_header("Retry-After", self.server.fake.retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A client that finds the queue full tries again after a second.
    request_queue_size = 128
    fake: BlobServer

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests


class _UnixServer(_Server):
    address_family = socket.AF_UNIX

    def server_bind(self):
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "localhost", 0

    def get_request(self):
        sock, _ = super().get_request()
        return sock, ("local", 0)


class BlobServer:
    """Serves `blobs` under any prefix; `fault` and `fault_count` say what goes wrong.

    Faults: a status number, or truncate, stall, reset, drip, ignore-range, wrong-range, long,
    long-length, short-length; `chunked` is no fault. `fault_count` None means always.
    """

    handler: type[Handler] = Handler

    def __init__(
        self,
        blobs: dict[str, bytes] | None = None,
        unix: Path | None = None,
        tls: ssl.SSLContext | None = None,
    ):
        self.blobs = dict(blobs or {})
        self.lock = threading.Lock()
        self.requests: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()
        self.ranges: list[tuple[str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        self.connections = 0
        self.sockets: set[socket.socket] = set()
        self.fault: int | str | None = None
        self.fault_count: int | None = None
        self.released = threading.Event()
        self.retry_after: str | None = None
        self._unix = unix
        self._tls = tls
        self._address = ("127.0.0.1", 0)
        if unix is None:
            # Bound as long as this object lives, and never listening: nobody else gets the port.
            self._kept = socket.socket()
            self._kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._kept.bind(self._address)
            self._address = self._kept.getsockname()
        self.start()

    def start(self):
        """Listen, after `stop` at the same address."""
        if self._unix is not None:
            self._unix.unlink(missing_ok=True)
            self._server: _Server = _UnixServer(str(self._unix), self.handler)
        else:
            self._server = _Server(self._address, self.handler)
        if self._tls is not None:
            # The handshake belongs to the connection's own thread.
            self._server.socket = self._tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._server.fake = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self._thread.start()

    def stop(self):
        """Be dead: no listener, and connections closed."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        with self.lock:
            for sock in self.sockets:
                with contextlib.suppress(OSError):  # already closed by the client
                    sock.shutdown(socket.SHUT_RDWR)
        self.released.set()

    @property
    def address(self) -> str:
        if self._unix is not None:
            return str(self._unix)
        return f"{'https' if self._tls else 'http'}://{self.host}"

    @property
    def host(self) -> str:
        return "{}:{}".format(*self._address)

    def find(self, path: str) -> bytes | None:
        return self.blobs.get(path.rsplit("/", 1)[-1])

    def take_fault(self) -> int | str | None:
        with self.lock:
            if self.fault is None or self.fault_count == 0:
                return None
            if self.fault_count is not None:
                self.fault_count -= 1
            return self.fault

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
