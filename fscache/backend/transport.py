"""HTTP requests of all network backends: connections, time limits, answers, and their errors.

Exceptions of the HTTP library end here. Texts of errors name host and port only, never a path,
a query or a header: those may hold secrets. Nothing here repeats a request or follows a redirect.
"""

from __future__ import annotations

import email.utils
import encodings.idna  # noqa: F401 -- of names of hosts: the first request would load it
import logging
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.client import IncompleteRead
from types import TracebackType
from typing import Any, Self

import urllib3
from urllib3 import HTTPConnectionPool, HTTPHeaderDict, PoolManager, Timeout
from urllib3.connection import HTTPConnection
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    InsecureRequestWarning,
    NameResolutionError,
    NewConnectionError,
    ProxyError,
    ReadTimeoutError,
    SSLError,
)
from urllib3.response import BaseHTTPResponse

from fscache.backend.base import BackendError, ShortRead, Unavailable
from fscache.backend.sender import Body, Sender, TlsFailure, host_of
from fscache.backend.settings import NetworkConfig

__all__ = ["Answer", "Transport", "failure", "pool_options", "tls_context"]

USER_AGENT = "nydusd/1.0.0"
# Idle connections to one host that are kept: at least one for each thread that reads.
POOL_CONNECTIONS = 64
# Hosts whose idle connections are kept: the backend, its storage, its token service.
POOL_HOSTS = 16
# The deadline of a transfer is looked at between pieces of at most this many bytes.
PIECE_BYTES = 1 << 18
# A rest of an unwanted body up to this size is read, so that its connection can be kept.
DRAIN_BYTES = 1 << 16

# The library's own log quotes addresses whole; what concerns a backend is logged by the backend.
logging.getLogger("urllib3").setLevel(logging.ERROR)

_NUMBER = re.compile(r"\d{1,19}")
_MAX_RETRY_AFTER = 3600.0


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


def tls_context(config: NetworkConfig) -> ssl.SSLContext:
    """Return what connections with TLS trust; raise `BackendError` for bad certificate files."""
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


_POOLS: dict[str, Any] = {"num_pools": POOL_HOSTS, "maxsize": POOL_CONNECTIONS}


def pool_options(config: NetworkConfig) -> dict[str, Any]:
    """Return the options of a pool manager; raise `BackendError` for bad certificate files."""
    options: dict[str, Any] = {**_POOLS, "ssl_context": tls_context(config)}
    if config.skip_verify:
        urllib3.disable_warnings(InsecureRequestWarning)
        options.update(cert_reqs="CERT_NONE", assert_hostname=False)
    return options


