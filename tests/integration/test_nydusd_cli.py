"""`nydusd erofs` as a user meets it: arguments, messages, exit status, API, signals."""

import http.client
import json
import os
import re
import signal
import socket

import pytest
from capabilities import requires
from fakes.blob_server import BlobServer
from serving import TIMEOUT, build_image, wait_until, write_config

pytestmark = [
    pytest.mark.root,
    pytest.mark.fanotify,
    pytest.mark.erofs_mount,
    requires("root", "erofs_mount", "fanotify"),
]

CONTENT = b"served\n" * 1000


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    top = tmp_path_factory.mktemp("cli")
    (top / "source").mkdir()
    (top / "source/file").write_bytes(CONTENT)
    return build_image(top / "source", top / "image")


@pytest.fixture
def user(serving, image):
    return User(serving, image)


class User:
    """Somebody in a directory with `boot`, `blobs`, `mnt` and `config.json`."""

    def __init__(self, serving, image):
        self.serving = serving
        self.home = serving.directory
        self.image = image
        (self.home / "boot").write_bytes(image.bootstrap.read_bytes())
        (self.home / "blobs").mkdir()
        for name, data in image.blobs().items():
            (self.home / "blobs" / name).write_bytes(data)
        os.mkfifo(self.home / "fifo")
        self.top = serving.mountpoint("mnt")
        write_config(self.home / "config.json", image, work_dir=self.home / "cache")

    def run(self, *args):
        """Run a command that ends by itself; return exit status, standard output and errors."""
        daemon = self.serving.nydusd(*args, cwd=self.home)
        status = daemon.end()
        assert not os.path.ismount(self.top)
        return status, daemon.process.stdout.read().decode(), daemon.stderr

    def serve(self, *args):
        """Start a daemon that stays, and wait until it serves."""
        daemon = self.serving.nydusd(*OK, *args, cwd=self.home)
        daemon.wait_for("serving ")
        assert os.path.ismount(self.top)
        return daemon

    def api(self, method, path, sock="api"):
        """Send one request; return status and decoded body."""
        connection = http.client.HTTPConnection("localhost", timeout=TIMEOUT)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(TIMEOUT)
        connection.sock.connect(str(self.home / sock))
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        return answer.status, json.loads(body) if body else None


OK = ("erofs", "-B", "boot", "-M", "mnt", "-C", "config.json")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((), "a command is required"),
        (("bogus",), "invalid choice: 'bogus'"),
        (("erofs",), "required: -M/--mountpoint"),
        (("erofs", "-M", "mnt"), "--bootstrap <bootstrap> or --image <reference>"),
        (("-B", "boot"), "required: -M/--mountpoint"),
        (("erofs", "-B", "boot", "-M", "mnt"), "--config <config> or --localfs-dir"),
        (("fuse", "-B", "boot", "-M", "mnt"), "--config <config> or --localfs-dir"),
        (("-B", "boot", "-M", "mnt", "-s", ".", "-D", "."), "cannot be used with '--shared-dir"),
        ((*OK, "-D", "blobs"), "cannot be used with '--localfs-dir"),
        ((*OK, "extra"), "unrecognized arguments: extra"),
        ((*OK, "--eage"), "unrecognized arguments: --eage\n\nUsage: nydusd erofs "),
        ((*OK, "-l", "loud"), "invalid choice: 'loud'"),
        ((*OK, "-A"), "expected one argument"),
        ((*OK, "--rlimit-nofile", "-5"), "expected a number of files, got '-5'"),
        ((*OK, "--rlimit-nofile", "9" * 20), "expected a number of files"),
        (("-M", "mnt", "--upgrade"), "--apisock <apisock>"),
        (("singleton", "--upgrade"), "--apisock <apisock>"),
        (("-M", "mnt", "--thread-num", "1025"), "expected a number from 1 to 1024, got '1025'"),
        (("-M", "mnt", "--failover-policy", "x"), "expected one of none, resend, flush, got 'x'"),
    ],
)
def test_wrong_arguments(user, args, text):
    status, out, err = user.run(*args)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert text in err
    assert "\nUsage: nydusd" in err
    assert "For more information, try '--help'." in err


