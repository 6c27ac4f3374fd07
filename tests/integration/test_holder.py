"""Killed daemons: readers wait for a successor, get right bytes, and never zeros.

Rows 11, 12, 13 and 17 of spec ondemand 7.3, and the recover policies of nydus-snapshotter.
"""

import hashlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from capabilities import requires
from fakes.blob_server import BlobServer
from serving import TIMEOUT, build_image, unmount, wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.fanotify,
    pytest.mark.erofs_mount,
    requires("root", "erofs_mount", "fanotify"),
]

CHUNK = 64 << 10
SIZE = 2 << 20
# Reads without read-ahead, so that each is an event of its own.
_READER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print("open", flush=True)
sys.stdin.readline()
try:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    data = os.pread(fd, int(sys.argv[3]), int(sys.argv[2]))
except OSError as error:
    sys.exit(error.errno)
sys.stdout.buffer.write(data)
"""


@pytest.fixture(scope="module")
def content():
    return {name: random.Random(name).randbytes(SIZE) for name in ("one", "two")}


@pytest.fixture(scope="module")
def image(tmp_path_factory, content):
    top = tmp_path_factory.mktemp("holder")
    (top / "source").mkdir()
    for name, data in content.items():
        (top / "source" / name).write_bytes(data)
    # Nobody reads it: the blob is never complete, so no read goes past the daemon.
    (top / "source/unread").write_bytes(random.Random("unread").randbytes(CHUNK))
    return build_image(top / "source", top / "image", chunk_size=CHUNK)


@pytest.fixture
def server(image):
    with BlobServer(image.blobs()) as server:
        yield server


@pytest.fixture
def node(serving, image, server, monkeypatch):
    run = serving.directory / "run"
    monkeypatch.setenv("NYDUSD_RUN_DIR", str(run))
    # Nobody waits for that: successors come, and the last ones end in order.
    monkeypatch.setenv("NYDUSD_HOLDER_SECONDS", "600")
    node = Node(serving, image, server, run)
    yield node
    serving.stack.close()
    wait_until(lambda: not node.holders())


class Node:
    """A client of daemons at one mount point, which kills them."""

    def __init__(self, serving, image, server, run):
        self.serving = serving
        self.image = image
        self.server = server
        self.run = run
        self.top = serving.mountpoint("mnt")
        self.sock = serving.directory / "api"
        self.cache = serving.directory / "cache"
        self.config = serving.directory / "config.json"
        self.config.write_text(json.dumps(self.values()))
        self.words = [
            "fuse", "-M", self.top, "-B", image.bootstrap, "-C", self.config, "-A", self.sock,
        ]  # fmt: skip

    def values(self):
        return {
            "version": 2,
            "id": "node",
            "backend": {
                "type": "http-proxy",
                "http-proxy": {"addr": self.server.address, "path": "/blobs", "timeout": 60},
            },
            "cache": {"type": "blobcache", "filecache": {"work_dir": str(self.cache)}},
        }

    def start(self, *words, state="RUNNING"):
        daemon = self.serving.nydusd(*(words or self.words))
        wait_until(lambda: daemon.process.poll() is not None or self.state() == state)
        assert daemon.process.poll() is None, daemon.stderr
        return daemon

    def kill(self, daemon):
        daemon.send(signal.SIGKILL)
        daemon.process.wait(TIMEOUT)

    def api(self, method, path, body=None, sock=None):
        connection = http.client.HTTPConnection("localhost", timeout=TIMEOUT)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(TIMEOUT)
        connection.sock.connect(str(sock or self.sock))
        try:
            connection.request(method, path, json.dumps(body) if body else None)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        return answer.status, json.loads(data) if data else None

    def state(self, sock=None):
        try:
            return self.api("GET", "/api/v1/daemon", sock=sock)[1]["state"]
        except OSError:
            return None

    def reader(self, name="one", offset=0, length=4096, top=None):
        """A program that has the file open and reads when it is told to."""
        child = self.serving.child(_READER, (top or self.top) / name, offset, length)
        assert child.line() == b"open"
        return child

    def holders(self):
        """Return the processes of holders of this run directory."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if any(b"fscache.holder.process" in word for word in words) and any(
                os.fsencode(self.run) in word for word in words
            ):
                found.append(int(path.parent.name))
        return found

    def wait_for_request(self, count=1):
        wait_until(lambda: sum(self.server.requests.values()) >= count)


def read(child):
    """Return what a reader got; raise its `OSError`."""
    status, out, err = child.end()
    assert not err, err
    if status:
        raise OSError(status, os.strerror(status))
    return out


