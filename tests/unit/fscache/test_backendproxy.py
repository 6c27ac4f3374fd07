import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscache import backendproxy
from fscache.backend import HttpProxyConfig, NotFound, open_backend
from fscache.backendproxy import (
    BackendProxy,
    ByteRange,
    ProxyError,
    Refusal,
    Target,
    parse_range,
)
from tests.leftovers import no_open_file_left

DATA = bytes(range(256)) * 4096  # 1 MiB
BLOB = "a" * 64
URL = f"/v2/library/blobs/sha256:{BLOB}"
LARGE = 64 << 20  # more than the kernel's socket buffers take
LOOPBACK = ip_address("127.0.0.1")
CODE = "import sys; from fscache.cli.backendproxy import main; sys.exit(main())"
MAIN = [sys.executable, "-c", CODE]


@pytest.fixture
def directory(tmp_path):
    directory = tmp_path / "blobs"
    directory.mkdir()
    (directory / BLOB).write_bytes(DATA)
    (directory / "empty").write_bytes(b"")
    (tmp_path / "secret").write_bytes(b"secret")
    return directory


@pytest.fixture
def proxy(directory):
    with closing(BackendProxy(directory, LOOPBACK, 0)) as proxy:
        yield proxy


@pytest.fixture
def connection(proxy):
    with closing(connect(proxy)) as connection:
        yield connection


def make_large(directory):
    path = directory / "large"
    path.touch()
    os.truncate(path, LARGE)
    return path


def connect(proxy):
    return http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=60)


def wait_until_refused(proxy):
    while True:
        with closing(connect(proxy)) as connection:
            try:
                connection.connect()
            except OSError:
                return


def ask(connection, path, method="GET", **headers):
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    return response, response.read()


def exchange(proxy, request):
    """Send raw bytes, return all bytes that come until the server hangs up."""
    host, port = proxy.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        sock.sendall(request)
        pieces = []
        while piece := sock.recv(1 << 16):
            pieces.append(piece)
    return b"".join(pieces)


# Ranges


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=0-", (0, 100)),
        ("Bytes=10-19", (10, 10)),
        ("bytes=90-200", (90, 10)),
        ("bytes=99-99", (99, 1)),
        ("bytes=-1", (99, 1)),
        ("bytes=-500", (0, 100)),
        ("bytes=5-18446744073709551615", (5, 95)),
        ("bytes=100-200, 3-4", (3, 2)),
        ("bytes=3-4,6-7", (3, 2)),
        ("bytes=-0,6-7", (6, 2)),
    ],
)
def test_range(text, expected):
    assert parse_range(text, 100) == ByteRange(*expected)


@pytest.mark.parametrize(
    "text",
    ["", "bytes", "bytes=", "bytes=-", "bytes=100-", "bytes=-0", "bytes=5-4", "bytes=200-199",
     "bytes=0-1,x", "bytes=a-b", "bytes=0", "bytes= 0 - 1", "bytes=+0-1", "lines=0-1", "0-1",
     "bytes=\u0660-\u0661", "bytes=0-" + "9" * 5000],
)  # fmt: skip
def test_bad_range(text):
    assert parse_range(text, 100) is None


ranges = st.from_regex(r"bytes=[0-9]*-[0-9]*(, ?[0-9]*-[0-9]*)*", fullmatch=True)


@given(st.text() | ranges, st.integers(0, 2**40))
def test_any_text_is_a_range_of_the_file_or_refused(text, size):
    part = parse_range(text, size)
    if part is not None:
        assert part.first >= 0
        assert part.length > 0
        assert part.first + part.length <= size


@given(st.data())
def test_every_range_inside_is_given_exactly(data):
    size = data.draw(st.integers(1, 2**40))
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first, size - 1))
    assert parse_range(f"bytes={first}-{last}", size) == ByteRange(first, last - first + 1)


# Targets


@given(st.binary() | st.text("ab/.%02f:?s", min_size=1).map(lambda text: b"/" + text.encode()))
def test_any_target_is_a_plain_name_or_refused(data):
    try:
        name = Target.parse(data).name
    except Refusal:
        return
    assert name
    assert name[0] != "."
    assert not set(name) & {"/", "\0"}


