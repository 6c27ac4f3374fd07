"""The daemon without a kernel: states, refused images, and the API on its socket."""

import http.client
import json
import socket

import pytest

from builder.build import BuildOptions, build
from erofs import CorruptStructure, open_bootstrap
from fscache.api.server import ApiError, ApiServer
from fscache.backend import LocalFsConfig
from fscache.cache.plan import PlanError, read_plan
from fscache.config import DaemonConfig
from fscache.daemon import Daemon, State, StateError
from fscache.mounts.mount import MountError


@pytest.fixture
def image(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"content" * 5000)
    build(source, BuildOptions(bootstrap=tmp_path / "boot", blob_dir=tmp_path))
    return tmp_path / "boot"


def make(tmp_path, bootstrap, mountpoint=None):
    config = DaemonConfig(LocalFsConfig(dir=tmp_path), tmp_path / "cache", "label")
    return Daemon(config, bootstrap, mountpoint or tmp_path)


def test_plans_hold_every_chunk(image):
    (plan,) = read_plan(image).blobs
    with open_bootstrap(image) as bootstrap:
        assert plan.entry == bootstrap.blobs[0]
        assert tuple(plan.chunks) == bootstrap.chunk_infos


@pytest.mark.parametrize(
    ("offset", "text"),
    [(1408 + 64, "differ in size"), (1408, "name different blobs")],
)
def test_device_table_that_contradicts_the_blob_table(image, offset, text):
    data = bytearray(image.read_bytes())
    data[offset] ^= 1
    image.write_bytes(data)
    with pytest.raises(CorruptStructure, match=text) as caught:
        read_plan(image)
    assert caught.value.where["path"] == image


def test_start_that_fails_ends_stopped(tmp_path, image):
    daemon = make(tmp_path, tmp_path / "nothing")
    with pytest.raises(PlanError, match="bootstrap cannot be opened"):
        daemon.start()
    assert daemon.state is State.STOPPED
    daemon.stop()
    with pytest.raises(StateError, match="is STOPPED, not INIT"):
        daemon.start()


def test_mountpoint_is_looked_at_first(tmp_path, image):
    daemon = make(tmp_path, image, tmp_path / "nowhere")
    with pytest.raises(MountError, match="not a directory"):
        daemon.start()
    assert not (tmp_path / "cache").exists()


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=60)
        self._path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(self._path)


@pytest.fixture
def api(tmp_path, image):
    daemon = make(tmp_path, image)
    server = ApiServer(tmp_path / "api.sock")
    server.serve(daemon)
    connection = UnixConnection(tmp_path / "api.sock")
    yield daemon, connection
    connection.close()
    server.close()
    assert not (tmp_path / "api.sock").exists()


def ask(connection, method, path, body=None):
    connection.request(method, path, body)
    answer = connection.getresponse()
    return answer, answer.read()


def test_daemon_information(api):
    _, connection = api
    answer, body = ask(connection, "GET", "/api/v1/daemon")
    assert (answer.status, answer.reason) == (200, "")
    assert answer.headers["Server"] == "Nydus API"
    info = json.loads(body)
    assert info["state"] == "INIT"
    assert set(info["version"]) == {
        "package_ver", "git_commit", "build_time", "profile", "rustc",
    }  # fmt: skip
    # Keep-alive: the same connection serves again.
    assert ask(connection, "GET", "/api/v1/daemon")[0].status == 200