def test_row_11_taken_and_unread_events_wait_for_the_successor(node, content):
    daemon = node.start()
    node.server.fault = "stall"
    taken = node.reader("one", 0)
    taken.go()
    node.wait_for_request()
    node.kill(daemon)
    unread = node.reader("two", 5 * CHUNK)
    unread.go()
    time.sleep(0.2)
    assert taken.process.poll() is None
    assert unread.process.poll() is None
    node.server.fault = None
    successor = node.start()
    assert read(taken) == content["one"][:4096]
    assert read(unread) == content["two"][5 * CHUNK : 5 * CHUNK + 4096]
    assert "took over" in successor.stderr
    successor.send(signal.SIGTERM)
    assert successor.end() == 0
    assert not os.path.ismount(node.top)
    wait_until(lambda: not node.holders())
    assert not list(node.cache.glob("serve-*"))


def test_reads_that_wait_are_told_of(node, content):
    """nydus-snapshotter counts those that wait for too long (`hung_io_interval`)."""
    inflight = ("GET", "/api/v1/metrics/inflight")
    node.start()
    assert node.api(*inflight) == (204, None)
    node.server.fault = "stall"
    begun = time.time()
    readers = [node.reader("one", 0), node.reader("two", 0)]
    for reader in readers:
        reader.go()
    wait_until(lambda: len(node.api(*inflight)[1] or []) >= 2)
    status, reads = node.api(*inflight)
    assert status == 200
    assert {read["opcode"] for read in reads} == {15}
    assert len({read["unique"] for read in reads}) == len(reads)
    assert all(begun - 2 < read["timestamp_secs"] <= time.time() for read in reads)
    files = {path.stat().st_ino for path in node.cache.glob("*.blob.data")}
    assert {read["inode"] for read in reads} <= files
    node.server.fault = None
    assert read(readers[0]) == content["one"][:4096]
    assert read(readers[1]) == content["two"][:4096]
    wait_until(lambda: node.api(*inflight) == (204, None))


def test_reads_fail_when_nobody_comes_and_heal_when_somebody_does(node, content, monkeypatch):
    monkeypatch.setenv("NYDUSD_HOLDER_SECONDS", "1")
    daemon = node.start()
    node.server.fault = "stall"
    taken, unread, late = node.reader("one", 0), node.reader("two", 0), node.reader("two", CHUNK)
    taken.go()
    node.wait_for_request()
    node.kill(daemon)
    unread.go()
    for reader in (taken, unread):
        with pytest.raises(OSError, match=r"Input/output error"):
            read(reader)
    late.go()
    with pytest.raises(OSError, match=r"Input/output error"):
        read(late)
    node.server.fault = None
    node.start()
    assert node.serving.read(node.top / "one") == content["one"]
    assert node.serving.read(node.top / "two") == content["two"]


def test_restart_serves_the_old_mount_under_its_users(node, content):
    """The snapshotter unmounts below a running container, and starts the same command again."""
    daemon = node.start()
    user = node.reader("one", 3 * CHUNK)
    node.kill(daemon)
    unmount(node.top)
    node.sock.unlink()
    successor = node.start()
    user.go()
    assert read(user) == content["one"][3 * CHUNK : 3 * CHUNK + 4096]
    assert node.serving.read(node.top / "two") == content["two"]
    successor.send(signal.SIGTERM)
    assert successor.end() == 0


def test_successor_serves_an_old_mount_whose_files_were_deleted(node, content):
    """Bootstrap and cache are removed with the snapshot while a container still runs."""
    own = node.serving.directory / "own.boot"
    own.write_bytes(node.image.bootstrap.read_bytes())
    words = [own if word == node.image.bootstrap else word for word in node.words]
    daemon = node.start(*words)
    user = node.reader("one", 0)
    node.kill(daemon)
    unmount(node.top)
    own.unlink()
    for path in node.cache.glob("*.blob.data*"):
        path.unlink()
    node.start()
    user.go()
    assert read(user) == content["one"][:4096]


def test_killed_erofs_daemon_is_started_again_by_the_holder(node, content):
    words = ["erofs", *node.words[1:]]
    daemon = node.start(*words)
    reader = node.reader("one", 0)
    node.kill(daemon)
    reader.go()
    assert read(reader) == content["one"][:4096]
    wait_until(lambda: node.state() == "RUNNING")
    assert node.serving.read(node.top / "two") == content["two"]
    assert node.api("PUT", "/api/v1/daemon/exit")[0] == 204
    wait_until(lambda: not node.holders())
    assert not os.path.ismount(node.top)


