"""Backend `http-proxy`: blobs as `<path>/<blob id>` of an HTTP server, TCP, TLS or unix socket.

Strict about answers: only the range that was asked for is ever accepted, and a whole blob is
never read by accident. Repetition is the caller's (`fscache.backend.retry`).
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import IncompleteRead
from typing import Any
from urllib.parse import quote

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, Timeout
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError, LocationParseError, SSLError
from urllib3.response import BaseHTTPResponse
from urllib3.util import parse_url

from fscache.backend.base import (
    AuthError,
    BackendError,
    BackendMetrics,
    HttpProxyConfig,
    NotFound,
    ShortRead,
    Unavailable,
    check_blob_id,
)

__all__ = ["HttpProxyBackend", "HttpReader"]

USER_AGENT = "nydusd/1.0.0"
# Idle connections that are kept: at least one for each thread that reads.
POOL_CONNECTIONS = 64
# The deadline of a transfer is looked at between pieces of at most this many bytes.
PIECE_BYTES = 1 << 18

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(?:\d{1,19}|\*)")
_CONTENT_LENGTH = re.compile(r"\d{1,19}")


class _UnixConnection(HTTPConnection):
    """An HTTP connection over a unix socket."""

    def __init__(self, *args: Any, socket_path: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._socket_path = socket_path

    def connect(self) -> None:
        """Connect; raise `OSError`, which the pool turns into its own errors."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # A non-blocking connect fails at once when the listener's queue is full; this
            # bounds a blocking one. The pool always sets a number.
            limit = struct.pack("ll", *divmod(round(float(self.timeout or 0) * 1e6), 10**6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            sock.connect(self._socket_path)
            sock.settimeout(self.timeout)
        except BaseException:
            sock.close()
            raise
        self.sock = sock


class _UnixPool(HTTPConnectionPool):
    ConnectionCls = _UnixConnection


def _tls_context(config: HttpProxyConfig) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for path in config.ca_cert_files:
        try:
            context.load_verify_locations(cafile=path)
        except (OSError, ssl.SSLError) as error:
            raise BackendError(f"cannot load certificates ({error})", path=path) from error
    if config.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _open_pool(config: HttpProxyConfig) -> tuple[HTTPConnectionPool, str]:
    """Return the connections and the path prefix of the address."""
    options: dict[str, Any] = {
        "timeout": Timeout(connect=config.connect_timeout, read=config.timeout),
        "maxsize": POOL_CONNECTIONS,
        "retries": False,
    }
    if config.addr.startswith("/"):
        return _UnixPool("localhost", socket_path=config.addr, **options), ""
    try:
        url = parse_url(config.addr)
    except LocationParseError as error:
        raise BackendError("http-proxy address is not an address") from error
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise BackendError("http-proxy address is neither http(s)://host nor an absolute path")
    if url.auth is not None:
        raise BackendError("http-proxy address with credentials is not supported")
    prefix = (url.path or "").rstrip("/")
    if url.scheme == "http":
        return HTTPConnectionPool(url.host, url.port, **options), prefix
    if config.skip_verify:
        options.update(cert_reqs="CERT_NONE", assert_hostname=False)
    context = _tls_context(config)
    return HTTPSConnectionPool(url.host, url.port, ssl_context=context, **options), prefix


def _status_error(status: int) -> BackendError:
    if status in (404, 410):
        return NotFound("no such blob", got=f"status {status}")
    if status in (401, 403):
        return AuthError("not permitted", got=f"status {status}")
    if status in (408, 429) or status >= 500:
        return Unavailable("server refuses", temporary=True, got=f"status {status}")
    if status == 416:
        return BackendError("range outside of the stored blob", got="status 416")
    return BackendError("unexpected answer", got=f"status {status}")


class HttpReader:
    """Reads ranges of one blob by HTTP."""

    def __init__(
        self,
        blob_id: str,
        url: str,
        pool: HTTPConnectionPool,
        metrics: BackendMetrics,
        transfer_timeout: float,
    ) -> None:
        self.blob_id = blob_id
        self._url = url
        self._pool = pool
        self._metrics = metrics
        self._transfer_timeout = transfer_timeout

    @contextmanager
    def _request(self, method: str, **headers: str) -> Iterator[BaseHTTPResponse]:
        """Give the answer whose body was not read; a block that raises drops the connection."""
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **headers}
        try:
            response = self._pool.urlopen(
                method,
                self._url,
                headers=headers,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
            try:
                yield response
            except BaseException:
                response.close()
                raise
            finally:
                response.release_conn()
        except BackendError:
            raise  # NotFound is an OSError, too.
        except SSLError as error:
            cause = error.args[0] if error.args else error
            temporary = not isinstance(cause, ssl.SSLCertVerificationError)
            raise Unavailable(f"TLS failure ({cause})", temporary=temporary) from error
        except (HTTPError, OSError) as error:
            if isinstance(error.__cause__, IncompleteRead):
                raise ShortRead("connection closed within the body", temporary=True) from error
            raise Unavailable(f"no answer ({error})", temporary=True) from error

    def size(self) -> int:
        """Return the length of the stored blob in bytes, by HEAD; raise `BackendError`."""
        try:
            with self._request("HEAD") as response:
                if response.status != 200:
                    raise _status_error(response.status)
                length = response.headers.get("Content-Length", "")
                if not _CONTENT_LENGTH.fullmatch(length):
                    raise BackendError("answer without a length", got=ascii(length))
                return int(length)
        except BackendError as error:
            error.add_context(blob=self.blob_id)
            raise

    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes from `offset`; raise `BackendError`.

        Answers other than 206 with exactly this range are refused unread.
        """
        if length == 0:
            return b""
        try:
            with (
                self._metrics.measure(length),
                self._request("GET", Range=f"bytes={offset}-{offset + length - 1}") as response,
            ):
                _check_partial(response, offset, length)
                return self._read_body(response, length)
        except BackendError as error:
            error.add_context(blob=self.blob_id, offset=offset)
            raise

    def _read_body(self, response: BaseHTTPResponse, length: int) -> bytes:
        end = time.monotonic() + self._transfer_timeout
        pieces: list[bytes] = []
        missing = length
        while missing:
            piece = response.read1(min(missing, PIECE_BYTES))
            if not piece:
                raise ShortRead(
                    "body ends too early",
                    temporary=True,
                    expected=f"{length} bytes",
                    got=length - missing,
                )
            pieces.append(piece)
            missing -= len(piece)
            if missing and time.monotonic() > end:
                raise Unavailable(
                    "transfer too slow",
                    temporary=True,
                    expected=f"{length} bytes in {self._transfer_timeout} s",
                    got=length - missing,
                )
        # Only a body without Content-Length can go on here; the other kind was checked before.
        if response.read1(1):
            raise BackendError("body longer than the range", expected=f"{length} bytes")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _check_partial(response: BaseHTTPResponse, offset: int, length: int) -> None:
    """Raise `BackendError` unless the head promises exactly the range."""
    if response.status == 200:
        raise BackendError("server ignores ranges", expected="status 206", got="status 200")
    if response.status != 206:
        raise _status_error(response.status)
    text = response.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(text)
    wanted = f"bytes {offset}-{offset + length - 1}"
    if match is None or int(match[1]) != offset or int(match[2]) >= offset + length:
        raise BackendError("wrong Content-Range", expected=wanted, got=ascii(text))
    if int(match[2]) < offset + length - 1:
        raise ShortRead("stored blob ends too early", expected=wanted, got=text)
    promised = response.headers.get("Content-Length")
    if promised is None:
        return
    if not _CONTENT_LENGTH.fullmatch(promised) or int(promised) > length:
        raise BackendError("wrong Content-Length", expected=length, got=ascii(promised))
    if int(promised) < length:
        raise ShortRead(
            "body shorter than the range", temporary=True, expected=length, got=promised
        )


class HttpProxyBackend:
    """Blobs of an HTTP server (tools 4.4, type `http-proxy`)."""

    def __init__(self, config: HttpProxyConfig) -> None:
        self.metrics = BackendMetrics("http-proxy")
        self._transfer_timeout = config.transfer_timeout
        self._pool, prefix = _open_pool(config)
        path = config.path.strip("/")
        self._prefix = f"{prefix}/{quote(path)}" if path else prefix

    def open(self, blob_id: str) -> HttpReader:
        """Return a reader; raise `BackendError` for an id that is refused."""
        check_blob_id(blob_id)
        url = f"{self._prefix}/{quote(blob_id, safe='')}"
        return HttpReader(blob_id, url, self._pool, self.metrics, self._transfer_timeout)

    def close(self) -> None:
        """Close idle connections; one in use is closed by its reader."""
        self._pool.close()
