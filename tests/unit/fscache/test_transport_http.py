"""Connections and answers of HTTP, against a server that says exactly the bytes it is told to."""

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
import time
from http.client import HTTPException, IncompleteRead

import pytest
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    MaxRetryError,
    NameResolutionError,
    ProtocolError,
    ProxyError,
    SSLError,
)

from fscache.backend import transport
from fscache.backend.answer import failure
from fscache.backend.base import BackendError, ShortRead, Unavailable
from fscache.backend.pooled import pool_failure
from fscache.backend.sender import TlsFailure, host_of
from fscache.backend.session import SessionSender
from fscache.backend.settings import NetworkConfig
from fscache.backend.transport import Transport

OK = b"HTTP/1.1 200 OK\r\n"
FIVE = OK + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def _head(requests):
    """Read the head of a request, nothing at the end of the connection."""
    lines = []
    while (line := requests.readline()) not in (b"\r\n", b""):
        lines.append(line)
    return b"".join(lines)


class RawServer:
    """Answers the n-th request of all with the n-th text; closes a connection where one says so."""

    def __init__(self, answers):
        self.answers = list(answers)
        self.heads = []
        self.connections = 0
        self.ended = threading.Semaphore(0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(ConnectionError), connection:
            self._answer(connection)
        self.ended.release()

    def _answer(self, connection):
        with connection.makefile("rb") as requests:
            while head := _head(requests):
                self.heads.append(head)
                text, ends = self.answers.pop(0)
                connection.sendall(text)
                if ends:
                    return

    def close(self):
        self._listener.close()


@pytest.fixture
def serve():
    open_servers, senders = [], []

    def serve(*answers):
        """Take bytes, or (bytes, True) to close the connection after them."""
        pairs = [each if isinstance(each, tuple) else (each, False) for each in answers]
        server = RawServer(pairs)
        open_servers.append(server)
        sender = Transport(NetworkConfig(timeout=60, connect_timeout=60))
        senders.append(sender)

        def ask(path="/x", method="GET"):
            url = f"http://127.0.0.1:{server.port}{path}"
            return sender.send(method, url, {"X-Mine": "1"}, time.monotonic() + 60)

        return server, ask

    yield serve
    for each in (*senders, *open_servers):
        each.close()


def soon():
    return time.monotonic() + 60


def test_request_and_reuse(serve):
    server, ask = serve(FIVE, CHUNKED + b"5\r\nhello\r\n0\r\n\r\n", FIVE)
    for path in ("/a%2fb/../c?d=%2f&e", "?q", ""):
        with ask(path) as answer:
            assert answer.read_exactly(5, soon()) == b"hello"
    assert server.connections == 1
    lines = server.heads[0].decode().splitlines()
    # As it was signed, and not put right.
    assert lines[0] == "GET /a%2fb/../c?d=%2f&e HTTP/1.1"
    assert set(lines[1:]) == {
        f"Host: 127.0.0.1:{server.port}", "User-Agent: nydusd/1.0.0", "Accept-Encoding: identity",
        "X-Mine: 1",
    }  # fmt: skip
    assert [head.split()[1] for head in server.heads[1:]] == [b"/?q", b"/"]


def test_what_has_no_body_keeps_the_connection(serve):
    server, ask = serve(
        OK + b"Content-Length: 5\r\n\r\n", b"HTTP/1.1 204 \r\n\r\n", b"HTTP/1.1 100 \r\n\r\n" + FIVE
    )
    with ask(method="HEAD") as answer:
        assert answer.length() == 5
    with ask() as answer:
        assert answer.status == 204
    with ask() as answer:
        assert answer.read_all(5, soon()) == b"hello"
    assert server.connections == 1


@pytest.mark.parametrize("rest", [10, 1 << 17])
def test_a_short_rest_is_read_for_the_connection(serve, rest):
    server, ask = serve(OK + b"Content-Length: %d\r\n\r\n" % rest + bytes(rest), FIVE)
    ask().close()
    ask().close()
    assert server.connections == (1 if rest == 10 else 2)


@pytest.mark.parametrize(
    "first",
    [
        (FIVE, True),
        OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello",
        (OK + b"\r\nhello", True),
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    ],
)
def test_connections_that_are_at_their_end(serve, first):
    server, ask = serve(first, FIVE)
    with ask() as answer:
        assert answer.read_all(5, soon()) == b"hello"
    if isinstance(first, tuple):
        assert server.ended.acquire(timeout=60)
    with ask() as answer:
        assert answer.read_all(5, soon()) == b"hello"
    assert server.connections == 2


@pytest.mark.parametrize(
    "text",
    [
        OK + b"Content-Length: 6\r\n\r\nhello",
        CHUNKED + b"5\r\nhel",
        CHUNKED + b"5\r\nhello\r\n",
        CHUNKED + b"zz\r\nhello\r\n0\r\n\r\n",
    ],
)
def test_bodies_that_end_too_early(serve, text):
    _, ask = serve((text, True), FIVE)
    with pytest.raises(ShortRead) as caught, ask() as answer:
        answer.read_all(100, soon())
    assert caught.value.temporary
    with ask() as answer:
        assert answer.read_all(5, soon()) == b"hello"


@pytest.mark.parametrize(
    "head",
    [
        b"", b"HTTP/1.1\r\n\r\n", b"nonsense\r\n\r\n", b"HTTP/1.1 200 " + b"x" * 70_000 + b"\r\n",
        OK + b"X: y\r\n" * 200 + b"\r\n", b"HTTP/1.1 999999 \r\n\r\n",
    ],
)  # fmt: skip
def test_heads_that_are_none(serve, head):
    _, ask = serve((head, True))
    with pytest.raises(Unavailable, match="no answer from") as caught:
        ask()
    assert caught.value.temporary


@pytest.mark.parametrize("lengths", [(b"5", b"6"), (b"five",), (b"5, 5",), (b"-5",)])
def test_lengths_that_are_none(serve, lengths):
    fields = b"".join(b"Content-Length: " + length + b"\r\n" for length in lengths)
    _, ask = serve((OK + fields + b"\r\nhello", True))
    with pytest.raises(BackendError, match="wrong Content-Length"), ask() as answer:
        answer.length()


@pytest.mark.parametrize(
    "url", ["http://h:99999/x", "http://h:port/x", "http://[::1/x", "ftp://h/x", "no address"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(BackendError, match="is not an http"):
        Transport(NetworkConfig()).send("GET", url, {}, soon())


@pytest.mark.parametrize("url", ["http://h:99999/x?word=secret", "http://[::1/x?word=secret"])
def test_addresses_that_are_none_for_requests(url):
    with pytest.raises(BackendError, match="is none") as caught:
        SessionSender(NetworkConfig()).send("GET", url, {}, soon())
    assert "secret" not in str(caught.value)


def test_targets_are_escaped_once(serve):
    server, ask = serve(FIVE)
    with ask("/a b/\u00e4%20?c=d%2F\u00e4&e"):
        pass
    assert server.heads[0].split(b"\r\n")[0] == b"GET /a%20b/%C3%A4%20?c=d%2F%C3%A4&e HTTP/1.1"


def test_idle_connections_are_few(monkeypatch):
    monkeypatch.setattr(transport, "POOL_CONNECTIONS", 2)
    monkeypatch.setattr(transport, "POOL_HOSTS", 2)

    class Connection:
        def __init__(self):
            self.sock, self.other = socket.socketpair()
            self.open = True

        def close(self):
            self.open = False
            self.sock.close()
            self.other.close()

    idle = transport._Idle()
    places = [("http", name, 80) for name in "abc"]
    kept = [Connection() for _ in range(5)]
    for connection in kept[:3]:
        idle.put(places[0], connection)
    assert [connection.open for connection in kept[:3]] == [True, True, False]
    idle.put(places[1], kept[3])
    idle.put(places[0], idle.take(places[0]))
    idle.put(places[2], kept[4])
    # That of the place which was used longest ago.
    assert [connection.open for connection in kept] == [True, True, False, False, True]
    assert idle.take(places[1]) is None
    kept[4].other.close()
    assert idle.take(places[2]) is None
    assert not kept[4].open
    one = idle.take(places[0])
    idle.close()
    idle.put(places[0], one)
    assert not kept[0].open
    assert not kept[1].open


REFUSED = ConnectionRefusedError(111, "Connection refused")
NOWHERE = socket.gaierror(-2, "unknown")


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (NOWHERE, Unavailable, "no answer from h (name does not resolve)"),
        (UnicodeError("label too long"), Unavailable, "no answer from h (name does not resolve)"),
        (TimeoutError(), Unavailable, "no answer from h (timed out)"),
        (REFUSED, Unavailable, "no answer from h (Connection refused)"),
        (HTTPException("secret"), Unavailable, "no answer from h (HTTPException)"),
        (IncompleteRead(b"secret"), ShortRead, "h closed the connection within the body"),
        (ssl.SSLError(), TlsFailure, "TLS failure with h (SSLError)"),
    ],
)
def test_errors(error, kind, text):
    found = failure(error, "h")
    assert (type(found), found.what, found.temporary) == (kind, text, True)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConnectTimeoutError("secret"), "no answer from h (timed out)"),
        (NameResolutionError("secret", None, NOWHERE), "no answer from h (name does not resolve)"),
        (ProtocolError("x", REFUSED), "no answer from h (Connection refused)"),
        (ProtocolError("x", IncompleteRead(b"")), "h closed the connection within the body"),
        (
            MaxRetryError(None, "secret", ProxyError("x", ProtocolError("y", REFUSED))),
            "no answer from h through the proxy (Connection refused)",
        ),
        (SSLError(ssl.SSLError()), "TLS failure with h (SSLError)"),
        (SSLError("secret"), "TLS failure with h (SSLError)"),
        (HTTPError("secret"), "no answer from h (HTTPError)"),
        (REFUSED, "no answer from h (Connection refused)"),
    ],
)
def test_errors_of_the_pool(error, text):
    if isinstance(error, NameResolutionError):
        error.__cause__ = NOWHERE
    assert pool_failure(error, "h").what == text


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("fscache.backend.transport", ("urllib3", "requests")),
        ("fscache.cli.nydusd, fscache.node, fscache.api.handler", ("http.client", "email", "ssl")),
    ],
)
def test_what_takes_long_to_load_is_not(module, unwanted):
    program = f"import sys, {module}; print([name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://user:word@host:5/path?key", "host:5"),
        ("https://host?signature=a@secret", "host"),
        ("https://host#a@secret", "host"),
        ("/path", "unix socket"),
    ],
)
def test_texts_name_the_host_alone(url, host):
    assert host_of(url) == host