def test_killed_holder_is_replaced(node, content):
    daemon = node.start()
    (holder,) = node.holders()
    os.kill(holder, signal.SIGKILL)
    daemon.wait_for("another one is started")
    wait_until(lambda: node.holders() not in ([], [holder]))
    node.server.fault = "stall"
    reader = node.reader("one", 0)
    reader.go()
    node.wait_for_request()
    node.kill(daemon)
    node.server.fault = None
    node.start()
    assert read(reader) == content["one"][:4096]


def test_row_12_both_killed_is_found_and_reported(node, content):
    daemon = node.start()
    user = node.reader("one", 0)
    (holder,) = node.holders()
    # First the worker, which would start another holder.
    daemon.send(signal.SIGSTOP)
    os.kill(holder, signal.SIGKILL)
    node.kill(daemon)
    successor = node.start()
    assert f"UNSAFE: nydusd and its holder were killed under {node.top}" in successor.stderr
    assert "programs that used it since may have read zeros" in successor.stderr
    # The old file system has a listener again: the holes are filled, no zeros any more.
    user.go()
    assert read(user) == content["one"][:4096]
    assert node.serving.read(node.top / "two") == content["two"]


def test_orderly_end_leaves_no_directory(node):
    for _ in range(3):
        daemon = node.start()
        (place,) = node.run.glob("*/mountpoint")
        assert place.read_text() == f"{node.top}\n"
        # Started again while the holder of the one before is at its end.
        daemon.send(signal.SIGTERM)
        assert daemon.end() == 0
    wait_until(lambda: not node.holders())
    assert not [path for path in node.run.iterdir() if path.is_dir()]


def test_mount_point_that_is_served_is_refused(node):
    node.start()
    second = node.serving.nydusd(*node.words[:-1], node.serving.directory / "api2")
    assert second.end() == 1
    assert "serves this mount point" in second.stderr
    assert os.path.ismount(node.top)


class Supervisor:
    """What nydus-snapshotter does at its supervisor socket: keeps bytes and one descriptor."""

    def __init__(self, path):
        self.path = path
        self.state = None
        self.fd = -1

    def receive(self):
        """Wait for a daemon that sends; return a thread."""
        return self._serve(self._receive)

    def give(self):
        """Wait for a daemon that takes over; return a thread."""
        return self._serve(lambda peer: socket.send_fds(peer, [self.state], [self.fd]))

    def _serve(self, action):
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()

        def run():
            with listener:
                peer, _ = listener.accept()
            with peer:
                action(peer)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def _receive(self, peer):
        self.state, (self.fd,), _, _ = socket.recv_fds(peer, 1 << 18, 64)
        while part := peer.recv(1 << 18):
            self.state += part


@pytest.fixture
def supervisor(node):
    path = node.serving.directory / "sup"
    node.words += ["--id", "x", "--supervisor", path]
    supervisor = Supervisor(path)
    yield supervisor
    if supervisor.fd >= 0:
        os.close(supervisor.fd)


def test_failover(node, supervisor, content):
    """The order of calls is that of the recorded snapshotter (dedicated-failover)."""
    daemon = node.start()
    thread = supervisor.receive()
    assert node.api("PUT", "/api/v1/daemon/fuse/sendfd")[0] == 204
    thread.join(TIMEOUT)
    node.server.fault = "stall"
    reader = node.reader("one", 0)
    reader.go()
    node.wait_for_request()
    node.kill(daemon)
    node.server.fault = None
    successor = node.start(state="INIT")
    assert node.api("PUT", "/api/v1/daemon/start")[0] == 400
    assert node.api("PUT", "/api/v1/config", {"registry_auth": "dTpw"})[0] == 500
    assert reader.process.poll() is None
    thread = supervisor.give()
    assert node.api("PUT", "/api/v1/daemon/fuse/takeover")[0] == 204
    thread.join(TIMEOUT)
    info = node.api("GET", "/api/v1/daemon")[1]
    assert info["state"] == "READY"
    table = {path: item["backend_type"] for path, item in info["backend_collection"].items()}
    assert table == {"/": "Rafs"}
    # They would be forgotten: nothing is served yet.
    auth = {"registry_auth": "dTpw"}
    assert node.api("PUT", "/api/v1/config", auth)[0] == 500
    assert node.api("GET", "/api/v1/config") == (200, {})
    assert node.api("PUT", "/api/v1/daemon/fuse/takeover")[0] == 400
    assert node.api("PUT", "/api/v1/daemon/start")[0] == 204
    assert node.state() == "RUNNING"
    assert read(reader) == content["one"][:4096]
    thread = supervisor.receive()
    assert node.api("PUT", "/api/v1/daemon/fuse/sendfd")[0] == 204
    thread.join(TIMEOUT)
    successor.send(signal.SIGTERM)
    assert successor.end() == 0
    assert not os.path.ismount(node.top)


