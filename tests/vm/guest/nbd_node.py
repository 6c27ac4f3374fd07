"""Our daemon, its mounts and block devices under another kernel."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from cachefiles_node import TIMEOUT, Launcher, wait_until

from tests.fakes.blob_server import BlobServer
from tests.treecompare import differences, read_tree

SYSFS = Path("/sys/block")
CONNECTIONS = 4
STUCK_SECONDS = 0.3


def attached():
    """Return the names of the devices that are attached."""
    return sorted(path.parent.name for path in SYSFS.glob("nbd*/pid"))


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path, offset, length):
    """Have the kernel ask for a piece, also one that it knows already."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def forget_pages():
    Path("/proc/sys/vm/drop_caches").write_text("3")


def is_mounted(path):
    return os.path.ismount(path)


def same_tree(expected, mountpoint):
    """Compare a mounted tree with a snapshot, entry by entry and byte by byte."""
    lines = differences(expected, read_tree(mountpoint))
    assert not lines, "\n".join(lines[:20])


class Node:
    """Daemons of one cache directory, their mounts, and a server of blobs.

    A service manager is played, so that holders start nobody: a test does.
    """

    def __init__(self, directory, launcher, stack, image):
        self.directory = directory
        self.launcher = launcher
        self.image = image
        self.work = directory / "work"
        self.mountpoint = directory / "mnt"
        self.mountpoint.mkdir()
        self.log = directory / "log"
        self.log.touch()
        self.server = stack.enter_context(BlobServer(image.blobs))
        self.config = directory / "config.json"
        self.backend = {
            "type": "http-proxy",
            "config": {"addr": self.server.address, "path": "/blobs", "timeout": 60},
        }
        self.write_config()
        self.running = []
        stack.callback(self.end)

    def write_config(self):
        cache = {"type": "blobcache", "config": {"work_dir": str(self.work)}}
        device = {"backend": self.backend, "cache": cache}
        self.config.write_text(json.dumps({"device": device, "mode": "direct"}))

    def entry(self, bootstrap=None):
        """Write the entry of the image for `nydusd nbd`, and return its path."""
        self.work.mkdir(exist_ok=True)
        path = self.directory / "entry.json"
        config = {
            "backend_type": "http-proxy",
            "backend_config": self.backend["config"],
            "cache_type": "filecache",
            "cache_config": {"work_dir": str(self.work)},
            "metadata_path": str(bootstrap or self.image.boot),
        }
        path.write_text(json.dumps({"type": "bootstrap", "id": "image", "config": config}))
        return path

    def end(self):
        for pid in list(self.running):
            self.kill(pid)
        while is_mounted(self.mountpoint):
            subprocess.run(["umount", "-l", self.mountpoint], check=True)
        for name in attached():
            subprocess.run(["nbd-client", "-d", f"/dev/{name}"], check=True)

    # Daemons

    def begin(self, *words):
        pid = self.launcher.start(words, self.log)
        self.running.append(pid)
        return pid

    def start(self, *words, said="-> RUNNING"):
        """Start a daemon and wait until it says so once more."""
        before = self.said.count(said)
        pid = self.begin(*words)
        wait_until(lambda: self.said.count(said) > before or not Path(f"/proc/{pid}/exe").exists())
        assert self.said.count(said) > before, self.said
        return pid

    def words(self, transport="nbd", bootstrap=None):
        boot = bootstrap or self.image.boot
        place = ["-B", boot, "-C", self.config, "-M", self.mountpoint]
        return ["erofs", "--transport", transport, *place]

    def mount(self, transport="nbd"):
        return self.start(*self.words(transport))

    def disk(self, device, *words):
        return self.start("nbd", device, "-C", self.entry(), *words)

    @property
    def said(self):
        return self.log.read_text()

    def kill(self, pid, number=signal.SIGKILL):
        os.kill(pid, number)
        return self.wait(pid)

    def wait(self, pid):
        self.running.remove(pid)
        return self.launcher.wait(pid)

    def stop(self, pid):
        """Stop a daemon in order."""
        assert self.kill(pid, signal.SIGTERM) == 0, self.said

    def requests(self):
        return sum(self.server.requests.values())


class Readers:
    """Threads that read pieces of files again and again; `wrong` has what is not."""

    def __init__(self, jobs, count=3):
        self.jobs = jobs
        self.wrong = []
        self.done = 0
        self._stop = threading.Event()
        self.threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True)
            for number in range(count)
        ]
        for thread in self.threads:
            thread.start()

    def _run(self, number):
        while not self._stop.is_set():
            for path, offset, expected in self.jobs[number :: len(self.threads)]:
                try:
                    if read(path, offset, len(expected)) != expected:
                        self.wrong.append((path, offset, "wrong bytes"))
                except OSError as error:
                    self.wrong.append((path, offset, error))
                self.done += 1
                if self._stop.is_set():
                    return

    def are_stuck(self):
        """Return whether nobody gets on."""
        before = self.done
        time.sleep(STUCK_SECONDS)
        return self.done == before

    def enough(self):
        """Have each of them end with the piece that it reads."""
        self._stop.set()

    def stop(self):
        self.enough()
        for thread in self.threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive(), "a reader still waits"
        assert not self.wrong
        assert self.done


@contextlib.contextmanager
def launched(tmp_path_factory, *modules):
    """A launcher of daemons with a service manager, so that holders start nobody."""
    path = tmp_path_factory.mktemp("manager") / "notify"
    with (
        pytest.MonkeyPatch.context() as patch,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        manager.bind(str(path))
        patch.setenv("NOTIFY_SOCKET", str(path))
        patch.setenv("NYDUSD_RUN_DIR", str(tmp_path_factory.mktemp("run")))
        launcher = Launcher(*modules)
        yield launcher
        launcher.close()
