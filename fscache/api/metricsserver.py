"""A TCP listener for Prometheus: `GET /metrics` and nothing else, no way to change anything."""

from __future__ import annotations

import logging
import socket
import socketserver
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler

from erofs.errors import NydusError
from fscache.api.exposition import exposition
from fscache.api.prometheus import CONTENT_TYPE
from fscache.node import NodeDaemon

__all__ = ["MetricsError", "MetricsServer"]

logger = logging.getLogger(__name__)


class MetricsError(NydusError):
    """The address cannot be listened on."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10
    server_version = "nydusd"
    sys_version = ""
    server: _Server

    def do_GET(self) -> None:
        """Answer with the metrics."""
        # One request for each connection: a client that stays away holds no thread for long.
        self.close_connection = True
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        body = exposition(self.server.daemon)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 -- of http.server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- of http.server
        """Log to our own log."""
        logger.debug("metrics: " + format, *args)


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    # Not `HTTPServer`: that one asks the DNS for its own name.
    daemon_threads = True
    allow_reuse_address = True
    daemon: NodeDaemon

    def handle_error(self, request: object, client_address: object) -> None:
        """Log a connection that broke off; the next one is served all the same."""
        logger.debug("metrics: connection from %s failed", client_address, exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


class MetricsServer:
    """Serves the metrics of one daemon on a TCP address until it is closed.

    `address` is where it listens, with the port that the kernel chose for port 0.

    Raises:
        MetricsError: the address is unknown or taken.
    """

    def __init__(self, address: tuple[str, int], daemon: NodeDaemon) -> None:
        try:
            family, *_, place = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
            kind = _Server6 if family == socket.AF_INET6 else _Server
            self._server = kind((str(place[0]), address[1]), _Handler)
        except OSError as error:
            where = f"{address[0]}:{address[1]}"
            reason = error.strerror or str(error)
            raise MetricsError(f"metrics cannot be served at {where} ({reason})") from error
        self._server.daemon = daemon
        self.address: tuple[str, int] = self._server.socket.getsockname()[:2]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.5,), name="metrics", daemon=True
        )
        self._thread.start()
        logger.info("metrics at %s, port %d", *self.address)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
