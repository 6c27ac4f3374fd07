"""HTTP requests of all network backends: connections, which are kept, and time limits.

Connections are the standard library's: `urllib3`, whose pools would do, takes 40 ms to load, for
which a first read waits, and 0.2 ms of each. Nothing here repeats a request or follows a redirect.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 -- of names of hosts: the first request would load it
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import quote, urlsplit

from fscache.backend.answer import Answer, failure
from fscache.backend.base import BackendError, ShortRead, Unavailable
from fscache.backend.sender import Body, Sender, host_of
from fscache.backend.settings import NetworkConfig

__all__ = ["Transport", "request_headers", "time_left", "tls_context"]

USER_AGENT = "nydusd/1.0.0"
# Idle connections to one host that are kept: at least one for each thread that reads.
POOL_CONNECTIONS = 64
# Hosts whose idle connections are kept: the backend, its storage, its token service.
POOL_HOSTS = 16

# Scheme, host and port of connections that serve one another's requests.
_Place = tuple[str, str, int]
_PORTS = {"http": 80, "https": 443}
# What addresses are made of; what is none of it, and no letter or digit, is escaped.
_SAFE = "%/:?#[]@!$&'()*+,;=-._~"


def _split(url: str) -> tuple[_Place, str]:
    """Return where a request goes, and what it asks for there; raise `BackendError`."""
    try:
        parts = urlsplit(url)
        place = (parts.scheme, parts.hostname or "", parts.port or _PORTS[parts.scheme])
    except (ValueError, KeyError) as error:
        raise BackendError(f"{host_of(url)} is not an http(s) address") from error
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    return place, quote(target, safe=_SAFE)


class _UnixConnection(HTTPConnection):
    """An HTTP connection over a unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path, self._seconds = path, timeout

    def connect(self) -> None:
        """Connect; raise `OSError`."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # A non-blocking connect fails at once when the listener's queue is full; this
            # bounds a blocking one.
            limit = struct.pack("ll", *divmod(round(self._seconds * 1e6), 10**6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            sock.connect(self._path)
        except BaseException:
            sock.close()
            raise
        self.sock = sock


class _Idle:
    """Connections that wait for the next request, by place; safe for many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[_Place, list[HTTPConnection]] = {}
        self._closed = False

    def take(self, place: _Place) -> HTTPConnection | None:
        """Return one that the server has not closed meanwhile."""
        while True:
            with self._lock:
                known = self._idle.get(place)
                if not known:
                    return None
                connection = known.pop()
            if not _is_dropped(connection):
                return connection
            connection.close()

    def put(self, place: _Place, connection: HTTPConnection) -> None:
        """Keep one, unless there are enough; the place that was used longest ago makes room."""
        with self._lock:
            known = self._idle[place] = self._idle.pop(place, [])
            known.append(connection)
            surplus = []
            if self._closed or len(known) > POOL_CONNECTIONS:
                surplus = [known.pop()]
            elif len(self._idle) > POOL_HOSTS:
                surplus = self._idle.pop(next(iter(self._idle)))
        for other in surplus:
            other.close()

    def close(self) -> None:
        """Close all of them, and from now on each that is put here."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, {}
        for known in idle.values():
            for connection in known:
                connection.close()


def _is_dropped(connection: HTTPConnection) -> bool:
    """Tell whether an idle connection has come to its end, or has something unasked to say."""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))


class _DirectAnswer(Answer):
    """An answer of the standard library."""

    def __init__(
        self, url: str, raw: HTTPResponse, place: _Place, connection: HTTPConnection, idle: _Idle
    ) -> None:
        super().__init__(url, raw.status, raw.headers)
        self._raw = raw
        self._place = place
        self._connection: HTTPConnection | None = connection
        self._idle = idle

    def _read(self, size: int) -> bytes:
        try:
            piece = self._raw.read1(size)
        except (HTTPException, OSError) as error:
            raise failure(error, host_of(self.url)) from error
        if not piece and self._raw.length:
            host = host_of(self.url)
            raise ShortRead(f"{host} closed the connection within the body", temporary=True)
        return piece

    def _missing(self) -> int | None:
        return self._raw.length

    def _release(self, *, whole: bool) -> None:
        self._raw.close()
        connection, self._connection = self._connection, None
        if connection is None:
            return
        # Without a socket the server has said that it closes the connection.
        if whole and connection.sock is not None:
            self._idle.put(self._place, connection)
        else:
            connection.close()


def tls_context(config: NetworkConfig) -> ssl.SSLContext:
    """Return what connections with TLS trust; raise `BackendError` for bad certificate files."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    for path in config.ca_cert_files:
        try:
            context.load_verify_locations(cafile=path)
        except (OSError, ssl.SSLError) as error:
            raise BackendError(f"cannot load certificates ({error})", path=path) from error
    if config.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def request_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the header of a request, with what the client says of itself."""
    return {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **headers}


def time_left(deadline: float, url: str) -> float:
    """Return the seconds until a deadline; raise `Unavailable` when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise Unavailable(f"no time left to ask {host_of(url)}", temporary=True)
    return left


class Transport:
    """Direct connections, to any host or to one unix socket.

    Args:
        config: certificates and time limits.
        unix: path of a unix socket.

    Raises:
        BackendError: bad certificate files.
    """

    def __init__(self, config: NetworkConfig, *, unix: str = "") -> None:
        self._config = config
        self._unix = unix
        self._idle = _Idle()
        self._lock = threading.Lock()
        # For https; the system's certificates take as long to load as the library.
        self._tls: ssl.SSLContext | None = None
        if config.ca_cert_files:
            # What is wrong with them shows at once.
            self._context()

    def _context(self) -> ssl.SSLContext:
        with self._lock:
            if self._tls is None:
                self._tls = tls_context(self._config)
            return self._tls

    def _connection(self, place: _Place, timeout: float) -> HTTPConnection:
        """Return an idle connection, or a new one."""
        connection = self._idle.take(place)
        if connection is not None:
            return connection
        scheme, host, port = place
        if self._unix:
            connection = _UnixConnection(self._unix, timeout)
        elif scheme == "https":
            connection = HTTPSConnection(host, port, timeout=timeout, context=self._context())
        else:
            connection = HTTPConnection(host, port, timeout=timeout)
        try:
            connection.connect()
        except BaseException:
            # TLS that fails leaves a socket behind.
            connection.close()
            raise
        return connection

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        deadline: float,
        body: Body | None = None,
    ) -> Answer:
        """Send one request; see `Sender.send`."""
        left = time_left(deadline, url)
        place, target = _split(f"http://localhost{url}" if self._unix else url)
        try:
            connection = self._connection(place, min(self._config.connect_timeout, left))
            try:
                connection.sock.settimeout(min(self._config.timeout, left))
                # A server that does not want the whole body may have said why.
                with suppress(BrokenPipeError):
                    connection.request(method, target, body, request_headers(headers))
                response = connection.getresponse()
            except BaseException:
                connection.close()
                raise
        except (HTTPException, OSError, UnicodeError) as error:
            asked = f"unix socket {self._unix}" if self._unix else host_of(url)
            raise failure(error, asked) from error
        return _DirectAnswer(url, response, place, connection, self._idle)

    def prepare(self, url: str) -> None:
        """Load the certificates, where they are needed; see `Sender.prepare`."""
        if url[:6].lower() == "https:":
            self._context()

    def for_secrets(self) -> Sender:
        """Return this sender."""
        return self

    def close(self) -> None:
        """Close idle connections; one in use is closed by its reader."""
        self._idle.close()