@pytest.mark.parametrize("exit_first", [True, False])
def test_row_13_upgrade_under_load(node, supervisor, content, exit_first):
    """Old and new daemon live at once; the old one answers what it has begun."""
    daemon = node.start()
    thread = supervisor.receive()
    assert node.api("PUT", "/api/v1/daemon/fuse/sendfd")[0] == 204
    thread.join(TIMEOUT)
    new_sock = node.serving.directory / "api1"
    words = [new_sock if word == node.sock else word for word in node.words]
    readers = [node.reader("one", index * CHUNK) for index in range(16)]
    for reader in readers[:8]:
        reader.go()
    successor = node.serving.nydusd(*words, "--upgrade")
    wait_until(lambda: node.state(new_sock) == "INIT")
    thread = supervisor.give()
    assert node.api("PUT", "/api/v1/daemon/fuse/takeover", sock=new_sock)[0] == 204
    thread.join(TIMEOUT)
    assert node.state(new_sock) == "READY"
    for reader in readers[8:]:
        reader.go()
    if exit_first:
        assert node.api("PUT", "/api/v1/daemon/exit")[0] == 204
        assert daemon.end() == 0
    assert node.api("PUT", "/api/v1/daemon/start", sock=new_sock)[0] == 204
    assert node.state(new_sock) == "RUNNING"
    assert daemon.end() == 0
    assert not node.sock.exists()
    for index, reader in enumerate(readers):
        assert read(reader) == content["one"][index * CHUNK : index * CHUNK + 4096]
    assert node.serving.read(node.top / "two") == content["two"]
    successor.send(signal.SIGTERM)
    assert successor.end() == 0
    assert not os.path.ismount(node.top)


def test_sendfd_and_takeover_without_a_supervisor(node, supervisor, monkeypatch):
    monkeypatch.setenv("NYDUSD_HOLDER_SECONDS", "1")
    daemon = node.start()
    assert node.api("PUT", "/api/v1/daemon/fuse/sendfd")[0] == 500
    assert node.state() == "RUNNING"
    node.kill(daemon)
    node.start(state="INIT")
    assert node.api("PUT", "/api/v1/daemon/fuse/takeover")[0] == 500
    assert node.state() == "INIT"


def mount_body(node, image):
    return {
        "fs_type": "rafs",
        "source": str(image.bootstrap),
        "config": json.dumps(node.values()),
    }


def test_shared_daemon_is_restarted_under_its_mounts(node, image, content):
    """Recover policy `restart`, shared: the client repeats its mounts, users go on."""
    words = ["fuse", "-M", node.top, "-A", node.sock]
    daemon = node.start(*words)
    for path in ("/4", "/deep/5"):
        answer = node.api("POST", f"/api/v1/mount?mountpoint={path}", mount_body(node, image))
        assert answer[0] == 204
    users = [node.reader("one", 0, top=node.top / "4"), node.reader("two", 0, top=node.top / "4")]
    node.server.fault = "stall"
    users[0].go()
    node.wait_for_request()
    node.kill(daemon)
    node.sock.unlink()
    node.server.fault = None
    successor = node.start(*words)
    assert sorted(node.api("GET", "/api/v1/daemon")[1]["backend_collection"]) == ["/4", "/deep/5"]
    assert read(users[0]) == content["one"][:4096]
    assert node.api("POST", "/api/v1/mount?mountpoint=/4", mount_body(node, image))[0] == 204
    # Once: a client that asks twice has made a mistake.
    assert node.api("POST", "/api/v1/mount?mountpoint=/4", mount_body(node, image))[0] == 500
    users[1].go()
    assert read(users[1]) == content["two"][:4096]
    assert node.serving.read(node.top / "deep/5/two") == content["two"]
    assert node.api("DELETE", "/api/v1/mount?mountpoint=/deep/5")[0] == 204
    assert not (node.top / "deep").exists()
    successor.send(signal.SIGTERM)
    assert successor.end() == 0
    assert not os.path.ismount(node.top)


