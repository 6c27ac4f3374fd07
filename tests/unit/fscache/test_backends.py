import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes.blob_disk import BASIC, disk
from fakes.blob_server import BlobServer
from fakes.object_store import ObjectStoreServer
from fakes.registry import AUTH, REPO, RegistryServer, StoreServer

from erofs.errors import NydusError
from fscache.backend import (
    AuthError,
    BackendError,
    Credentials,
    HttpProxyConfig,
    LocalDiskConfig,
    LocalFsConfig,
    NotFound,
    RegistryConfig,
    ShortRead,
    Unavailable,
    check_blob_id,
    open_backend,
)
from fscache.backend.config import ConfigTable, backend_config
from fscache.backend.direct import DirectSender
from fscache.backend.retry import RetryPolicy, retry_policy
from fscache.backend.settings import NetworkConfig

DATA = bytes(range(256)) * 4096  # 1 MiB
BLOB = "a" * 64


@pytest.fixture
def server():
    with BlobServer({BLOB: DATA}) as server:
        yield server


@pytest.fixture
def http(server, request):
    """Patient, unless the server is one that never ends an answer."""
    case = getattr(request.node, "callspec", None)
    slow = case is not None and case.params.get("fault") in ("stall", "drip")
    patience = {"timeout": 1.5, "transfer_timeout": 1.0} if slow else {"timeout": 60.0}
    backend = open_backend(HttpProxyConfig(server.address, "/v2/blobs/", **patience))
    yield backend
    backend.close()


KINDS = [
    "dir",
    "alt_dirs",
    "blob_file",
    "tcp",
    "unix",
    "registry",
    "redirected",
    "oss",
    "s3",
    "disk",
]


@pytest.fixture(params=KINDS)
def backend(request, tmp_path):
    if request.param in ("registry", "redirected"):
        with (
            RegistryServer({BLOB: DATA}, auth="bearer") as server,
            StoreServer({BLOB: DATA}) as store,
        ):
            server.store = store if request.param == "redirected" else None
            credentials = Credentials.from_base64(AUTH)
            backend = open_backend(
                RegistryConfig(server.host, REPO, scheme="http", credentials=credentials)
            )
            yield backend
            backend.close()
        return
    if request.param in ("oss", "s3"):
        with ObjectStoreServer(request.param, {f"blobs/{BLOB}": DATA}) as server:
            values = ConfigTable(server.config(object_prefix="blobs/"), "config")
            backend = open_backend(backend_config(request.param, values, values))
            yield backend
            backend.close()
        return
    if request.param in ("tcp", "unix"):
        unix = tmp_path / "s.sock" if request.param == "unix" else None
        with BlobServer({BLOB: DATA}, unix) as server:
            backend = open_backend(HttpProxyConfig(server.address, "blobs"))
            yield backend
            backend.close()
        return
    directory = tmp_path / "blobs"
    directory.mkdir()
    (directory / BLOB).write_bytes(DATA)
    (tmp_path / "disk").write_bytes(disk((BASIC, uuid.UUID(int=1), BLOB[:32], DATA)))
    config = {
        "dir": LocalFsConfig(dir=directory),
        "alt_dirs": LocalFsConfig(dir=tmp_path / "empty", alt_dirs=(tmp_path, directory)),
        "blob_file": LocalFsConfig(blob_file=directory / BLOB),
        "disk": LocalDiskConfig(tmp_path / "disk"),
    }[request.param]
    yield open_backend(config)


# One suite for every backend


def test_reads_exact_ranges(backend):
    reader = backend.open(BLOB)
    assert reader.blob_id == BLOB
    assert reader.size() == len(DATA)
    for offset, length in ((0, 1), (1, 4095), (len(DATA) - 1, 1), (0, len(DATA)), (777, 300_000)):
        assert reader.read_at(offset, length) == DATA[offset : offset + length]
    assert reader.read_at(5, 0) == b""


def test_range_behind_the_end_is_an_error(backend):
    reader = backend.open(BLOB)
    with pytest.raises(ShortRead) as caught:
        reader.read_at(len(DATA) - 10, 11)
    assert not caught.value.temporary
    assert caught.value.where["blob"] == BLOB
    with pytest.raises(BackendError):
        reader.read_at(len(DATA), 1)
    assert reader.read_at(0, 10) == DATA[:10]


