"""The HTTP server of the API on a unix socket; what it answers is in `fscache.routes`."""

from __future__ import annotations

import json
import logging
import os
import socketserver
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from erofs.errors import NydusError
from fscache.apimessage import Answer, Request
from fscache.nbd.daemon import NbdDaemon
from fscache.node import NodeDaemon
from fscache.routes import answer
from fscache.singleton import SingletonDaemon
from fscache.unixsocket import is_served

__all__ = ["ApiError", "ApiServer"]

logger = logging.getLogger(__name__)

BODY_LIMIT = 51_200
DISCARD_LIMIT = 1 << 20


class ApiError(NydusError):
    """The socket cannot be served."""


def _failure(message: str) -> Answer:
    return Answer(HTTPStatus.BAD_REQUEST, {"code": "UNDEFINED", "message": message})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    server: _Server

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


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    daemon: NodeDaemon | SingletonDaemon | NbdDaemon


class ApiServer:
    """Serves the API of one daemon until it is closed; the socket file goes with it.

    Raises:
        ApiError: the socket cannot be made, or another process serves it.
    """

    def __init__(self, path: Path, daemon: NodeDaemon | SingletonDaemon | NbdDaemon) -> None:
        self._path = path
        try:
            if path.is_socket():
                if is_served(path):
                    raise ApiError("another process serves this socket", path=path)
                path.unlink()
            self._server = _Server(str(path), _Handler)
            os.chmod(path, 0o600)  # noqa: PTH101 -- not a link that we made ourselves
        except OSError as error:
            reason = error.strerror or str(error)
            raise ApiError(f"API socket cannot be made ({reason})", path=path) from error
        self._server.daemon = daemon
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="api", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving and remove the socket file."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._path.unlink(missing_ok=True)
