"""`nydusd fuse` with mounts below an image, at a virtual mount point, and with a writable layer."""

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading

import pytest
from capabilities import requires
from fakes.blob_server import BlobServer
from serving import TIMEOUT, build_image, wait_until

from fscache.mounts.place import is_our_overlay, mounted_at

pytestmark = [
    pytest.mark.root,
    pytest.mark.fanotify,
    pytest.mark.erofs_mount,
    requires("root", "erofs_mount", "fanotify"),
]

CHUNK = 64 << 10
_HOLD = """
import os, sys
os.chdir(sys.argv[1])
print("in", flush=True)
sys.stdin.readline()
print(open(sys.argv[2]).read())
"""
_MAP = """
import mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
    sys.stdout.buffer.write(data[:])
"""


def content(name):
    return random.Random(name).randbytes(3 * CHUNK + 17)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    top = tmp_path_factory.mktemp("images")
    built = {}
    for name in ("one", "two"):
        source = top / name
        (source / "dir").mkdir(parents=True)
        (source / "dir").chmod(0o711)
        (source / "name").write_text(name)
        for file in ("read", "map", "late"):
            (source / file).write_bytes(content(name + file))
        shutil.copy("/bin/cat", source / "cat")
        built[name] = build_image(source, top / f"{name}.image", chunk_size=CHUNK)
    return built


class Node:
    """A client of daemons at one mount point."""

    def __init__(self, serving, images):
        self.serving = serving
        self.images = images
        self.home = serving.directory
        self.top = serving.mountpoint("mnt")
        self.blobs = self.home / "blobs"
        self.blobs.mkdir()
        for image in images.values():
            for name, data in image.blobs().items():
                (self.blobs / name).write_bytes(data)

    def config(self, **more):
        return {
            "version": 2,
            "backend": {"type": "localfs", "localfs": {"dir": str(self.blobs)}},
            "cache": {"type": "blobcache", "filecache": {"work_dir": str(self.home / "cache")}},
            **more,
        }

    def layer(self, name="layer"):
        layer = {key: self.home / name / key for key in ("upper_dir", "work_dir")}
        for path in layer.values():
            path.mkdir(parents=True, exist_ok=True)
        return {key: str(path) for key, path in layer.items()}

    def start(self, *words, image=None, **config):
        """Start a daemon, by default with an empty mount point, and wait until it serves."""
        (self.home / "config.json").write_text(json.dumps(self.config(**config)))
        if image is not None:
            words += ("-B", self.images[image].bootstrap, "-C", self.home / "config.json")
        daemon = self.serving.nydusd("fuse", "-M", self.top, "-A", self.home / "api", *words)
        daemon.wait_for("-> RUNNING")
        return daemon

    def api(self, method, path, **body):
        connection = http.client.HTTPConnection("localhost", timeout=TIMEOUT)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.home / "api"))
        with contextlib.closing(connection):
            connection.request(method, f"/api/v1/{path}", json.dumps(body) if body else None)
            answer = connection.getresponse()
            text = answer.read()
        return answer.status, json.loads(text) if text else None

    def mount(self, path, image, method="POST", **config):
        bootstrap = str(self.images[image].bootstrap)
        text = json.dumps(self.config(**config))
        query = f"mount?mountpoint={path}"
        return self.api(method, query, source=bootstrap, fs_type="rafs", config=text)

    def bind(self, path, source):
        query = f"mount?mountpoint={path}"
        return self.api("POST", query, source=str(source), fs_type="passthrough_fs", config="")

    def unmount(self, path):
        return self.api("DELETE", f"mount?mountpoint={path}")

    def paths(self):
        return set(self.api("GET", "daemon")[1]["backend_collection"])

    def read(self, path):
        return self.serving.read(self.top / path)

    def names(self, path=""):
        return sorted(os.listdir(self.top / path))

    def end(self, daemon):
        daemon.send(signal.SIGTERM)
        assert daemon.end() == 0
        assert mounted_at(self.top) is None