def test_mount_that_is_asked_for_while_the_successor_begins(node, image, content):
    """The snapshotter repeats its mounts as soon as there is a socket."""
    words = ["fuse", "-M", node.top, "-A", node.sock]
    daemon = node.start(*words)
    for path in ("/4", "/5"):
        answer = node.api("POST", f"/api/v1/mount?mountpoint={path}", mount_body(node, image))
        assert answer[0] == 204
    user = node.reader("one", 0, top=node.top / "4")
    node.kill(daemon)
    node.sock.unlink()
    successor = node.serving.nydusd(*words)
    wait_until(lambda: node.state() is not None)
    assert node.api("POST", "/api/v1/mount?mountpoint=/4", mount_body(node, image))[0] == 204
    wait_until(lambda: node.state() == "RUNNING")
    assert "still mounted by a daemon that is gone" not in successor.stderr
    user.go()
    assert read(user) == content["one"][:4096]
    for path in ("4", "5"):
        assert node.serving.read(node.top / path / "two") == content["two"]


_CHECKER = """
import hashlib, os, random, sys
top, seed, size, chunk = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
truth = dict(line.split() for line in sys.stdin.readline().split(";"))
print("ready", flush=True)
choose = random.Random(seed)
fds = {name: os.open(f"{top}/{name}", os.O_RDONLY) for name in ("one", "two")}
count = 0
while count <= int(sys.argv[6]) or not os.path.exists(sys.argv[5]):
    name, index = choose.choice(("one", "two")), choose.randrange(size // chunk)
    if choose.random() < 0.5:
        os.posix_fadvise(fds[name], 0, 0, os.POSIX_FADV_RANDOM)
    os.posix_fadvise(fds[name], index * chunk, chunk, os.POSIX_FADV_DONTNEED)
    data = os.pread(fds[name], chunk, index * chunk)
    got = hashlib.sha256(data).hexdigest()
    assert got == truth[f"{name}{index}"], (name, index, data[:16])
    count += 1
"""


def digests(content):
    return ";".join(
        f"{name}{index} {hashlib.sha256(data[index * CHUNK : (index + 1) * CHUNK]).hexdigest()}"
        for name, data in content.items()
        for index in range(SIZE // CHUNK)
    )


class SlowServer(BlobServer):
    def find(self, path):
        time.sleep(random.uniform(0, 0.05))
        return super().find(path)


def kill_series(node, content, kills, readers=8):
    """Kill the worker at random moments under readers that check every byte, and get on."""
    stop = node.serving.directory / "stop"
    daemon = node.start()
    children = [
        node.serving.child(_CHECKER, node.top, seed, SIZE, CHUNK, stop, kills)
        for seed in range(readers)
    ]
    for child in children:
        child.process.stdin.write(digests(content).encode() + b"\n")
        child.process.stdin.flush()
        assert child.line() == b"ready"
    for _ in range(kills):
        time.sleep(random.uniform(0, 0.3))
        node.kill(daemon)
        # What they were allowed to read they have read then: holes are not for them.
        wait_until(lambda: all_stand_still(children))
        empty_cache(node.cache)
        daemon = node.start()
    stop.touch()
    for child in children:
        child.finish()
    daemon.send(signal.SIGTERM)
    assert daemon.end() == 0


def all_stand_still(children):
    """Return whether all wait in the kernel for something that does not come."""
    before = [switches(child) for child in children]
    time.sleep(0.1)
    return None not in before and [switches(child) for child in children] == before


def switches(child):
    """Return how often a process gave a processor away, None unless it waits in the kernel."""
    text = Path(f"/proc/{child.process.pid}/status").read_text()
    if "State:\tD" not in text:
        return None
    return [line for line in text.splitlines() if "ctxt_switches" in line]


def empty_cache(cache):
    """Make every chunk missing again, so that there is always something to fetch."""
    for path in cache.glob("*.chunk_map"):
        path.unlink()
    for path in cache.glob("*.blob.data"):
        length = str(path.stat().st_size)
        subprocess.run(["fallocate", "--punch-hole", "-o", "0", "-l", length, path], check=True)


@pytest.fixture
def slow(image):
    with SlowServer(image.blobs()) as server:
        yield server


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(10, id="10"),
        pytest.param(200, id="200", marks=[pytest.mark.long, pytest.mark.timeout(600)]),
    ],
)
def test_killed_under_checking_readers(node, slow, image, content, kills):
    """No wrong byte, no error, no stuck reader."""
    node.server = slow
    # Chunk by chunk, so that no blob becomes complete: of such a blob the kernel asks nothing any
    # more, and the holes that the test makes would be read as they are.
    node.config.write_text(json.dumps({**node.values(), "rafs": {"batch_size": 0}}))
    kill_series(node, content, kills)