@pytest.mark.parametrize("backend", [kind for kind in KINDS if kind != "blob_file"], indirect=True)
def test_missing_blob(backend):
    reader = backend.open("c" * 64)
    with pytest.raises(FileNotFoundError) as caught:
        reader.read_at(0, 1)
    assert isinstance(caught.value, NotFound)
    assert not caught.value.temporary
    with pytest.raises(NotFound):
        reader.size()


def test_streams_from_an_offset_to_the_end(backend):
    reader = backend.open(BLOB)
    for offset in (0, 1, 300_000, len(DATA) - 1):
        with reader.stream(offset) as pieces:
            got = list(pieces)
        assert b"".join(got) == DATA[offset:]
        assert max(map(len, got)) <= 1 << 18
    metrics = backend.metrics.as_dict()
    assert (metrics["read_count"], metrics["read_errors"]) == (4, 0)
    assert metrics["read_amount_total"] == 4 * len(DATA) - 300_001 - (len(DATA) - 1)


def test_stream_that_is_left_early(backend):
    reader = backend.open(BLOB)
    with reader.stream(0) as pieces:
        first = next(pieces)
    assert DATA.startswith(first)
    assert backend.metrics.as_dict()["read_amount_total"] == len(first)
    assert reader.read_at(5, 10) == DATA[5:15]


@pytest.mark.parametrize("backend", [kind for kind in KINDS if kind != "blob_file"], indirect=True)
def test_stream_of_a_missing_blob(backend):
    with pytest.raises(NotFound) as caught, backend.open("c" * 64).stream(0) as pieces:
        next(pieces)
    assert caught.value.where["blob"] == "c" * 64
    assert backend.metrics.as_dict()["read_errors"] == 1


def test_metrics(backend):
    reader = backend.open(BLOB)
    reader.read_at(0, 1024)
    reader.read_at(0, 1 << 20)
    with pytest.raises(BackendError):
        reader.read_at(len(DATA), 1)
    metrics = backend.metrics.as_dict()
    assert list(metrics) == [
        "backend_type",
        "read_count",
        "read_errors",
        "read_amount_total",
        "read_cumulative_latency_millis_total",
        "read_cumulative_latency_millis_dist",
        "read_count_block_size_dist",
        "read_latency_sizes_dist",
    ]
    assert (metrics["read_count"], metrics["read_errors"]) == (3, 1)
    assert metrics["read_amount_total"] == 1024 + (1 << 20)
    assert metrics["read_count_block_size_dist"] == [1, 0, 0, 0, 0, 0, 1, 0]
    assert sum(map(sum, metrics["read_latency_sizes_dist"])) == 2


@pytest.mark.parametrize(
    "blob_id", ["", "../x", "a/b", ".hidden", "..", "a\0b", "x" * 256, "\ud800"]
)
def test_hostile_ids_are_refused(backend, blob_id):
    with pytest.raises(BackendError, match="blob id"):
        backend.open(blob_id)


def test_longest_id():
    assert check_blob_id("x" * 255) == "x" * 255
    with pytest.raises(BackendError):
        check_blob_id("ä" * 128)


def test_many_threads(backend):
    reader = backend.open(BLOB)

    def read(number):
        for turn in range(10):
            offset = (number * 10 + turn) * 4097
            assert reader.read_at(offset, 5000) == DATA[offset : offset + 5000]

    with ThreadPoolExecutor(8) as pool:
        for result in [pool.submit(read, number) for number in range(8)]:
            result.result()


# Local files


def test_localfs_file_replaced_truncated_removed(tmp_path):
    path = tmp_path / BLOB
    path.write_bytes(DATA)
    reader = open_backend(LocalFsConfig(dir=tmp_path)).open(BLOB)
    assert reader.read_at(0, 4) == DATA[:4]
    (tmp_path / "new").write_bytes(b"other" * 100)
    (tmp_path / "new").rename(path)
    assert reader.read_at(0, 5) == b"other"
    with path.open("r+b") as file:
        file.truncate(3)
    with pytest.raises(ShortRead, match="expected 5 bytes, got 3"):
        reader.read_at(0, 5)
    path.unlink()
    with pytest.raises(NotFound):
        reader.read_at(0, 5)


def test_localfs_refuses_what_is_no_file(tmp_path):
    (tmp_path / BLOB).mkdir()
    with pytest.raises(BackendError, match="not a regular file"):
        open_backend(LocalFsConfig(dir=tmp_path)).open(BLOB).read_at(0, 1)


