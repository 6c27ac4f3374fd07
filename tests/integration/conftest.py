"""A rig for real mounts: everything that it makes is gone after the test, also on failure."""

import contextlib
import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from serving import Serving

from fscache import kernel
from fscache.channel.fanotify import FanotifyChannel
from fscache.mounts.mount import mount_erofs
from fscache.probe_image import BLOB_SIZE, build_probe_image
from fscache.store import ServeDirectory

TIMEOUT = 60
BLOB = "b" * 64
_CLONE_NEWNS = 0x20000


def pattern(length):
    """Content without a zero byte, different in each page."""
    return b"".join((b"%07x." % page) * 512 for page in range(-(-length // 4096)))[:length]


class Child:
    """A Python program that reads a mount in its own process, and is killed in any case."""

    def __init__(self, code, *args):
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def finish(self):
        out, _ = self.process.communicate(timeout=TIMEOUT)
        assert self.process.returncode == 0, out
        return out

    def close(self):
        self.process.kill()
        self.process.wait(TIMEOUT)
        self.process.stdin.close()
        self.process.stdout.close()


class Rig:
    """Work directory, sparse data file, serve directory, channel and mounts of one daemon."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack):
        self.directory = directory
        self.stack = stack
        self.image = directory / "image"
        self.data = directory / f"{BLOB}.blob.data"
        self.truth = pattern(BLOB_SIZE)
        self.image.write_bytes(build_probe_image())
        self.requests = []
        self.lock = threading.Lock()
        self.on_request = self.fill
        self.writer = -1

    def use_tree(self, image, blob):
        self.image = image
        self.truth = blob.read_bytes()

    def make_data(self):
        self.writer = os.open(self.data, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.stack.callback(os.close, self.writer)
        os.ftruncate(self.writer, len(self.truth))

    def start(self, threads=2):
        """Data file, serve directory with its link, channel; no mount yet."""
        if self.writer < 0:
            self.make_data()
        self.serve = ServeDirectory.create(self.directory)
        self.stack.callback(self.serve.remove)
        self.channel = FanotifyChannel(self.serve.directory, self.handle, threads)
        self.channel.start()
        self.stack.callback(self.channel.close)
        self.link = self.serve.link(BLOB, self.data)

    def handle(self, request, reply):
        with self.lock:
            self.requests.append(request)
        self.on_request(request, reply)

    def fill(self, request, reply):
        end = min(request.offset + request.length, len(self.truth))
        os.pwrite(self.writer, self.truth[request.offset : end], request.offset)
        reply.allow()

    def mount(self, device=None, **options):
        number = len(list(self.directory.glob("mnt*")))
        mountpoint = self.directory / f"mnt{number}"
        mountpoint.mkdir()
        mount = mount_erofs(self.image, [device or self.link], mountpoint, **options)
        self.stack.callback(mount.detach)
        return mount

    def child(self, code, *args):
        child = Child(code, *args)
        self.stack.callback(child.close)
        return child

    def run(self, code, *args):
        return self.child(code, *args).finish()

    def read(self, mount, offset, length=4096, name="data"):
        """Read in a child; the error's name on failure."""
        return self.run(READ, mount.mountpoint / name, offset, length)


READ = """
import errno, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
try:
    data = os.pread(fd, int(sys.argv[3]), int(sys.argv[2]))
except OSError as error:
    data = errno.errorcode[error.errno].encode()
sys.stdout.buffer.write(data)
"""


@pytest.fixture
def stack():
    with contextlib.ExitStack() as closers:
        yield closers


@pytest.fixture(scope="session")
def minbase():
    """A Debian minimal system as tar, made once by the demo."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nydus-erofs"
    found = sorted(cache.glob("debian-*.tar")) if cache.is_dir() else []
    if not found:
        pytest.skip(f"no Debian tree in {cache}: run the demo once")
    return found[0]


@pytest.fixture(scope="session", autouse=True)
def own_mounts():
    """Mount where no other process does.

    A mount namespace that anybody makes has copies of all mounts that are there, and keeps their
    file systems alive: a test which unmounts must not have its mounts in the copies of others.
    """
    # Of this thread, which is the one that runs tests, and of all that it starts.
    if ctypes.CDLL(None).unshare(_CLONE_NEWNS) == 0:
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)


@pytest.fixture(autouse=True)
def own_holders(tmp_path_factory, monkeypatch):
    """Holders of killed daemons are this test's own, and end soon."""
    monkeypatch.setenv("NYDUSD_RUN_DIR", str(tmp_path_factory.mktemp("run")))
    monkeypatch.setenv("NYDUSD_HOLDER_SECONDS", "2")


@pytest.fixture(autouse=True)
def nothing_stays_mounted(tmp_path):
    yield
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def serving(tmp_path, stack):
    return Serving(tmp_path, stack)


@pytest.fixture
def rig(tmp_path, stack):
    return Rig(tmp_path, stack)


@pytest.fixture
def other_rig(tmp_path, stack, rig):
    """A second daemon in the same work directory, with the same data file."""
    other = Rig(tmp_path, stack)
    other.make_data()
    return other


def detached(stack, filesystem, **options):
    """Return the root of a fresh file system that is attached nowhere."""
    context = kernel.fsopen(filesystem)
    stack.callback(os.close, context)
    for key, value in options.items():
        kernel.fsconfig_string(context, key, value)
    kernel.fsconfig_create(context)
    mount = kernel.fsmount(context, 0)
    stack.callback(os.close, mount)
    return Path(f"/proc/self/fd/{mount}")


@pytest.fixture
def tmpfs(stack):
    return detached(stack, "tmpfs")


@pytest.fixture
def overlayfs(stack, tmp_path):
    places = {key: tmp_path / key for key in ("lowerdir", "upperdir", "workdir")}
    for place in places.values():
        place.mkdir()
    return detached(stack, "overlay", **places)