@pytest.fixture
def node(serving, images, monkeypatch):
    monkeypatch.setenv("NYDUSD_RUN_DIR", str(serving.directory / "run"))
    # As long as a successor of a killed one may take to start.
    monkeypatch.setenv("NYDUSD_HOLDER_SECONDS", "60")
    return Node(serving, images)


IN_ONE = ["cat", "dir", "late", "map", "name", "read"]


def test_images_below_an_image_are_read_lazily(node):
    daemon = node.start(image="one")
    assert node.read("name") == b"one"
    assert node.mount("/sub/two", "two") == (204, None)
    assert node.paths() == {"/", "/sub/two"}
    assert is_our_overlay(node.top)
    for prefix, name in (("", "one"), ("sub/two/", "two")):
        assert node.read(prefix + "read") == content(name + "read")
        mapped = node.serving.child(_MAP, node.top / prefix / "map").finish()
        assert mapped == content(name + "map")
        # By way of a shell: this process must not execute what nobody else serves.
        command = ["/bin/sh", "-c", 'exec "$0" "$1"', node.top / prefix / "cat", "/dev/null"]
        subprocess.run(command, check=True, timeout=TIMEOUT)
    assert node.mount("/dir/three", "two") == (204, None)
    assert node.names("dir/three") == node.names("sub/two") == IN_ONE
    assert node.read("late") == content("onelate")
    assert node.read("dir/three/late") == content("twolate")
    assert (node.top / "dir").stat().st_mode & 0o7777 == 0o711
    assert node.unmount("/sub/two") == (204, None)
    assert node.unmount("/dir/three") == (204, None)
    assert node.names() == IN_ONE
    assert mounted_at(node.top).kind == "erofs"
    node.end(daemon)


def test_refused_mounts_change_nothing(node):
    daemon = node.start(image="one")
    for path, text in (
        ("/name", "no directory in the image"),
        ("/name/x", "no directory in the image"),
        ("/", "already exists"),
        ("//", "already exists"),
        ("x", "not an absolute path"),
    ):
        status, answer = node.mount(path, "two")
        assert (status, text in answer["message"]) == (500, True), answer
    assert node.bind("/x", node.home / "absent")[0] == 500
    assert node.names() == IN_ONE
    assert mounted_at(node.top).kind == "erofs"
    assert node.mount("/x", "two")[0] == 204
    for path in ("/x/dir", "/x/", "/./x"):
        assert node.mount(path, "two")[0] == 500
    assert node.paths() == {"/", "/x"}
    node.end(daemon)


def test_mounts_below_stay_when_the_image_above_goes_and_comes(node):
    daemon = node.start(image="one")
    assert node.mount("/a/two", "two")[0] == 204
    assert node.unmount("/") == (204, None)
    assert mounted_at(node.top).kind == "tmpfs"
    assert node.names() == ["a"]
    assert node.read("a/two/read") == content("tworead")
    assert node.mount("/", "one") == (204, None)
    assert node.mount("/", "two", method="PUT") == (204, None)
    assert node.read("name") == b"two"
    assert node.read("a/two/late") == content("twolate")
    assert node.unmount("/a/two")[0] == 204
    assert node.unmount("/")[0] == 204
    assert node.names() == []
    node.end(daemon)


def test_users_of_all_kinds_are_waited_for(node):
    daemon = node.start(image="one")
    assert node.mount("/a", "two")[0] == 204
    below = node.serving.child(_HOLD, node.top / "a", "name")
    above = node.serving.child(_HOLD, node.top / "dir", "../name")
    below.line(), above.line()
    assert node.mount("/b", "two")[0] == 204
    daemon.send(signal.SIGTERM)
    daemon.wait_for("mounts still have users")
    assert mounted_at(node.top) is None
    # What they read now was not read before.
    for child, name in ((below, b"two"), (above, b"one")):
        child.go()
        assert child.finish().strip() == name
    assert daemon.end() == 0