def test_idle_connections_stay(api, monkeypatch, tmp_path):
    """nydus-snapshotter keeps one open, sends nothing, and takes its end for our death."""
    monkeypatch.setattr("fscache.api.handler._Handler.timeout", 0.05)
    with socket.socket(socket.AF_UNIX) as idle, socket.socket(socket.AF_UNIX) as slow:
        idle.connect(str(tmp_path / "api.sock"))
        slow.connect(str(tmp_path / "api.sock"))
        slow.sendall(b"GET /api/v1/dae")
        slow.settimeout(60)
        # One that stops within a request is closed.
        assert slow.recv(1) == b""
        idle.settimeout(0.2)
        with pytest.raises(TimeoutError):
            idle.recv(1)
        idle.settimeout(60)
        idle.sendall(b"GET /api/v1/daemon HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(100).startswith(b"HTTP/1.1 200 ")


def say(path, request):
    """Send bytes on a connection of their own, and return all that is said to them."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b""))


INFLIGHT = b"GET /api/v1/metrics/inflight HTTP/1.1\r\n"
LEVEL = b'{"log_level":"info"}'


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /api/v1/daemon\r\n\r\n",
        b"GET /api/v1/daemon HTTP/2.0\r\n\r\n",
        b"GET  /api/v1/daemon HTTP/1.1\r\n\r\n",
        b"GET http://[x/api/v1/daemon HTTP/1.1\r\n\r\n",
        b"\0\1\2\r\n\r\n",
        b"BREW /api/v1/daemon HTTP/1.1\r\n\r\n",
        b"get /api/v1/daemon HTTP/1.1\r\n\r\n",
        INFLIGHT + b"no field\r\n\r\n",
        INFLIGHT + b": nameless\r\n\r\n",
        INFLIGHT + b"A: b\r\n folded: c\r\n\r\n",
        INFLIGHT + b"Content-Length : 0\r\n\r\n",
        INFLIGHT + b"Content-Length: 0\r\ncontent-length: 1\r\n\r\n",
        INFLIGHT + b"Content-Length: -1\r\n\r\n",
        INFLIGHT + b"Content-Length: " + b"1" * 5000 + b"\r\n\r\n",
        INFLIGHT + b"Host: x\r\n",
        # As long as a head can be.
        (INFLIGHT + b"X: ").ljust(65_536, b"x"),
        b"PUT /api/v1/daemon HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"PUT /api/v1/daemon HTTP/1.1\r\nContent-Length: 60016\r\n\r\n" + b"x" * 60016,
    ],
)
def test_requests_that_are_none(api, tmp_path, request_bytes):
    said = say(tmp_path / "api.sock", request_bytes)
    assert said.startswith(b"HTTP/1.1 400 \r\n")
    # Once: what follows is not taken for a request.
    assert said.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in said
    assert json.loads(said.partition(b"\r\n\r\n")[2])["code"] == "UNDEFINED"


@pytest.mark.parametrize(
    ("request_bytes", "statuses"),
    [
        (INFLIGHT + b"\r\n" + INFLIGHT + b"Host: x\n\n", [204, 204]),
        (b"\r\n" + INFLIGHT + b"Connection: Close\r\n\r\n" + INFLIGHT + b"\r\n", [204]),
        (INFLIGHT.replace(b"1.1\r", b"1.0\r") + b"\r\n" + INFLIGHT + b"\r\n", [204]),
        (
            INFLIGHT.replace(b"1.1\r", b"1.0\r") + b"Connection: keep-alive\r\n\r\n"
            + INFLIGHT + b"\r\n",
            [204, 204],
        ),
        (
            b"PUT /api/v1/daemon HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 20\r\n\r\n"
            + LEVEL,
            [100, 204],
        ),
        (b"", []),
    ],
)  # fmt: skip
def test_several_requests(api, tmp_path, request_bytes, statuses):
    said = say(tmp_path / "api.sock", request_bytes)
    assert [int(part[:3]) for part in said.split(b"HTTP/1.1 ")[1:]] == statuses


def test_clients_wait_for_the_start(tmp_path, image):
    daemon = make(tmp_path, image)
    server = ApiServer(tmp_path / "api.sock")
    try:
        client = UnixConnection(tmp_path / "api.sock")
        client.request("GET", "/api/v1/daemon")
        server.serve(daemon, starts=True)
        # As the daemon's start would.
        daemon.enter(State.READY)
        daemon.enter(State.RUNNING)
        server.started()
        assert json.loads(client.getresponse().read())["state"] == "RUNNING"
    finally:
        server.close()
    assert not (tmp_path / "api.sock").exists()


def test_a_server_that_never_serves_is_closed(tmp_path):
    ApiServer(tmp_path / "api.sock").close()
    assert not (tmp_path / "api.sock").exists()


def test_exit_asks_for_a_stop(api):
    daemon, connection = api
    answer, body = ask(connection, "PUT", "/api/v1/daemon/exit")
    assert (answer.status, body) == (204, b"")
    daemon.wait()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/api/v1/daemon/", 404),
        ("PUT", "/api/v1/daemon", 400),
        ("DELETE", "/api/v1/daemon/exit", 400),
        ("GET", "/api/v1/metrics/backend", 404),
    ],
)
def test_refusals(api, method, path, status):
    answer, body = ask(api[1], method, path)
    assert answer.status == status
    assert json.loads(body)["code"] == "UNDEFINED"


def test_large_bodies_are_refused(api):
    answer, _ = ask(api[1], "PUT", "/api/v1/daemon/exit", b"x" * 51_201)
    assert answer.status == 400
    assert answer.headers["Connection"] == "close"


CONFIG = {
    "device": {
        "backend": {"type": "localfs", "config": {"dir": "/nowhere"}},
        "cache": {"type": "blobcache", "config": {"work_dir": "/nowhere"}},
    },
}


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"source": "/a\0b"}, 400),
        ({"source": "/a\ud800b"}, 400),
        ({"source": "/a\0b", "fs_type": "passthrough_fs"}, 400),
        ({"prefetch_files": ["/a\0b"]}, 400),
        ({"prefetch_files": ["/a\ud800b"]}, 400),
        ({"config": json.dumps(CONFIG | {"device": CONFIG["device"] | {"id": "\0"}})}, 500),
        ({"config": json.dumps(CONFIG).replace("/nowhere", "/no\\u0000where")}, 500),
        ({"config": json.dumps(CONFIG).replace("/nowhere", "/no\\ud800where")}, 500),
        ({"config": '{"version": %s}' % ("1" * 5000)}, 500),
        ({"config": "version = %s" % ("1" * 5000)}, 500),
    ],
)  # fmt: skip
def test_text_that_no_path_has_is_answered(api, caplog, change, status):
    body = {"source": "/boot", "fs_type": "rafs", "config": json.dumps(CONFIG), **change}
    answer, text = ask(api[1], "POST", "/api/v1/mount?mountpoint=/a", json.dumps(body).encode())
    assert answer.status == status
    assert "daemon is INIT" not in json.loads(text)["message"]
    assert not caplog.records


def test_a_bug_is_logged_and_ends_the_connection_alone(api, tmp_path, monkeypatch, caplog):
    def fails(daemon, request):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("fscache.api.handler.answer", fails)
    assert say(tmp_path / "api.sock", INFLIGHT + b"\r\n") == b""
    (record,) = caplog.records
    assert record.exc_info[0] is ZeroDivisionError
    monkeypatch.undo()
    assert say(tmp_path / "api.sock", INFLIGHT + b"\r\n").startswith(b"HTTP/1.1 204")


def test_sockets(tmp_path, image):
    daemon = make(tmp_path, image)
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    server = ApiServer(path)
    server.serve(daemon)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ApiError, match="another process serves"):
        ApiServer(path)
    server.close()
    path.write_text("a file")
    with pytest.raises(ApiError, match="cannot be made"):
        ApiServer(path)
    assert path.read_text() == "a file"


def test_credentials_are_replaced_and_never_shown(api):
    daemon, connection = api
    # One that serves nothing yet would forget them.
    assert ask(connection, "PUT", "/api/v1/config", b'{"registry_auth": "dTpw"}')[0].status == 500
    assert json.loads(ask(connection, "GET", "/api/v1/config")[1]) == {}
    daemon.enter(State.READY)
    daemon.enter(State.RUNNING)
    daemon._runtime = object()
    assert ask(connection, "PUT", "/api/v1/config", b'{"registry_auth": "dTpw"}')[0].status == 204
    shown = ask(connection, "GET", "/api/v1/config")[1]
    assert json.loads(shown) == {"registry_auth": "<hidden>"}
    refused = (b'{"x": "1"}', b'{"registry_auth": "dTpw!"}', b'{"registry_auth": ""}')
    for body, status in (*((body, 500) for body in refused), (b"{", 400), (b"{}", 204)):
        answer, text = ask(connection, "PUT", "/api/v1/config", body)
        assert answer.status == status
        assert b"dTpw" not in text