def test_help_and_version(user):
    status, out, err = user.run("erofs", "--help")
    assert (status, err) == (0, "")
    assert "--eager" in out
    assert "--apisock" in out
    assert user.run("help", "erofs") == (status, out, err)
    assert "Without a command it is fuse" in user.run("help")[1]
    status, out, err = user.run("--version")
    assert (status, err) == (0, "")
    assert re.match(r"nydusd Version: \t\S+\n", out)
    # nydus-snapshotter compares this with what the API says.
    assert re.search(r"Git Commit:\s*(.+)", out)[1] == "unknown"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"-B": "absent"}, "absent: bootstrap cannot be opened (No such file or directory)"),
        ({"-B": os.fsdecode(b"\xff\n")}, "cannot be opened (No such file or directory)"),
        ({"-B": "blobs"}, "blobs: bootstrap cannot be opened (Is a directory)"),
        ({"-B": "fifo"}, "fifo: bootstrap cannot be opened (Illegal seek)"),
        ({"-B": "config.json"}, "config.json: not an EROFS image"),
        ({"-M": "absent"}, "absent: mount point is not a directory"),
        ({"-M": "boot"}, "boot: mount point is not a directory"),
        ({"-C": "absent.json"}, "absent.json: cannot be read (No such file or directory)"),
        ({"-C": "boot"}, "boot: configuration is not UTF-8"),
        ({"-C": None, "-D": "absent"}, "absent: not a directory"),
        ({"-L": "boot/log"}, "boot/log.log: Not a directory"),
        ({"-A": "absent/api"}, "absent/api: API socket cannot be made (No such file"),
        ({"-A": "x" * 200}, "API socket cannot be made (AF_UNIX path too long)"),
        ({"-A": "boot"}, "boot: API socket cannot be made (Address already in use)"),
    ],
)
def test_wrong_places(user, change, text):
    options = {"-B": "boot", "-M": "mnt", "-C": "config.json", **change}
    args = [word for pair in options.items() if pair[1] is not None for word in pair]
    before = {path for path in user.home.iterdir() if path.name != "cache"}
    status, out, err = user.run("erofs", *args)
    assert (status, out) == (1, "")
    # The log comes first, the reason last; a name may contain a newline.
    assert err.startswith(("Error: ", "["))
    assert text in err[err.index("Error: ") :]
    assert {path for path in user.home.iterdir() if path.name != "cache"} == before
    assert not list((user.home / "cache").glob("serve-*"))


def v1(backend=None, cache=None, **device):
    return {
        "device": {
            "backend": backend or {"type": "localfs", "config": {"dir": "blobs"}},
            "cache": cache or {"type": "blobcache", "config": {"work_dir": "cache"}},
            **device,
        }
    }


def v2(backend):
    cache = {"type": "filecache", "filecache": {"work_dir": "cache"}}
    return {"version": 2, "backend": backend, "cache": cache}


SECRET = "secretive"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("", "device.backend.type: missing"),
        ("{", "neither JSON nor TOML"),
        ("[1, 2]", "configuration: expected an object, got a list"),
        ({"device": 5}, "device: expected an object, got a whole number"),
        (v1({"type": "localfs", "config": {"dir": 7}}), "device.backend.config.dir: expected text"),
        (v1({"type": "localfs", "config": {}}), "device.backend.config.dir: missing"),
        (v1({"type": "ftp", "config": {}}), "device.backend.type: unknown backend 'ftp'"),
        (v1({"config": {}}), "device.backend.type: missing"),
        (v1({"type": "http-proxy", "config": {}}), "device.backend.config.addr: missing"),
        (
            v1({"type": "http-proxy", "config": {"addr": "http://h", "timeout": "5"}}),
            "device.backend.config.timeout: expected a number, got text",
        ),
        (v1(cache={"type": "dummycache"}), "device.cache.type: expected blobcache or filecache"),
        (
            v1(cache={"type": "blobcache", "config": {"work_dir": True}}),
            "device.cache.config.work_dir: expected text, got true or false",
        ),
        ({"version": 3}, "version: expected 2"),
        (v2({"type": "localfs", "localfs": {"dir": []}}), "backend.localfs.dir: expected text"),
        (v2({"type": "s4"}), "backend.type: unknown backend 's4'"),
        (
            v1({"type": "http-proxy", "config": {"addr": f"http://u:{SECRET}@localhost"}}),
            "with credentials is not supported",
        ),
    ],
)
def test_configuration_errors_name_the_key(user, config, text):
    content = config if isinstance(config, str) else json.dumps(config)
    (user.home / "config.json").write_text(content)
    status, out, err = user.run(*OK)
    assert (status, out) == (1, "")
    assert "Error: " in err
    assert text in err
    assert SECRET not in err


def test_unknown_key_is_warned_about_and_served(user):
    (user.home / "config.json").write_text(json.dumps(v1(surplus=1)))
    daemon = user.serve()
    assert "WARN configuration: unknown key device.surplus" in daemon.stderr
    assert user.serving.read(user.top / "file") == CONTENT


def test_configuration_in_toml(user):
    (user.home / "config.json").write_text(
        'version = 2\n[backend]\ntype = "localfs"\n[backend.localfs]\ndir = "blobs"\n'
        '[cache]\ntype = "blobcache"\n[cache.filecache]\nwork_dir = "cache"\n'
    )
    daemon = user.serve()
    assert user.serving.read(user.top / "file") == CONTENT
    daemon.send(signal.SIGTERM)
    assert daemon.end() == 0