def test_localfs_says_at_once_that_blobs_are_not_there(tmp_path, caplog):
    absent = tmp_path / "absent"
    open_backend(LocalFsConfig(dir=absent, alt_dirs=(tmp_path,)))
    assert caplog.messages == []
    open_backend(LocalFsConfig(dir=absent))
    open_backend(LocalFsConfig(blob_file=absent))
    assert caplog.messages == [f"blobs are not there: {absent}"] * 2


def test_localfs_needs_a_place():
    with pytest.raises(BackendError):
        open_backend(LocalFsConfig())


# HTTP


def test_http_request_form(server, http):
    reader = http.open("a b%?#")
    server.blobs["a%20b%25%3F%23"] = DATA
    for _ in range(5):
        assert reader.read_at(10, 20) == DATA[10:30]
    assert server.connections == 1
    assert server.ranges[0] == ("a%20b%25%3F%23", "bytes=10-29")
    assert server.headers[0]["User-Agent"] == "nydusd/1.0.0"
    assert server.headers[0]["Accept-Encoding"] == "identity"


def test_http_large_answers_keep_the_connection(server, http):
    reader = http.open(BLOB)
    for _ in range(3):
        assert reader.read_at(0, len(DATA)) == DATA
    server.fault = "chunked"
    assert reader.read_at(0, len(DATA)) == DATA
    assert reader.read_at(0, 10) == DATA[:10]
    assert server.connections == 1


@pytest.mark.parametrize(
    ("fault", "kind", "temporary"),
    [
        (400, BackendError, False),
        (401, AuthError, False),
        (403, AuthError, False),
        (404, NotFound, False),
        (416, BackendError, False),
        (302, BackendError, False),
        (429, Unavailable, True),
        (500, Unavailable, True),
        (503, Unavailable, True),
        ("truncate", ShortRead, True),
        ("short-length", ShortRead, True),
        ("long", BackendError, False),
        ("long-length", BackendError, False),
        ("wrong-range", BackendError, False),
        ("ignore-range", BackendError, False),
        ("reset", Unavailable, True),
        ("stall", Unavailable, True),
        ("drip", Unavailable, True),
    ],
)
def test_http_faults(server, http, fault, kind, temporary):
    reader = http.open(BLOB)
    assert reader.read_at(0, 10) == DATA[:10]
    server.fault, server.fault_count = fault, 1
    with pytest.raises(NydusError) as caught:
        reader.read_at(4096, 8192)
    assert type(caught.value) is kind
    assert caught.value.temporary is temporary
    assert caught.value.where["blob"] == BLOB
    # The next answer is not mixed up with the rest of the broken one.
    assert reader.read_at(100_000, 5000) == DATA[100_000:105_000]
    assert http.metrics.as_dict()["read_errors"] == 1


def test_http_ignored_range_is_not_read(server, http):
    server.blobs[BLOB] = bytes(64 << 20)
    server.fault = "ignore-range"
    with pytest.raises(BackendError, match="ignores ranges"):
        http.open(BLOB).read_at(0, 4096)
    server.stop()
    assert server.bytes_sent[BLOB] == 0


def test_http_stream_is_one_request_without_a_range(server, http):
    with http.open(BLOB).stream(0) as pieces:
        assert b"".join(pieces) == DATA
    with http.open(BLOB).stream(4096) as pieces:
        assert b"".join(pieces) == DATA[4096:]
    assert server.ranges == [(BLOB, None), (BLOB, "bytes=4096-")]
    assert server.headers[0]["X-Dragonfly-Prefetch"] == "true"
    assert server.connections == 1


@pytest.mark.parametrize(
    ("fault", "kind", "temporary"),
    [
        (403, AuthError, False),
        (404, NotFound, False),
        (206, BackendError, False),
        (503, Unavailable, True),
        ("truncate", ShortRead, True),
        ("reset", Unavailable, True),
        ("stall", Unavailable, True),
        ("wrong-range", BackendError, False),
        ("ignore-range", BackendError, False),
    ],
)
def test_http_faults_of_a_stream(server, http, fault, kind, temporary):
    server.fault, server.fault_count = fault, 1
    offset = 4096 if fault in ("wrong-range", "ignore-range") else 0
    with pytest.raises(BackendError) as caught, http.open(BLOB).stream(offset) as pieces:
        list(pieces)
    assert type(caught.value) is kind
    assert caught.value.temporary is temporary
    assert caught.value.where["blob"] == BLOB
    with http.open(BLOB).stream(0) as pieces:
        assert b"".join(pieces) == DATA
    assert http.metrics.as_dict()["read_errors"] == 1


