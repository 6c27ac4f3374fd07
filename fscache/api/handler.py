"""Serves connections of the API; `fscache.api.routes` says what.

Heads of requests are read here, not by `http.server`: that and the mail parser below it take 15 ms
to load, for which a client that has just started the daemon would wait.
"""

from __future__ import annotations

import json
import logging
import socket
import socketserver
from collections.abc import Iterator
from http import HTTPStatus
from io import BufferedIOBase
from typing import TYPE_CHECKING, NamedTuple

from fscache.api.message import Answer, Request
from fscache.api.routes import answer

if TYPE_CHECKING:
    from fscache.api.server import Daemon

__all__ = ["ConnectionServer"]

logger = logging.getLogger(__name__)

HEAD_LIMIT = 65_536
BODY_LIMIT = 51_200
DISCARD_LIMIT = 1 << 20
_LENGTH_DIGITS = 20
_METHODS = frozenset({"GET", "PUT", "POST", "DELETE", "PATCH"})
_VERSIONS = ("HTTP/1.0", "HTTP/1.1")


class _BadRequest(Exception):
    """Bytes that are no request, or not one that is served."""


class _Head(NamedTuple):
    """What a request begins with; names of fields in small letters."""

    method: str
    target: str
    version: str
    fields: dict[str, str]

    @property
    def keeps(self) -> bool:
        """Whether the client wants to go on with the connection."""
        said = self.fields.get("connection", "").lower()
        return said == "keep-alive" if self.version == "HTTP/1.0" else said != "close"


def _lines(file: BufferedIOBase) -> Iterator[str]:
    """Yield the lines of a head without their ends; raise `_BadRequest`."""
    left, begun = HEAD_LIMIT, False
    while line := file.readline(left):
        left -= len(line)
        if not line.endswith(b"\n"):
            break
        text = line.rstrip(b"\r\n").decode("latin-1")
        if text:
            yield text
        elif begun:
            return
        begun = begun or bool(text)
    raise _BadRequest("head is too long, or ends too early")


def _read_head(file: BufferedIOBase) -> _Head:
    """Read the head of a request; raise `_BadRequest`."""
    first, *rest = _lines(file)
    words = first.split(" ")
    if len(words) != 3 or words[2] not in _VERSIONS:
        raise _BadRequest("no request of HTTP/1.1")
    if words[0] not in _METHODS:
        raise _BadRequest("unsupported method")
    fields: dict[str, str] = {}
    for line in rest:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise _BadRequest("wrong header field")
        name, value = name.lower(), value.strip()
        if fields.setdefault(name, value) != value and name == "content-length":
            raise _BadRequest("two lengths of the body")
    return _Head(words[0], words[1], words[2], fields)


def _parse(head: _Head, body: bytes) -> Request:
    """Return the request; raise `_BadRequest`."""
    try:
        return Request.parse(head.method, head.target, body)
    except ValueError as error:
        raise _BadRequest("wrong target") from error


def _failure(message: str) -> Answer:
    return Answer(HTTPStatus.BAD_REQUEST, {"code": "UNDEFINED", "message": message})


class _Handler(socketserver.StreamRequestHandler):
    timeout = 60
    server: ConnectionServer

    def handle(self) -> None:
        """Answer one request after the other until the client, or a time limit, ends that."""
        try:
            while self._comes() and self._serve():
                pass
        except OSError as error:
            logger.debug("api: %s", error)

    def _comes(self) -> bool:
        """Wait for a request, however long: a client takes the end of an idle one for our death."""
        self.connection.settimeout(None)
        comes = bool(self.rfile.peek(1))  # type: ignore[attr-defined]
        self.connection.settimeout(self.timeout)
        return comes

    def _serve(self) -> bool:
        """Answer a request; return whether another one may follow."""
        try:
            head = _read_head(self.rfile)
            body = self._body(head)
            request = _parse(head, body)
        except _BadRequest as error:
            self._send(_failure(str(error)), keeps=False)
            return False
        said = answer(self.server.daemon, request)
        self._send(said, keeps=head.keeps)
        return head.keeps

    def _body(self, head: _Head) -> bytes:
        """Read the body of a request; raise `_BadRequest`."""
        length = head.fields.get("content-length", "0")
        # A number of thousands of digits is none for `int`.
        size = int(length) if length.isdecimal() and len(length) < _LENGTH_DIGITS else None
        if size is None or size > BODY_LIMIT or "transfer-encoding" in head.fields:
            # Taken in all the same, so that a client which still sends gets to the answer.
            if size is not None:
                self.rfile.read(min(size, DISCARD_LIMIT))
            raise _BadRequest("body is too large or of unknown length")
        if head.fields.get("expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 \r\n\r\n")
        return self.rfile.read(size)

    def _send(self, answer: Answer, *, keeps: bool) -> None:
        lines = [
            f"HTTP/1.1 {answer.status.value} ",
            "Server: Nydus API",
            f"Connection: {'keep-alive' if keeps else 'close'}",
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

    def handle_error(self, request: object, client_address: object) -> None:
        """Log what ended a connection without an answer, which nobody expects."""
        logger.error("api: a request was not answered", exc_info=True)
