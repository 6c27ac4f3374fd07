"""Serves connections of the API by the library's HTTP server; `fscache.api.routes` says what."""

from __future__ import annotations

import json
import logging
import socket
import socketserver
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING

from fscache.api.message import Answer, Request
from fscache.api.routes import answer

if TYPE_CHECKING:
    from fscache.api.server import Daemon

__all__ = ["ConnectionServer"]

logger = logging.getLogger(__name__)

BODY_LIMIT = 51_200
DISCARD_LIMIT = 1 << 20


def _failure(message: str) -> Answer:
    return Answer(HTTPStatus.BAD_REQUEST, {"code": "UNDEFINED", "message": message})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    server: ConnectionServer

    def handle_one_request(self) -> None:
        """Wait for a request, however long: a client takes the end of an idle one for our death."""
        self.connection.settimeout(None)
        try:
            comes = self.rfile.peek(1)  # type: ignore[attr-defined]
        except ConnectionError:
            comes = b""
        if not comes:
            self.close_connection = True
            return
        self.connection.settimeout(self.timeout)
        super().handle_one_request()

    def _serve(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if (
            not length.isdecimal()
            or int(length) > BODY_LIMIT
            or "Transfer-Encoding" in self.headers
        ):
            self.close_connection = True
            # Taken in all the same, so that a client which still sends gets to the answer.
            if length.isdecimal():
                self.rfile.read(min(int(length), DISCARD_LIMIT))
            self._send(_failure("body is too large or of unknown length"))
            return
        body = self.rfile.read(int(length))
        self._send(answer(self.server.daemon, Request.parse(self.command, self.path, body)))

    do_GET = do_PUT = do_POST = do_DELETE = do_PATCH = _serve  # noqa: N815 -- names of http.server

    def _send(self, answer: Answer) -> None:
        lines = [
            f"HTTP/1.1 {answer.status.value} ",
            "Server: Nydus API",
            f"Connection: {'close' if self.close_connection else 'keep-alive'}",
        ]
        body = b""
        if answer.body is not None:
            body = (
                answer.body
                if isinstance(answer.body, bytes)
                else json.dumps(answer.body, separators=(",", ":")).encode()
            )
            lines += [f"Content-Type: {answer.content_type}", f"Content-Length: {len(body)}"]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def address_string(self) -> str:
        """Return who asks: a unix socket has no address."""
        return "api"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- of http.server
        """Log to our own log."""
        logger.debug("api: " + format, *args)


class ConnectionServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Serves connections, each in a thread; the listening socket stays the caller's.

    Args:
        listener: a socket that listens.
        daemon: whose API it is.
    """

    daemon_threads = True

    def __init__(self, listener: socket.socket, daemon: Daemon) -> None:
        super().__init__(listener.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.daemon = daemon