REFUSED = [
    "/../secret",
    "/%2e%2e/secret",
    "/..%2fsecret",
    "/%2e%2e%2fsecret",
    "/..",
    "/.",
    "/v2//blobs/x",
    "/./" + BLOB,
    f"/{BLOB}%00",
    "/%2fetc%2fpasswd",
    "/v2/../secret",
    "/v2/a/blobs/sha256:..",
    "/v2/a/blobs/sha256:../../secret",
    "/v2/a/blobs/sha256:..%2fsecret",
    "/v2/a/blobs/sha256:",
    f"/v2/a/blobs/../blobs/sha256:{BLOB}",
    f"/v2/a/blobs/{BLOB}",
    f"/v2/a/blobs/md5:{BLOB}",
    "/%ff",
    "/" + "a" * 300,
]


def test_refused_targets(proxy):
    for path in REFUSED:
        answer = exchange(proxy, f"GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 400 "), path
        assert b"secret" not in answer.partition(b"\r\n\r\n")[2]


def test_targets_that_stand_for_no_file(connection, directory):
    (directory / "sub").mkdir()
    (directory / "sub" / "file").write_bytes(b"x")
    os.mkfifo(directory / "fifo")
    for path in (
        "/",
        "//",
        "//none",
        "/none",
        "/sub",
        "/sub/file",
        "/fifo",
        f"/v2/blobs/sha256:{BLOB}",
        f"/v2/a/blobs/sha256:{'b' * 64}",
        f"/v2/a/manifests/sha256:{BLOB}",
    ):
        response, _ = ask(connection, path)
        assert response.status == 404, path


def test_links_lead_only_to_files_inside(connection, directory, tmp_path):
    (directory / "inside").symlink_to(BLOB)
    (directory / "outside").symlink_to(tmp_path / "secret")
    (directory / "upwards").symlink_to("../secret")
    # A sibling whose path begins with the path of the directory.
    sibling = tmp_path / "blobs-not"
    sibling.mkdir()
    (sibling / "file").write_bytes(b"secret")
    (directory / "beside").symlink_to(sibling / "file")
    (directory / "dangling").symlink_to("none")
    assert ask(connection, "/inside")[1] == DATA
    for name in ("outside", "upwards", "beside", "dangling"):
        response, body = ask(connection, f"/{name}")
        assert response.status == 404
        assert b"secret" not in body


# Answers


@pytest.mark.parametrize(
    "path",
    [URL, f"/v2/deep/er/name/blobs/sha256:{BLOB}", f"/{BLOB}", f"/v2/a/blobs/sha256%3A{BLOB}",
     URL + "?ns=docker.io", f"http://registry:8000{URL}"],
)  # fmt: skip
def test_whole_blob(connection, path):
    head, nothing = ask(connection, path, "HEAD", Range="bytes=0-9")
    response, body = ask(connection, path)
    assert head.status == response.status == 200
    assert nothing == b""
    assert body == DATA
    for answer in (head, response):
        assert answer.headers["Content-Length"] == str(len(DATA))
        assert answer.headers["Content-Type"] == "application/octet-stream"
        assert answer.headers["Accept-Ranges"] == "bytes"
        digest = None if path == f"/{BLOB}" else f"sha256:{BLOB}"
        assert answer.headers["Docker-Content-Digest"] == digest


@pytest.mark.parametrize(
    ("text", "first", "end"),
    [("bytes=0-0", 0, 1), ("bytes=1000-300000", 1000, 300001), ("bytes=-10", -10, None)],
)
def test_part_of_a_blob(connection, text, first, end):
    response, body = ask(connection, URL, Range=text)
    begin, stop, _ = slice(first, end).indices(len(DATA))
    assert response.status == 206
    assert body == DATA[first:end]
    assert response.headers["Content-Range"] == f"bytes {begin}-{stop - 1}/{len(DATA)}"
    assert response.headers["Content-Length"] == str(len(body))
    assert response.headers["Docker-Content-Digest"] == f"sha256:{BLOB}"