def test_http_reasons(tmp_path):
    reasons = {
        "http://nowhere.invalid": "nowhere.invalid (name does not resolve)",
        "http://127.0.0.1:1": "127.0.0.1:1 (Connection refused)",
        str(tmp_path / "none"): f"unix socket {tmp_path}/none (No such file or directory)",
    }
    for addr, reason in reasons.items():
        with pytest.raises(Unavailable) as caught:
            open_backend(HttpProxyConfig(addr)).open(BLOB).read_at(0, 1)
        assert caught.value.what == f"no answer from {reason}"


def test_http_dead_and_back(server, http):
    reader = http.open(BLOB)
    assert reader.read_at(0, 10) == DATA[:10]
    server.stop()
    for _ in range(2):
        with pytest.raises(Unavailable, match="Connection re") as caught:
            reader.read_at(0, 10)
        assert caught.value.temporary
    server.start()
    assert reader.read_at(0, 10) == DATA[:10]


@pytest.mark.parametrize(
    "addr", ["", "ftp://x", "host:80", "http://", "http://user:secret@host", "relative/path"]
)
def test_http_bad_addresses(addr):
    with pytest.raises(BackendError) as caught:
        open_backend(HttpProxyConfig(addr))
    assert "secret" not in str(caught.value)


def test_certificates_are_loaded_for_https_alone(monkeypatch):
    """They take as long as all else of a first read."""

    def refused(config):
        raise BackendError("certificates")

    monkeypatch.setattr("fscache.backend.transport.tls_context", refused)
    sender = DirectSender(NetworkConfig())
    sender.prepare("http://host/path")
    for address in ("https://host/path", "HTTPS://host"):
        with pytest.raises(BackendError, match="certificates"):
            sender.prepare(address)
        with pytest.raises(BackendError, match="certificates"):
            sender.send("GET", address, {}, time.monotonic() + 1)
    sender.close()


def test_https_with_a_missing_authority(tmp_path):
    with pytest.raises(BackendError, match="certificates"):
        open_backend(HttpProxyConfig("https://127.0.0.1", ca_cert_files=(tmp_path / "none",)))


# Retries


def failing(times, error):
    calls = []

    def operation():
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    return calls, operation


FAST = RetryPolicy(first_delay=0.001)


def test_retry_temporary_until_it_works():
    calls, operation = failing(3, Unavailable("x", temporary=True))
    assert FAST.run(operation, threading.Event()) == "done"
    assert len(calls) == 4


def test_retry_gives_up():
    calls, operation = failing(9, Unavailable("x", temporary=True))
    with pytest.raises(Unavailable):
        FAST.run(operation, threading.Event())
    assert len(calls) == 4


def test_retry_not_for_permanent_errors():
    calls, operation = failing(9, NotFound("x"))
    with pytest.raises(NotFound):
        FAST.run(operation, threading.Event())
    assert len(calls) == 1


def test_retry_stops_when_told():
    stop = threading.Event()
    stop.set()
    calls, operation = failing(9, Unavailable("x", temporary=True))
    with pytest.raises(Unavailable):
        RetryPolicy(first_delay=60).run(operation, stop)
    assert len(calls) == 1


def test_retry_keeps_the_pause_that_the_server_asks_for():
    calls, operation = failing(1, Unavailable("x", temporary=True, retry_after=0.2))
    begin = time.monotonic()
    assert FAST.run(operation, threading.Event()) == "done"
    assert time.monotonic() - begin >= 0.2
    calls, operation = failing(9, Unavailable("x", temporary=True, retry_after=3600.0))
    with pytest.raises(Unavailable):
        FAST.run(operation, threading.Event())
    assert len(calls) == 1


def test_retry_limit_of_the_configuration():
    assert retry_policy(LocalFsConfig()).attempts == 4
    assert retry_policy(HttpProxyConfig("http://x")).attempts == 4
    assert retry_policy(HttpProxyConfig("http://x", retry_limit=7)).attempts == 8


def test_retry_deadline():
    calls, operation = failing(9, Unavailable("x", temporary=True))
    with pytest.raises(Unavailable):
        RetryPolicy(first_delay=60, deadline=1).run(operation, threading.Event())
    assert len(calls) == 1