class Transport:
    """Direct connections, to any host or to one unix socket.

    Args:
        config: certificates and time limits.
        unix: path of a unix socket.
        opener: a pool manager of its own kind instead of a direct one.

    Raises:
        BackendError: bad certificate files.
    """

    def __init__(
        self, config: NetworkConfig, *, unix: str = "", opener: PoolManager | None = None
    ) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._opener: PoolManager | HTTPConnectionPool
        # For https; the system's certificates take as long to load as the library.
        self._secure: PoolManager | HTTPConnectionPool | None
        if unix:
            self._opener = _UnixPool("localhost", socket_path=unix, maxsize=POOL_CONNECTIONS)
            self._secure = self._opener
        else:
            self._opener = opener or PoolManager(**_POOLS)
            self._secure = opener
        if config.ca_cert_files:
            # What is wrong with them shows at once.
            self._opener_for("https:")

    def _opener_for(self, url: str) -> PoolManager | HTTPConnectionPool:
        if url[:6].lower() != "https:":
            return self._opener
        with self._lock:
            if self._secure is None:
                self._secure = PoolManager(**pool_options(self._config))
            return self._secure

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        deadline: float,
        body: Body | None = None,
    ) -> Answer:
        """Send one request; see `Sender.send`."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise Unavailable(f"no time left to ask {host_of(url)}", temporary=True)
        try:
            response = self._opener_for(url).urlopen(
                method,
                url,
                headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **headers},
                body=body,
                timeout=Timeout(
                    connect=min(self._config.connect_timeout, left),
                    read=min(self._config.timeout, left),
                ),
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
        except (HTTPError, OSError) as error:
            raise failure(error, host_of(url)) from error
        return Answer(response, url)

    def prepare(self, url: str) -> None:
        """Load the certificates, where they are needed; see `Sender.prepare`."""
        self._opener_for(url)

    def for_secrets(self) -> Sender:
        """Return this sender."""
        return self

    def close(self) -> None:
        """Close idle connections; one in use is closed by its reader."""
        for opener in (self._opener, self._secure):
            if isinstance(opener, PoolManager):
                opener.clear()
            elif opener is not None:
                opener.close()


class Answer:
    """Head of an answer, and its body when asked for; a context manager that frees the connection.

    Args:
        response: of the HTTP library.
        url: the address that was asked.
    """

    def __init__(self, response: BaseHTTPResponse, url: str) -> None:
        self._response = response
        self._done = False
        self.url = url
        # Told once whether all of the answer came: its sender may be a proxy or mirror.
        self.on_end: Callable[[bool], None] | None = None

    @property
    def status(self) -> int:
        """The status code."""
        return self._response.status

    @property
    def headers(self) -> HTTPHeaderDict:
        """The header fields, without regard to case."""
        return self._response.headers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(keep=kind is None)

    def close(self, *, keep: bool = True) -> None:
        """Give the connection back; it is kept when the rest of the body is short."""
        if not self._done:
            self._done = True
            if keep:
                self._end(True)
            if not keep or not self._drain():
                self._response.close()
        self._response.release_conn()

    def _drain(self) -> bool:
        rest = self._response.length_remaining
        if rest is None or rest > DRAIN_BYTES:
            return False
        try:
            while self._response.read1(DRAIN_BYTES):
                pass
        except (HTTPError, OSError):
            return False
        return True

    def length(self) -> int | None:
        """Return Content-Length, None when there is none; raise `BackendError` for nonsense."""
        text = self.headers.get("Content-Length")
        if text is None:
            return None
        if not _NUMBER.fullmatch(text):
            raise BackendError("wrong Content-Length", got=ascii(text[:40]))
        return int(text)

    def retry_after(self) -> float | None:
        """Return the seconds of Retry-After, None when there is none to understand."""
        text = self.headers.get("Retry-After", "")
        if _NUMBER.fullmatch(text):
            seconds = float(text)
        else:
            try:
                moment = email.utils.parsedate_to_datetime(text)
            except ValueError:
                return None
            seconds = moment.timestamp() - time.time()
        return min(max(seconds, 0.0), _MAX_RETRY_AFTER)

    def read_exactly(self, length: int, deadline: float) -> bytes:
        """Return a body of exactly `length` bytes; raise `BackendError`."""
        pieces: list[bytes] = []
        missing = length
        while missing:
            piece = self._read(min(missing, PIECE_BYTES))
            if not piece:
                self._end(False)
                raise ShortRead(
                    "body ends too early",
                    temporary=True,
                    expected=f"{length} bytes",
                    got=length - missing,
                )
            pieces.append(piece)
            missing -= len(piece)
            if missing and time.monotonic() > deadline:
                self._end(False)
                raise Unavailable(
                    "transfer too slow",
                    temporary=True,
                    expected=f"{length} bytes in time",
                    got=length - missing,
                )
        # Only a body without Content-Length can go on here; the other kind was checked before.
        if self._read(1):
            raise BackendError("body longer than the range", expected=f"{length} bytes")
        self._done = True
        self._end(True)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def pieces(self) -> Iterator[bytes]:
        """Yield the body, however long it is and takes; raise `BackendError`.

        The wait for each piece is bounded by the time limit of the request.
        """
        size, length = 0, self.length()
        while piece := self._read(PIECE_BYTES):
            size += len(piece)
            yield piece
        if length is not None and size < length:
            self._end(False)
            raise ShortRead(
                "body ends too early", temporary=True, expected=f"{length} bytes", got=size
            )
        self._done = True
        self._end(True)

    def read_all(self, limit: int, deadline: float) -> bytes:
        """Return a body of at most `limit` bytes; raise `BackendError`."""
        pieces: list[bytes] = []
        size = 0
        while piece := self._read(PIECE_BYTES):
            size += len(piece)
            if size > limit:
                raise BackendError("answer too long", expected=f"at most {limit} bytes")
            if time.monotonic() > deadline:
                raise Unavailable("transfer too slow", temporary=True)
            pieces.append(piece)
        self._done = True
        self._end(True)
        return b"".join(pieces)

    def _read(self, size: int) -> bytes:
        try:
            return self._response.read1(size)
        except (HTTPError, OSError) as error:
            self._end(False)
            raise failure(error, host_of(self.url)) from error

    def _end(self, complete: bool) -> None:
        tell, self.on_end = self.on_end, None
        if tell is not None:
            tell(complete)


def failure(error: Exception, host: str) -> BackendError:
    """Return our error for one of urllib3's; its own text may quote addresses."""
    if isinstance(error, SSLError):
        cause = error.args[0] if error.args else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Unavailable(f"certificate of {host} is not valid ({cause.verify_message})")
        reason = getattr(cause, "reason", None) or type(cause).__name__
        return TlsFailure(f"TLS failure with {host} ({reason})", temporary=True)
    if isinstance(error.__cause__, IncompleteRead):
        return ShortRead(f"{host} closed the connection within the body", temporary=True)
    return Unavailable(f"no answer from {host} ({_reason(error)})", temporary=True)


def _reason(error: Exception) -> str:
    cause: object = error
    if isinstance(error, ProxyError):
        return f"through the proxy: {_reason(error.original_error)}"
    if isinstance(error, NameResolutionError):
        return "name does not resolve"
    # With some versions of the library this is a kind of time-out.
    if isinstance(error, NewConnectionError):
        cause = error.__cause__
    elif isinstance(error, (ConnectTimeoutError, ReadTimeoutError, TimeoutError)):
        return "timed out"
    elif isinstance(error, HTTPError) and len(error.args) > 1:
        cause = error.args[1]
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return type(cause if isinstance(cause, Exception) else error).__name__