def test_a_refusal_of_head_has_no_body(proxy):
    answer = exchange(proxy, b"HEAD /none HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404 Not Found\r\n")
    assert answer.endswith(b"\r\n\r\n")


def test_range_outside_is_416_and_the_connection_stays(connection):
    for text in (f"bytes={len(DATA)}-", "bytes=2-1", "pages=1-2"):
        response, _ = ask(connection, URL, Range=text)
        assert response.status == 416
        assert response.headers["Content-Range"] == f"bytes */{len(DATA)}"
    sock = connection.sock
    assert ask(connection, URL, Range="bytes=0-3")[1] == DATA[:4]
    assert connection.sock is sock is not None


def test_if_range_matches_nothing(connection):
    headers = {"Range": "bytes=0-3", "If-Range": '"etag"'}
    response, body = ask(connection, URL, **headers)
    assert (response.status, len(body)) == (200, len(DATA))


def test_empty_file(connection):
    response, body = ask(connection, "/empty")
    assert (response.status, body) == (200, b"")
    response, _ = ask(connection, "/empty", Range="bytes=0-0")
    assert response.headers["Content-Range"] == "bytes */0"
    assert response.status == 416


def test_a_name_that_is_no_digest_has_no_digest_field(connection, directory):
    (directory / "x\r\nX-Evil: 1").write_bytes(b"data")
    response, body = ask(connection, "/v2/a/blobs/sha256:x%0d%0aX-Evil:%201")
    assert (response.status, body) == (200, b"data")
    assert "X-Evil" not in response.headers
    assert "Docker-Content-Digest" not in response.headers


def test_files_come_change_and_go_while_it_runs(connection, directory):
    new = directory / "new"
    assert ask(connection, "/new")[0].status == 404
    new.write_bytes(b"one")
    assert ask(connection, "/new", Range="bytes=0-2")[1] == b"one"
    (directory / "other").write_bytes(b"three")
    (directory / "other").rename(new)
    assert ask(connection, "/new", Range="bytes=0-9")[1] == b"three"
    new.unlink()
    assert ask(connection, "/new")[0].status == 404


def test_offsets_beyond_four_gigabytes(connection, directory):
    size = (5 << 30) + 10
    with (directory / "big").open("wb") as file:
        file.truncate(size)
        file.seek(size - 4)
        file.write(b"tail")
    response, body = ask(connection, "/big", Range=f"bytes={size - 6}-{size + 6}")
    assert body == b"\0\0tail"
    assert response.headers["Content-Range"] == f"bytes {size - 6}-{size - 1}/{size}"
    assert ask(connection, "/big", "HEAD")[0].headers["Content-Length"] == str(size)


def test_other_methods_are_refused(connection):
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        response, _ = ask(connection, URL, method)
        assert response.status == 405
        assert response.headers["Allow"] == "GET, HEAD"


def test_requests_in_a_row_on_one_connection(proxy):
    one = f"GET {URL} HTTP/1.1\r\nRange: bytes=1-2\r\n\r\n"
    last = f"HEAD {URL} HTTP/1.1\r\nConnection: close\r\n\r\n"
    answer = exchange(proxy, (one * 3 + last).encode())
    assert re.findall(rb"HTTP/1.1 (\d+) ", answer) == [b"206"] * 3 + [b"200"]


@pytest.mark.parametrize(
    "request_bytes",
    [b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"BREW / HTTP/1.1\r\n\r\n",
     b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", b"GET * HTTP/1.1\r\nConnection: close\r\n\r\n",
     b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
     b"GET /\xe9 HTTP/1.1\r\nConnection: close\r\n\r\n"],
)  # fmt: skip
def test_bad_requests_get_an_answer_and_harm_nobody(proxy, connection, request_bytes):
    answer = exchange(proxy, request_bytes)
    assert re.match(rb"HTTP/1.1 [45]\d\d ", answer)
    assert ask(connection, URL)[1] == DATA