def test_virtual_mount_point(node):
    daemon = node.start("-m", "/some//where/", image="one")
    assert node.paths() == {"/some/where"}
    assert node.names() == ["some"]
    assert node.read("some/where/read") == content("oneread")
    assert node.api("GET", "metrics?id=/some/where")[1]["id"] == "/some/where"
    assert node.api("GET", "daemon/backend?mountpoint=/some/where")[0] == 200
    assert node.mount("/some/where", "two")[0] == 500
    assert node.mount("/some/two", "two")[0] == 204
    assert node.names("some") == ["two", "where"]
    node.end(daemon)


@pytest.mark.parametrize("path", ["relative", "/a/../b"])
def test_impossible_virtual_mount_point(node, path):
    daemon = node.serving.nydusd("-M", node.top, "-m", path)
    assert daemon.end() == 2
    assert "mount point is not an absolute path" in daemon.stderr


def test_what_is_written_stays(node):
    layer = node.layer()
    daemon = node.start("--writable", image="one", overlay=layer)
    assert is_our_overlay(node.top)
    node.serving.child(
        "import os, sys; os.chdir(sys.argv[1]); open('new', 'w').write('new');"
        "os.remove('name'); open('read', 'r+b').write(b'changed'); os.mkdir('dir/made')",
        node.top,
    ).finish()
    assert node.read("read") == b"changed" + content("oneread")[7:]
    node.end(daemon)
    assert sorted(os.listdir(layer["upper_dir"])) == ["dir", "name", "new", "read"]
    daemon = node.start("--writable", image="one", overlay=layer)
    assert node.names() == sorted({*IN_ONE, "new"} - {"name"})
    assert node.read("new") == b"new"
    # Mounts below have their directories in the layer, for as long as they are there.
    assert node.mount("/dir/sub/two", "two") == (204, None)
    assert node.read("dir/sub/two/name") == b"two"
    assert node.unmount("/dir/sub/two") == (204, None)
    assert node.names("dir") == ["made"]
    assert node.mount("/dir/made", "two") == (204, None)
    assert node.unmount("/dir/made") == (204, None)
    assert node.names("dir") == ["made"]
    (node.top / "out").symlink_to(node.home)
    for path in ("/out", "/out/side", "/read/x"):
        assert node.mount(path, "two")[0] == 500
    assert not (node.home / "side").exists()
    assert node.mount("/", "one", method="PUT")[0] == 500
    node.end(daemon)


def test_writable_images_over_the_api(node):
    daemon = node.start("--writable")
    assert node.mount("/plain", "one")[0] == 204
    assert node.mount("/layered", "one", overlay=node.layer())[0] == 204
    (node.top / "layered/new").write_text("new")
    with pytest.raises(OSError, match="Read-only"):
        (node.top / "plain/new").write_text("new")
    status, answer = node.mount("/again", "one", overlay=node.layer())
    assert (status, "is used by another mount" in answer["message"]) == (500, True)
    assert node.names() == ["layered", "plain"]
    assert node.unmount("/layered") == (204, None)
    assert node.mount("/again", "one", overlay=node.layer())[0] == 204
    assert node.read("again/new") == b"new"
    node.end(daemon)


def test_layer_in_use_by_another_daemon(node):
    layer = node.layer()
    node.start("--writable", image="one", overlay=layer)
    other = node.serving.mountpoint()
    words = ["-M", other, "-B", node.images["one"].bootstrap, "-C", node.home / "config.json"]
    daemon = node.serving.nydusd(*words, "--writable")
    assert daemon.end() == 1
    assert "overlay.upper_dir is used by another mount" in daemon.stderr
    assert mounted_at(other) is None


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (None, "overlay: missing, --writable needs its upper_dir and work_dir"),
        ({"upper_dir": "/nowhere"}, "overlay.work_dir: missing"),
        ({"upper_dir": "/nowhere", "work_dir": "/nowhere"}, "/nowhere: overlay.upper_dir: No such"),
        ({"upper_dir": "/", "work_dir": "/proc/version"}, "overlay.work_dir: Not a directory"),
        ({"upper_dir": "/proc", "work_dir": "/proc"}, "/proc: overlay.upper_dir and overlay.work_"),
    ],
)
def test_layer_that_cannot_serve(node, layer, text):
    config = node.config(**({"overlay": layer} if layer else {}))
    (node.home / "config.json").write_text(json.dumps(config))
    words = ["-M", node.top, "-B", node.images["one"].bootstrap, "-C", node.home / "config.json"]
    daemon = node.serving.nydusd(*words, "--writable")
    assert daemon.end() == 1
    assert text in daemon.stderr
    assert mounted_at(node.top) is None