def test_localfs_dir_holds_blobs_and_cache(user):
    args = ("erofs", "-B", "boot", "-M", "mnt", "-D", "blobs", "--directio")
    daemon = user.serving.nydusd(*args, cwd=user.home)
    daemon.wait_for("serving ")
    assert user.serving.read(user.top / "file") == CONTENT
    assert list((user.home / "blobs").glob("*.blob.data"))
    daemon.send(signal.SIGTERM)
    assert daemon.end() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("eager", [False, True])
def test_signal_unmounts_and_ends(user, number, eager):
    daemon = user.serve("-A", "api", *(["--eager"] if eager else []))
    daemon.send(number)
    assert daemon.end() == 0
    assert not os.path.ismount(user.top)
    assert not (user.home / "api").exists()
    assert not list((user.home / "cache").glob("serve-*"))
    assert daemon.process.stdout.read() == b""


def test_interrupted_eager_start(user, stack):
    server = stack.enter_context(BlobServer(user.image.blobs()))
    server.fault = "stall"
    # Its end waits for the answer; its beginning gives up after four of them.
    backend = {"type": "http-proxy", "config": {"addr": server.address, "timeout": 3}}
    write_config(user.home / "config.json", user.image, backend)
    daemon = user.serving.nydusd(*OK, "--eager", "-A", "api", cwd=user.home)
    wait_until(lambda: server.ranges)
    daemon.send(signal.SIGINT)
    assert daemon.end() == 130
    assert "Error: interrupted before the image was mounted" in daemon.stderr
    assert not os.path.ismount(user.top)
    assert not (user.home / "api").exists()


def test_eager_with_a_missing_blob(user):
    for path in (user.home / "blobs").iterdir():
        path.unlink()
    (user.home / "config.json").write_text(json.dumps(v1()))
    status, out, err = user.run(*OK, "--eager")
    assert (status, out) == (1, "")
    assert re.search(r"^Error: .*no such blob", err, re.MULTILINE)


def test_log_file_takes_the_log(user):
    daemon = user.serving.nydusd(*OK, "-L", "log", "-l", "debug", cwd=user.home)
    log = user.home / "log.log"
    wait_until(lambda: log.exists() and "serving " in log.read_text())
    daemon.send(signal.SIGTERM)
    assert daemon.end() == 0
    assert daemon.stderr == ""
    assert "INFO state RUNNING -> STOPPED" in log.read_text()


def test_api(user):
    daemon = user.serve("-A", "api")
    assert (user.home / "api").stat().st_mode & 0o777 == 0o600
    status, info = user.api("GET", "/api/v1/daemon")
    assert status == 200
    assert info["state"] == "RUNNING"
    assert set(info["version"]) == {"package_ver", "git_commit", "build_time", "profile", "rustc"}
    assert info["backend_collection"]["/"]["mountpoint"] == "/"
    assert user.api("GET", "/api/v1/metrics/blobcache")[1]["entries_count"] == 0
    assert user.serving.read(user.top / "file") == CONTENT
    status, cache = user.api("GET", "/api/v1/metrics/blobcache")
    assert (status, cache["entries_count"]) == (200, 1)
    status, backend = user.api("GET", "/api/v1/metrics/backend")
    assert status == 200
    assert (backend["backend_type"], backend["read_errors"]) == ("localfs", 0)
    assert backend["read_count"] == 1
    assert 0 < backend["read_amount_total"] < len(CONTENT)
    status, failure = user.api("GET", "/api/v1/nowhere")
    assert (status, set(failure)) == (404, {"code", "message"})
    assert user.api("PUT", "/api/v1/daemon")[0] == 400
    assert user.api("PUT", "/api/v1/daemon/exit") == (204, None)
    assert daemon.end() == 0
    assert not os.path.ismount(user.top)
    assert not (user.home / "api").exists()


def test_stale_socket_is_replaced(user):
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(user.home / "api"))
    assert (user.home / "api").is_socket()
    user.serve("-A", "api")
    assert user.api("GET", "/api/v1/daemon")[0] == 200


def test_socket_in_use_is_refused(user):
    first = user.serve("-A", "api")
    other = user.serving.mountpoint()
    second = user.serving.nydusd(
        "erofs", "-B", "boot", "-M", other, "-C", "config.json", "-A", "api", cwd=user.home
    )
    assert second.end() == 1
    assert "Error: api: another process serves this socket" in second.stderr
    assert not os.path.ismount(other)
    assert user.api("GET", "/api/v1/daemon")[0] == 200
    assert first.process.poll() is None