def test_a_body_is_not_taken_for_a_request(proxy):
    inner = b"GET /empty HTTP/1.1\r\n\r\n"
    answer = exchange(
        proxy, b"GET /empty HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(inner) + inner
    )
    assert answer.count(b"HTTP/1.1") == 1


# Readers


@pytest.mark.parametrize(("prefix", "blob"), [("", BLOB), ("/v2/library/blobs", f"sha256:{BLOB}")])
def test_our_backend_reads_through_it(proxy, prefix, blob):
    with closing(open_backend(HttpProxyConfig(proxy.url, prefix))) as backend:
        reader = backend.open(blob)
        assert reader.size() == len(DATA)
        assert reader.read_at(4095, 70000) == DATA[4095:74095]
        assert reader.read_at(0, len(DATA)) == DATA
        with pytest.raises(NotFound):
            backend.open(blob[:-1] + "b").size()


def test_many_readers_at_once(proxy):
    """Each byte says where it is from, so a mix-up between connections shows."""
    with (
        closing(open_backend(HttpProxyConfig(proxy.url))) as backend,
        ThreadPoolExecutor(32) as pool,
    ):
        reader = backend.open(BLOB)
        offsets = [(number * 7919) % (len(DATA) - 5000) for number in range(400)]
        parts = pool.map(lambda offset: reader.read_at(offset, 5000), offsets)
        assert all(
            part == DATA[offset : offset + 5000]
            for part, offset in zip(parts, offsets, strict=True)
        )


def test_many_connections_stay_open(proxy):
    connections = [connect(proxy) for _ in range(200)]
    try:
        for _ in range(2):
            for number, connection in enumerate(connections):
                _, body = ask(connection, URL, Range=f"bytes={number}-{number}")
                assert body == DATA[number : number + 1]
    finally:
        for connection in connections:
            connection.close()


def test_a_reader_that_hangs_up_harms_nobody(proxy, directory, caplog):
    make_large(directory)
    for _ in range(4):
        connection = connect(proxy)
        connection.request("GET", "/large")
        connection.getresponse().close()
        connection.close()
    with closing(connect(proxy)) as connection:
        assert ask(connection, URL)[1] == DATA
    assert "Traceback" not in caplog.text


def test_more_connections_than_allowed_are_closed(directory, monkeypatch):
    monkeypatch.setattr(backendproxy, "_connection_limit", lambda: 2)
    with closing(BackendProxy(directory, LOOPBACK, 0)) as proxy:
        first, second, third = (connect(proxy) for _ in range(3))
        assert ask(first, "/empty")[0].status == 200
        assert ask(second, "/empty")[0].status == 200
        with pytest.raises(OSError), closing(third):
            ask(third, "/empty")
        ended = ask(first, "/empty", Connection="close")
        assert ended[0].status == 200
        second.close()


def test_a_file_cut_short_ends_the_connection(proxy, directory):
    path = make_large(directory)
    with closing(connect(proxy)) as connection:
        connection.request("GET", "/large")
        response = connection.getresponse()
        response.read(1)
        os.truncate(path, 0)
        with pytest.raises(http.client.IncompleteRead):
            response.read()


def test_no_descriptor_is_left(connection, directory, proxy, tmp_path):
    (directory / "outside").symlink_to(tmp_path / "secret")
    paths = (URL, "/none", "/outside", "/..")
    # A file is closed before the next request is read, and the last path opens none.
    for path in paths:
        ask(connection, path)
    with no_open_file_left():
        for path in paths:
            ask(connection, path)
            ask(connection, path, Range="bytes=9999999-")
        with pytest.raises(ProxyError):
            BackendProxy(directory, LOOPBACK, int(proxy.url.rsplit(":", 1)[1]))


# Start and end


def test_close_lets_an_answer_end(directory, monkeypatch):
    monkeypatch.setattr(backendproxy, "GRACE_SECONDS", 60)
    make_large(directory)
    proxy = BackendProxy(directory, LOOPBACK, 0)
    idle, busy = connect(proxy), connect(proxy)
    ask(idle, "/empty")
    busy.request("GET", "/large")
    response = busy.getresponse()
    response.read(1)
    closer = threading.Thread(target=proxy.close)
    closer.start()
    assert len(response.read()) == LARGE - 1
    closer.join()
    with pytest.raises(OSError):
        connect(proxy).connect()
    idle.close()
    busy.close()


