"""Our daemon and its images under a kernel with cachefiles: build, start, register, mount, read."""

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from cachefiles_rig import MNT_DETACH, mount_now, unmount_now

from builder.build import BuildOptions, SourceType, build
from tests.fakes.blob_server import BlobServer
from tests.treecompare import read_tree

TIMEOUT = 120
CHUNK = 64 << 10
CHECKOUT = Path(__file__).parents[3]

# Imports once and forks for each daemon: in an emulated processor a start takes many seconds.
_LAUNCHER = """
import importlib, json, os, sys
import fscache.api.server, fscache.cli.nydusd, fscache.backend.http
for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if not pid:
        os.setsid()
        os.environ.update(request["env"])
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        try:
            status = fscache.cli.nydusd.main(request["words"])
        finally:
            os._exit(status)
    print(pid, flush=True)
"""


def wait_until(condition):
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


class Launcher:
    """Starts daemons, which find `modules` imported already, and waits for their ends."""

    def __init__(self, *modules):
        path = os.pathsep.join([str(CHECKOUT), *sys.path])
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )

    def _ask(self, **request):
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, words, log, **env):
        return self._ask(words=[str(word) for word in words], log=str(log), env=env)

    def wait(self, pid):
        return self._ask(wait=pid)

    def close(self):
        self.process.stdin.close()
        self.process.wait(TIMEOUT)
        self.process.stdout.close()


class Image:
    """A tree, and what was built of it: `boot`, and the stored blobs by id."""

    def __init__(self, top, seed, extra=()):
        self.tree = top / "source"
        rng = random.Random(seed)
        (self.tree / "dir/deep").mkdir(parents=True)
        for number, size in enumerate((0, 1, 4096, 5000, CHUNK, 3 * CHUNK + 77, *extra)):
            (self.tree / f"dir/f{number}").write_bytes(rng.randbytes(size))
        (self.tree / "dir/deep/zeros").write_bytes(bytes(2 * CHUNK))
        (self.tree / "dir/sparse").write_bytes(b"x")
        os.truncate(self.tree / "dir/sparse", 5 * CHUNK)
        os.link(self.tree / "dir/f3", self.tree / "linked")
        (self.tree / "symlink").symlink_to("dir/f4")
        os.setxattr(self.tree / "dir/f1", "user.key", b"value")
        (self.tree / "dir/f4").chmod(0o6750)
        # The root of an image has no time of its own.
        os.utime(self.tree, (0, 0))
        self.boot = top / "boot"
        blobs = top / "blobs"
        blobs.mkdir()
        options = BuildOptions(
            source_type=SourceType.DIRECTORY, bootstrap=self.boot, blob_dir=blobs, chunk_size=CHUNK
        )
        build(self.tree, options)
        self.blobs = {path.name: path.read_bytes() for path in blobs.iterdir()}
        self.snapshot = read_tree(self.tree)

    @property
    def blob_id(self):
        (name,) = self.blobs
        return name