def test_without_writable_nothing_can_be_written(node):
    shared = node.home / "shared"
    (shared / "sub").mkdir(parents=True)
    daemon = node.start(image="one", overlay=node.layer())
    assert "overlay of the configuration has no effect without --writable" in daemon.stderr
    assert node.bind("/shared", shared) == (204, None)
    for path in ("new", "shared/new"):
        with pytest.raises(OSError, match="Read-only"):
            (node.top / path).write_text("new")
    node.end(daemon)


@pytest.mark.parametrize("writable", [False, True])
def test_shared_directory(node, writable):
    shared = node.home / "shared"
    (shared / "sub").mkdir(parents=True)
    daemon = node.start("--shared-dir", shared, *(["--writable"] if writable else []))
    with contextlib.nullcontext() if writable else pytest.raises(OSError, match="Read-only"):
        (node.top / "sub/new").write_text("new")
    assert (shared / "sub/new").exists() == writable
    assert node.mount("/sub/two", "two") == (204, None)
    assert node.read("sub/two/read") == content("tworead")
    assert not (shared / "sub/two").exists()
    assert node.unmount("/sub/two") == (204, None)
    node.end(daemon)


@pytest.mark.parametrize("writable", [False, True])
def test_killed_daemon_is_followed_by_one_that_goes_on(node, writable):
    words = ["--writable"] if writable else []
    config = {"overlay": node.layer()} if writable else {}
    first = node.start(*words, image="one", **config)
    assert node.mount("/dir/two", "two")[0] == 204
    child = node.serving.child(_HOLD, node.top, "late")
    child.line()
    first.send(signal.SIGKILL)
    first.process.wait(TIMEOUT)
    child.process.kill()
    second = node.start(*words, image="one", **config)
    assert node.paths() == {"/", "/dir/two"}
    assert node.read("read") == content("oneread")
    assert node.read("dir/two/read") == content("tworead")
    if writable:
        (node.top / "new").write_text("new")
    assert node.mount("/three", "two")[0] == 204
    assert node.read("dir/two/late") == content("twolate")
    assert node.unmount("/dir/two") == (204, None)
    assert node.unmount("/three") == (204, None)
    assert node.names() == sorted([*IN_ONE, *(["new"] if writable else [])])
    node.end(second)


def test_a_mount_that_waits_for_its_backend_does_not_hold_up_questions(node):
    with BlobServer(node.images["two"].blobs()) as server:
        server.fault = "stall"
        backend = {"addr": server.address, "path": "/blobs", "timeout": TIMEOUT}
        config = {"type": "http-proxy", "http-proxy": backend}
        daemon = node.start("--eager")
        assert node.bind("/host", "/etc") == (204, None)
        answers = []
        mounting = threading.Thread(
            target=lambda: answers.append(node.mount("/two", "two", backend=config))
        )
        mounting.start()
        wait_until(lambda: sum(server.requests.values()) > 0)
        assert node.paths() == {"/host"}
        assert node.api("GET", "metrics/inflight") == (204, None)
        assert node.api("GET", "metrics/blobcache")[0] == 404
        assert answers == []
        server.fault = None
        server.released.set()
        mounting.join(TIMEOUT)
        assert answers == [(204, None)]
        assert node.read("two/name") == b"two"
        node.end(daemon)