def test_no_request_is_begun_after_close(directory, monkeypatch):
    monkeypatch.setattr(backendproxy, "GRACE_SECONDS", 60)
    make_large(directory)
    proxy = BackendProxy(directory, LOOPBACK, 0)
    with closing(connect(proxy)) as connection:
        connection.connect()
        connection.sock.sendall(b"GET /large HTTP/1.1\r\n\r\n" + b"GET /empty HTTP/1.1\r\n\r\n" * 3)
        answer = bytearray(connection.sock.recv(1))
        closer = threading.Thread(target=proxy.close)
        closer.start()
        wait_until_refused(proxy)
        while piece := connection.sock.recv(1 << 20):
            answer += piece
        closer.join()
    # What was read already is answered, with the word that it was the last.
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert answer.count(b"Connection: close") == 1


def test_close_does_not_wait_for_ever(directory, monkeypatch):
    monkeypatch.setattr(backendproxy, "GRACE_SECONDS", 0.05)
    make_large(directory)
    proxy = BackendProxy(directory, LOOPBACK, 0)
    with closing(connect(proxy)) as connection:
        connection.request("GET", "/large")
        response = connection.getresponse()
        proxy.close()
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()


def test_failures_at_start(directory, proxy, tmp_path):
    port = int(proxy.url.rsplit(":", 1)[1])
    with pytest.raises(ProxyError, match=f"127.0.0.1 port {port} .*in use"):
        BackendProxy(directory, LOOPBACK, port)
    with pytest.raises(ProxyError, match="No such file"):
        BackendProxy(tmp_path / "none", LOOPBACK, 0)
    with pytest.raises(ProxyError, match="Not a directory"):
        BackendProxy(directory / BLOB, LOOPBACK, 0)


def test_ipv6(directory):
    try:
        proxy = BackendProxy(directory, ip_address("::1"), 0)
    except ProxyError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with closing(proxy), closing(connect(proxy)) as connection:
        assert ask(connection, URL)[1] == DATA


def run(*arguments, **environment):
    return subprocess.run(
        [*MAIN, *arguments], env={**os.environ, **environment},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_program_serves_until_a_signal(directory, number):
    environment = {**os.environ, "ROCKET_PORT": "0"}
    with subprocess.Popen(
        [*MAIN, "-b", str(directory)], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline())[0]
        with closing(http.client.HTTPConnection(url.removeprefix("http://"))) as connection:
            assert ask(connection, URL)[1] == DATA
            process.send_signal(number)
            assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()


def test_program_says_what_is_wrong_in_one_line(directory, proxy):
    port = proxy.url.rsplit(":", 1)[1]
    cases = [
        (str(directory / "none"), {}, "No such file or directory"),
        (str(directory), {"ROCKET_PORT": port}, "Address already in use"),
        (str(directory), {"ROCKET_PORT": "65536"}, "ROCKET_PORT"),
        (str(directory), {"ROCKET_ADDRESS": "nowhere"}, "ROCKET_ADDRESS"),
    ]
    for blobs, environment, text in cases:
        result = run("--blobsdir", blobs, **environment)
        assert result.returncode == 1
        assert result.stdout == ""
        assert re.fullmatch(r"Error: [^\n]+\n", result.stderr), result.stderr
        assert text in result.stderr


def test_program_wants_a_directory_name():
    for arguments in ((), ("--blobsdir", ""), ("-b", "x", "y"), ("--blobs", "x")):
        result = run(*arguments)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
    assert run("--version").stdout.startswith("nydus-backend-proxy ")


def test_program_needs_no_third_party_package(directory):
    code = (
        "import sys; import fscache.cli.backendproxy; "
        "print(sorted({name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "['__main__', 'erofs', 'fscache']"
