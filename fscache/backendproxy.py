"""The HTTP server of `nydus-backend-proxy`: files of one directory as the blobs of a registry.

It answers HEAD and GET, whole or one range, of `/v2/<repository>/blobs/sha256:<name>` and of
`/<name>` (tools section 14). It only reads, and only regular files directly in the directory.
Flags, environment and signals are the business of `fscache.cli.backendproxy`.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import socket
import socketserver
import stat
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import FileIO
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path, PurePath
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from erofs.errors import NydusError
from fscache.backend.base import BackendError, check_blob_id

__all__ = ["BackendProxy", "ByteRange", "ProxyError", "Refusal", "Target", "parse_range"]

logger = logging.getLogger(__name__)

IDLE_SECONDS = 60
GRACE_SECONDS = 5.0
MAX_CONNECTIONS = 4096
# A connection that is served has its socket, the file and the look at the file.
_CONNECTION_FILES = 3
_RESERVED_FILES = 64
_LOGGED_CHARACTERS = 200

_DIGEST_PREFIX = "sha256:"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_AUTHORITY = re.compile(rb"(?i:https?)://[^/?]*")
_RANGE = re.compile(r"([0-9]{0,20})-([0-9]{0,20})")


class ProxyError(NydusError):
    """The directory cannot be served, or not at this address."""


class Refusal(NydusError):
    """A request that gets an error status.

    Args:
        status: what the client is told.
        what: the reason, one clause.
    """

    def __init__(self, status: HTTPStatus, what: str) -> None:
        super().__init__(what)
        self.status = status


class ByteRange(NamedTuple):
    """A part of a file, never empty: offset of its first byte and length in bytes."""

    first: int
    length: int


def parse_range(text: str, size: int) -> ByteRange | None:
    """Return the first range of a Range header that touches a file of `size` bytes.

    None stands for what gets status 416: text that is not a list of byte ranges (RFC 9110
    section 14.1.2), and ranges of which none touches the file.
    """
    unit, _, specifiers = text.partition("=")
    if unit.lower() != "bytes":
        return None
    found: ByteRange | None = None
    for specifier in specifiers.split(","):
        match = _RANGE.fullmatch(specifier.strip(" \t"))
        if match is None or match[0] == "-":
            return None
        if not match[1]:
            length = min(int(match[2]), size)
            part = ByteRange(size - length, length)
        else:
            first = int(match[1])
            end = min(int(match[2]) + 1, size) if match[2] else size
            part = ByteRange(first, end - first)
        if found is None and part.length > 0:
            found = part
    return found


class Target(NamedTuple):
    """What a request asks for: a file name, and whether as a blob or as a plain file."""

    name: str
    is_blob: bool

    @classmethod
    def parse(cls, data: bytes) -> Target:
        """Return what a request target means; raise `Refusal`.

        Components are decoded one by one, so an encoded slash stays inside of its component,
        where it is refused like empty components and those that begin with a dot.
        """
        path = _AUTHORITY.sub(b"", data, count=1) if data[:1] != b"/" else data
        first, *encoded = path.partition(b"?")[0].split(b"/")
        if first or not encoded:
            raise Refusal(HTTPStatus.BAD_REQUEST, "target is not a path")
        if encoded == [b""]:
            raise Refusal(HTTPStatus.NOT_FOUND, "directories are not listed")
        parts = [_checked(os.fsdecode(unquote_to_bytes(part))) for part in encoded]
        if len(parts) == 1:
            return cls(parts[0], is_blob=False)
        if len(parts) < 4 or parts[-2] != "blobs":
            raise Refusal(HTTPStatus.NOT_FOUND, "neither a file nor a blob of a repository")
        if not parts[-1].startswith(_DIGEST_PREFIX):
            raise Refusal(HTTPStatus.BAD_REQUEST, "digest does not begin with sha256:")
        return cls(_checked(parts[-1].removeprefix(_DIGEST_PREFIX)), is_blob=True)

    def fields(self) -> dict[str, str]:
        """Return the header fields that are the same for all answers with this file."""
        fields = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        # Other names are no digests, and might hold line ends.
        if self.is_blob and _DIGEST.fullmatch(self.name):
            fields["Docker-Content-Digest"] = _DIGEST_PREFIX + self.name
        return fields


def _checked(part: str) -> str:
    try:
        return check_blob_id(part)
    except BackendError as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, "refused path component") from error


def _open_inside(directory: int, name: str) -> FileIO:
    """Open a regular file of the directory, which is an open descriptor; raise `Refusal`.

    O_PATH looks without side effects, so FIFOs and devices do no harm. What was found is what
    is judged and what is opened, whatever happens to links in between.
    """
    try:
        found = os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=directory)
        try:
            if not stat.S_ISREG(os.fstat(found).st_mode):
                raise Refusal(HTTPStatus.NOT_FOUND, "not a regular file")
            place = PurePath(os.readlink(f"/proc/self/fd/{found}"))
            if not place.is_relative_to(os.readlink(f"/proc/self/fd/{directory}")):
                raise Refusal(HTTPStatus.NOT_FOUND, "link leads out of the directory")
            return FileIO(os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC))
        finally:
            os.close(found)
    except FileNotFoundError as error:
        raise Refusal(HTTPStatus.NOT_FOUND, "no such file") from error
    except PermissionError as error:
        raise Refusal(HTTPStatus.FORBIDDEN, "file is not readable") from error
    except OSError as error:
        reason = f"file cannot be opened ({error.strerror})"
        raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, reason) from error


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True
    server: _Server

    def _serve(self) -> None:
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            # The body is not read, and must not be taken for the next request.
            self.close_connection = True
        try:
            target = Target.parse(self.path.encode("latin-1"))
            with _open_inside(self.server.directory, target.name) as file:
                self._send_file(target, file)
        except Refusal as refusal:
            self._refuse(refusal.status, refusal.what, {})

    def _refuse_method(self) -> None:
        self.close_connection = True
        allowed = {"Allow": "GET, HEAD"}
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "blobs are only read here", allowed)

    do_GET = do_HEAD = _serve  # noqa: N815 -- names of http.server
    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse_method  # noqa: N815 -- the same

    def _send_file(self, target: Target, file: FileIO) -> None:
        size = os.fstat(file.fileno()).st_size
        fields = target.fields()
        status, part = HTTPStatus.OK, ByteRange(0, size)
        wanted = self.headers.get_all("Range", [])
        # There are no validators here, so none that If-Range names can match.
        if wanted and self.command == "GET" and "If-Range" not in self.headers:
            parsed = parse_range(",".join(wanted), size)
            if parsed is None:
                outside = {"Content-Range": f"bytes */{size}"}
                self._refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "bad range", outside)
                return
            status, part = HTTPStatus.PARTIAL_CONTENT, parsed
            last = part.first + part.length - 1
            fields["Content-Range"] = f"bytes {part.first}-{last}/{size}"
        with_body = self.command == "GET" and part.length > 0
        # The head waits for the first bytes of the body, to leave in the same packet.
        self._send_head(status, part.length, fields, socket.MSG_MORE if with_body else 0)
        if with_body and self.connection.sendfile(file, part.first, part.length) < part.length:
            self.close_connection = True
            logger.warning("%s: became shorter while it was sent", ascii(target.name))

    def _send_head(
        self, status: HTTPStatus, length: int, fields: dict[str, str], flags: int = 0
    ) -> None:
        if self.server.stopping:
            self.close_connection = True
        lines = [
            f"HTTP/1.1 {status.value} {status.phrase}",
            "Server: nydus-backend-proxy",
            f"Date: {self.date_time_string()}",
            f"Connection: {'close' if self.close_connection else 'keep-alive'}",
            f"Content-Length: {length}",
            *(f"{name}: {value}" for name, value in fields.items()),
        ]
        self.connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"), flags)

    def _refuse(self, status: HTTPStatus, reason: str, fields: dict[str, str]) -> None:
        level = logging.WARNING if status >= HTTPStatus.INTERNAL_SERVER_ERROR else logging.INFO
        request = ascii(self.requestline[:_LOGGED_CHARACTERS])
        logger.log(level, "%s: %s: %d, %s", self.client_address[0], request, status, reason)
        body = f"{reason}\n".encode()
        self._send_head(status, len(body), {"Content-Type": "text/plain", **fields})
        if self.command != "HEAD":
            self.connection.sendall(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what http.server itself refuses, and hang up."""
        self.close_connection = True
        # The message may quote the client, the log has the request line anyway.
        self._refuse(HTTPStatus(code), HTTPStatus(code).phrase, {})

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- of http.server
        """Log what http.server has to say: connections that were idle for too long."""
        logger.debug(format, *args)


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 1024

    def __init__(self, address: IPv4Address | IPv6Address, port: int, directory: int) -> None:
        self.directory = directory
        self.stopping = False
        self._limit = _connection_limit()
        self._connections: set[socket.socket] = set()
        self._changed = threading.Condition()
        if address.version == 6:
            self.address_family = socket.AF_INET6
        super().__init__((str(address), port), _Handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Count a connection in, or refuse one more than there can be."""
        with self._changed:
            if len(self._connections) < self._limit:
                self._connections.add(request)
                return True
        logger.warning("%s: refused, %d connections are open", client_address[0], self._limit)
        return False

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and count it out."""
        super().shutdown_request(request)
        with self._changed:
            self._connections.discard(request)
            self._changed.notify_all()

    def hang_up(self, how: int, seconds: float) -> bool:
        """Shut all connections down, and return whether they ended within the time."""
        with self._changed:
            for connection in self._connections:
                try:
                    connection.shutdown(how)
                except OSError as error:
                    logger.debug("connection is gone already (%s)", error)
            return self._changed.wait_for(lambda: not self._connections, seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what ended a connection: a line, or with its traceback what nobody expects."""
        error = sys.exception()
        if isinstance(error, ConnectionError):
            logger.debug("%s: hung up (%s)", client_address[0], error)
        elif isinstance(error, OSError):
            logger.warning("%s: connection failed (%s)", client_address[0], error)
        else:
            logger.error("%s: unexpected failure", client_address[0], exc_info=error)


def _connection_limit() -> int:
    """Return how many connections the limit of open files allows."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, (soft - _RESERVED_FILES) // _CONNECTION_FILES))


class BackendProxy:
    """Serves the files of one directory until it is closed.

    Args:
        directory: holds the blobs, named by their ids; files may come and go.
        address: where to listen.
        port: TCP port; 0 takes a free one.

    Raises:
        ProxyError: the directory cannot be read, or the address is not to be had.
    """

    def __init__(self, directory: Path, address: IPv4Address | IPv6Address, port: int) -> None:
        try:
            self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ProxyError(
                f"directory cannot be read ({error.strerror})", path=directory
            ) from error
        try:
            self._server = _Server(address, port, self._directory)
        except OSError as error:
            os.close(self._directory)
            reason = error.strerror or str(error)
            raise ProxyError(f"cannot listen on {address} port {port} ({reason})") from error
        host = f"[{address}]" if address.version == 6 else str(address)
        self.url = f"http://{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="accept", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening, let answers that are under way end within 5 s, then hang up."""
        self._server.stopping = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        # The end of input ends an idle connection at once, and a busy one after its answer.
        ended = self._server.hang_up(socket.SHUT_RD, GRACE_SECONDS)
        if ended or self._server.hang_up(socket.SHUT_RDWR, GRACE_SECONDS):
            os.close(self._directory)