class Node:
    """Daemons of one cache directory, mounts of their images, and a server of blobs."""

    def __init__(self, directory, launcher, stack):
        self.directory = directory
        self.launcher = launcher
        self.cache = directory / "cache"
        self.cache.mkdir()
        self.work = directory / "work"
        self.work.mkdir()
        self.sock = directory / "api"
        self.log = directory / "log"
        self.server = stack.enter_context(BlobServer())
        self.environment = {}
        self.running = []
        self.mounts = []
        stack.callback(self.end)

    def end(self):
        for target in self.mounts:
            unmount_now(target, MNT_DETACH)
        for pid in list(self.running):
            self.kill(pid, signal.SIGTERM)
        # The last one closes the device.
        wait_until(lambda: not self.holders())

    def holders(self):
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if b"fscache.holder" in path.read_bytes():
                    found.append(path)
        return found

    # Daemons

    def words(self, *more, sock=None):
        return ["singleton", "--fscache", self.cache, "-A", sock or self.sock, *more]

    def begin(self, *words):
        pid = self.launcher.start(words or self.words(), self.log, **self.environment)
        self.running.append(pid)
        return pid

    def start(self, *words, state="RUNNING", sock=None):
        pid = self.begin(*words)
        wait_until(lambda: self.state(sock) == state or not Path(f"/proc/{pid}/exe").exists())
        assert self.state(sock) == state, self.said
        return pid

    @property
    def said(self):
        return self.log.read_text()

    def kill(self, pid, number=signal.SIGKILL):
        os.kill(pid, number)
        return self.wait(pid)

    def wait(self, pid):
        self.running.remove(pid)
        return self.launcher.wait(pid)

    # The API

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

    def entry(self, image, fsid, domain="dom", **config):
        self.server.blobs.update(image.blobs)
        return {
            "type": "bootstrap",
            "id": fsid,
            "domain_id": domain,
            "config": {
                "backend_type": "http-proxy",
                "backend_config": {"addr": self.server.address, "path": "/blobs", "timeout": 60},
                "cache_type": "fscache",
                "cache_config": {"work_dir": str(self.work)},
                "metadata_path": str(image.boot),
                **config,
            },
        }

    def register(self, image, fsid="img", domain="dom", **config):
        body = self.entry(image, fsid, domain, **config)
        answer = self.api("PUT", "/api/v2/blobs", body)
        assert answer == (204, None), (answer, self.said)

    def drop(self, fsid="img", domain="dom"):
        path = f"/api/v2/blobs?domain_id={domain}&blob_id={fsid}"
        assert self.api("DELETE", path) == (204, None)

    # Mounts

    def mount(self, fsid="img", domain="dom"):
        target = self.directory / f"mnt{len(self.mounts)}"
        target.mkdir()
        self.mounts.append(target)
        options = f"fsid={fsid}" + (f",domain_id={domain}" if domain else "")
        assert mount_now(target, options) == 0, self.said
        return target

    def unmount(self, target):
        assert unmount_now(target) == 0

    def requests(self):
        return sum(self.server.requests.values())


class Reader(threading.Thread):
    """Reads files of a mount by one thread, past the page cache; `wrong` tells what went wrong."""

    def __init__(self, jobs):
        super().__init__(daemon=True)
        self.jobs = jobs
        self.wrong = []
        self.start()

    def run(self):
        for path, offset, expected in self.jobs:
            try:
                got = read(path, offset, len(expected))
            except OSError as error:
                self.wrong.append((path, offset, error))
                continue
            if got != expected:
                self.wrong.append((path, offset, "wrong bytes"))

    def finish(self):
        self.join(TIMEOUT)
        assert not self.is_alive(), "a reader is stuck"
        assert self.wrong == []


def read(path, offset, length):
    """Read without read-ahead, what the page cache has excepted."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def forget_pages():
    """Have the kernel forget what it has of any file."""
    Path("/proc/sys/vm/drop_caches").write_text("3")


class Supervisor:
    """A client that keeps what daemons give it, as the snapshotter does."""

    def __init__(self, path, stack):
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        stack.callback(self.listener.close)
        self.listener.bind(str(path))
        self.listener.listen()
        self.state, self.fds = b"", []

    def keep(self, ask):
        """Take a state that is sent while `ask` runs."""
        thread = threading.Thread(target=ask)
        thread.start()
        connection, _ = self.listener.accept()
        with connection:
            self.state, self.fds, _, _ = socket.recv_fds(connection, 1 << 16, 4)
            while data := connection.recv(1 << 16):
                self.state += data
        thread.join()

    def give(self, ask):
        """Hand the state over while `ask` runs; return what it returns."""
        result = []
        thread = threading.Thread(target=lambda: result.append(ask()))
        thread.start()
        connection, _ = self.listener.accept()
        with connection:
            socket.send_fds(connection, [self.state], self.fds)
        thread.join()
        return result[0]
