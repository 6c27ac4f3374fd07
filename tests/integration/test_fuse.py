"""The FUSE channel against the kernel: what is asked for and fetched, and how mounts end."""

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import threading
from collections import Counter
from pathlib import Path

import pytest
from capabilities import requires
from fakes.blob_server import BlobServer
from fuserig import ALL, assert_same, start
from serving import TIMEOUT, Child, build_image, http, wait_until, write_config
from treecompare import read_tree

import fscache.image
from fscache.backend import LocalFsConfig
from fscache.backend.retry import RetryPolicy
from fscache.channel import fuse
from fscache.channel.fuseops import Operations
from fscache.config import DaemonConfig
from fscache.daemon import Transport
from fscache.mounts.mount import MountBusy, MountError
from fscache.mounts.place import mounted_at
from fscache.node import NodeDaemon, NodeOptions

pytestmark = [pytest.mark.root, requires("root", "fuse")]

CHUNK = 0x10000
CHUNKS = 48

_READ_RANGES = """
import hashlib, json, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print("ready", flush=True)
sys.stdin.readline()
for offset, length in json.loads(sys.argv[2]):
    print(hashlib.sha256(os.pread(fd, length, offset)).hexdigest())
"""
# Holds a file open and reads a page of it for each line of input.
_HOLD = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print("ready", flush=True)
for line in sys.stdin:
    try:
        print(os.pread(fd, 4096, int(line)).hex(), flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
"""
# Many readers in one process, each of its own chunk, which never comes.
_WAIT = """
import os, sys, threading
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
def read(number):
    try:
        os.pread(fd, 1, number * int(sys.argv[2]))
    except OSError:
        pass
threads = [threading.Thread(target=read, args=(number,)) for number in range(int(sys.argv[3]))]
for thread in threads:
    thread.start()
print("ready", flush=True)
for thread in threads:
    thread.join()
"""
_MAP_AND_RUN = """
import mmap, os, subprocess, sys
fd = os.open(sys.argv[1] + "/big", os.O_RDONLY)
with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as pages:
    sys.stdout.buffer.write(pages[100_000:100_100])
print(subprocess.run([sys.argv[1] + "/program", "ran"], capture_output=True).stdout, flush=True)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    top = tmp_path_factory.mktemp("fuse") / "source"
    top.mkdir()
    rng = random.Random(8)
    (top / "big").write_bytes(rng.randbytes(CHUNKS * CHUNK - 777))
    (top / "small").write_bytes(b"small")
    (top / "many").mkdir()
    for number in range(300):
        (top / "many" / f"file {number}").write_bytes(b"%d" % number)
    subprocess.run(["cp", "/bin/echo", top / "program"], check=True)
    return top


@pytest.fixture(scope="module")
def image(source, tmp_path_factory):
    return build_image(source, tmp_path_factory.mktemp("fuse") / "image", chunk_size=CHUNK)


@pytest.fixture
def server(image, stack):
    server = BlobServer(image.blobs())
    stack.callback(server.stop)
    return server


@pytest.fixture
def few_attempts(monkeypatch):
    retry = RetryPolicy(attempts=1, first_delay=0.01)
    monkeypatch.setattr(fscache.image, "retry_policy", lambda _: retry)


def page(source, offset):
    with (source / "big").open("rb") as file:
        return os.pread(file.fileno(), 4096, offset)


# What is asked for


def test_mapped_and_executed(serving, image, source):
    daemon = start(serving, image)
    out = serving.child(_MAP_AND_RUN, daemon.mountpoint).finish()
    assert out == (source / "big").read_bytes()[100_000:100_100] + b"b'ran\\n'\n"


def test_the_kernel_keeps_what_it_knows(serving, image, monkeypatch):
    calls = Counter()
    for name in ("getattr", "readdir", "readlink", "open", "read"):
        operation = getattr(Operations, name)

        def counted(self, *args, _name=name, _operation=operation):
            calls[_name] += 1
            return _operation(self, *args)

        monkeypatch.setattr(Operations, name, counted)
    mountpoint = start(serving, image).mountpoint
    serving.snapshot(mountpoint)
    # Attributes come with the entries: nobody asks for each of the 300 files.
    assert 0 < calls["getattr"] < 50
    assert calls["read"]
    before = Counter(calls)
    serving.snapshot(mountpoint)
    assert calls["open"] > before["open"]
    import mfusepy

    # From 3.16 on libfuse lets the kernel keep entries, too.
    keeps = ("readdir",) if mfusepy.fuse_version_minor >= 16 else ()
    for name in ("getattr", "readlink", "read", *keeps):
        # A machine short of memory forgets some.
        assert calls[name] - before[name] < 20, name


def test_large_reads_ahead(serving, image, monkeypatch):
    sizes = []
    operation = Operations.read

    def read(self, path, size, offset, handle):
        sizes.append(size)
        return operation(self, path, size, offset, handle)

    monkeypatch.setattr(Operations, "read", read)
    daemon = start(serving, image)
    number = os.lstat(daemon.mountpoint).st_dev
    place = Path(f"/sys/class/bdi/{os.major(number)}:{os.minor(number)}/read_ahead_kb")
    assert place.read_text() == "1024\n"
    serving.read(daemon.mountpoint / "big")
    assert max(sizes) >= 512 << 10


def ranges_asked(server):
    return Counter(range_ for _, range_ in server.ranges)


def test_nothing_is_fetched_that_nobody_reads(serving, server, image):
    daemon = start(serving, image, http(server))
    serving.snapshot(daemon.mountpoint, content=False)
    assert server.ranges == []
    serving.read(daemon.mountpoint / "big", 5 * CHUNK, 100)
    assert 1 <= len(server.ranges) <= CHUNKS // 2


def test_readers_at_once(serving, server, image, source):
    mountpoint = start(serving, image, http(server)).mountpoint
    rng = random.Random(3)
    content = (source / "big").read_bytes()
    everything = [(number * CHUNK, CHUNK) for number in range(CHUNKS)]
    patterns = [everything, everything[::-1]] + [
        [(rng.randrange(len(content)), rng.choice((1, 5000, 3 * CHUNK))) for _ in range(60)]
        for _ in range(10)
    ]
    readers = [
        serving.child(_READ_RANGES, mountpoint / "big", json.dumps(ranges)) for ranges in patterns
    ]
    for reader in readers:
        assert reader.line() == b"ready"
    assert server.ranges == []
    for reader in readers:
        reader.go()
    for reader, ranges in zip(readers, patterns, strict=True):
        expected = [hashlib.sha256(content[at : at + size]).hexdigest() for at, size in ranges]
        assert reader.finish().decode().split() == expected
    assert set(ranges_asked(server).values()) == {1}


def test_reads_that_wait_stop_nothing_else(serving, server, image, source):
    mountpoint = start(serving, image, http(server)).mountpoint
    small = serving.read(mountpoint / "small")
    server.fault = "stall"
    waiting = serving.child(_WAIT, mountpoint / "big", CHUNK, CHUNKS)
    assert waiting.line() == b"ready"
    wait_until(lambda: len(server.ranges) > 4)
    # Nothing of this is in the kernel's caches.
    assert len(serving.snapshot(mountpoint, content=False)) == len(read_tree(source, content=False))
    assert serving.read(mountpoint / "small") == small
    assert waiting.process.poll() is None
    server.fault = None
    server.released.set()
    waiting.finish()


def test_failures_are_io_errors_and_pass(serving, server, image, source, few_attempts):
    mountpoint = start(serving, image, http(server)).mountpoint
    blobs, server.blobs = server.blobs, {}
    serving.read_fails(mountpoint / "big", 0, 4096)
    serving.read_fails(mountpoint / "big", 10 * CHUNK, 4096)
    server.blobs = blobs

    def right():
        try:
            return serving.read(mountpoint / "big") == (source / "big").read_bytes()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False

    wait_until(right)


@requires("fanotify", "erofs_mount")
@pytest.mark.parametrize("first", ALL)
def test_another_transport_finds_the_cache_warm(serving, server, image, source, first):
    expected = read_tree(source)
    expected[b"/"] = expected[b"/"]._replace(mtime_ns=0)
    daemon = serving.start(image, http(server), transport=first)
    assert_same(expected, serving.snapshot(daemon.mountpoint))
    daemon.stop()
    asked = list(server.ranges)
    assert asked
    for transport in ALL:
        daemon = serving.start(image, http(server), transport=transport)
        assert_same(expected, serving.snapshot(daemon.mountpoint))
        daemon.stop()
        assert server.ranges == asked


# How it ends


def test_users_of_an_unmounted_image_are_served_on(serving, server, image, source):
    daemon = start(serving, image, http(server))
    holder = serving.child(_HOLD, daemon.mountpoint / "big")
    assert holder.line() == b"ready"
    served = daemon.served
    stopping = threading.Thread(target=daemon.stop)
    stopping.start()
    wait_until(lambda: mounted_at(daemon.mountpoint) is None)
    for number in (3, 30):
        holder.process.stdin.write(b"%d\n" % (number * CHUNK))
        holder.process.stdin.flush()
        assert bytes.fromhex(holder.line().decode()) == page(source, number * CHUNK)
    assert not served.is_gone
    assert stopping.is_alive()
    holder.process.stdin.close()
    stopping.join(TIMEOUT)
    assert not stopping.is_alive()
    assert served.is_gone


def test_busy_or_covered(serving, image):
    daemon = start(serving, image)
    mount = daemon.served._mount
    holder = serving.child(_HOLD, daemon.mountpoint / "big")
    assert holder.line() == b"ready"
    with pytest.raises(MountBusy):
        mount.unmount()
    subprocess.run(["mount", "-t", "tmpfs", "over", daemon.mountpoint], check=True)
    assert not mount.is_attached()
    # What others have mounted over it stays.
    mount.unmount()
    mount.detach()
    assert mounted_at(daemon.mountpoint) == ("tmpfs", "over")
    subprocess.run(["umount", daemon.mountpoint], check=True)
    assert mount.is_attached()
    holder.close()


def test_unmounted_by_somebody_else(serving, image):
    daemon = start(serving, image)
    served = daemon.served
    subprocess.run(["umount", daemon.mountpoint], check=True)
    wait_until(lambda: served.is_gone)
    daemon.stop()


def test_mount_that_is_refused_leaves_nothing(serving, image):
    before = set(threading.enumerate())
    with pytest.raises(MountError, match=r"absent: cannot mount: .*[Nn]o such file"):
        fuse.mount_fuse(image.bootstrap, [], None, serving.directory / "absent")
    assert set(threading.enumerate()) <= before


@pytest.fixture
def command(tmp_path, image, serving):
    config = write_config(tmp_path / "config.json", image)
    top = serving.mountpoint("top")
    return top, ["erofs", "-B", image.bootstrap, "-C", config, "-M", top, "--transport", "fuse"]


def test_killed_and_started_again(serving, command, image, source):
    top, words = command
    for _ in range(2):
        daemon = serving.nydusd(*words)
        daemon.wait_for("serving ")
        assert serving.read(top / "small") == b"small"
        assert not any(Path(os.environ["NYDUSD_RUN_DIR"]).iterdir())
        holder = serving.child(_HOLD, top / "big")
        holder.line()
        daemon.send(signal.SIGKILL)
        daemon.process.wait(TIMEOUT)
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            os.statvfs(top)
        assert fuse.is_dead(top)
    daemon = serving.nydusd(*words)
    daemon.wait_for("serving ")
    assert "is still mounted by a daemon that is gone" in daemon.stderr
    assert serving.read(top / "small") == b"small"
    assert not fuse.is_dead(top)
    fuse.clear_dead(top)
    assert serving.read(top / "big") == (source / "big").read_bytes()
    daemon.send(signal.SIGTERM)
    assert daemon.end() == 0
    assert mounted_at(top) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_and_relative_paths(serving, command, tmp_path, image, number):
    """libfuse would change the working directory and the handlers."""
    config = {
        "device": {
            "backend": {"type": "localfs", "config": {"dir": "blobs"}},
            "cache": {"type": "blobcache", "config": {"work_dir": "cache"}},
        },
    }
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.json").write_text(json.dumps(config))
    (home / "blobs").symlink_to(image.blob_dir)
    (home / "mnt").mkdir()
    words = ["erofs", "-B", image.bootstrap, "-C", "config.json", "-M", "mnt"]
    daemon = serving.nydusd(*words, "--transport", "fuse", cwd=home)
    daemon.wait_for("serving ")
    assert Path(f"/proc/{daemon.process.pid}/cwd").resolve() == home
    assert serving.read(home / "mnt/small") == b"small"
    assert list((home / "cache").glob("*.blob.data"))
    daemon.send(number)
    assert daemon.end() == 0
    assert not os.path.ismount(home / "mnt")
    assert "ERROR" not in daemon.stderr


def test_several_images_below_one_mount_point(serving, server, image, source):
    """Over the API: a tmpfs, an image in it twice, each chunk once, another instead of one."""
    node = NodeDaemon(NodeOptions(serving.mountpoint(), transport=Transport.FUSE))
    serving.stack.callback(node.stop)
    node.start()
    config = DaemonConfig(http(server), serving.directory / "cache")
    top = node.options.mountpoint
    for path in ("/a", "/b/c"):
        node.mount_image(path, image.bootstrap, config)
        assert serving.read(top / path[1:] / "big") == (source / "big").read_bytes()
    assert set(ranges_asked(server).values()) == {1}
    node.remount_image("/a", image.bootstrap, config)
    node.unmount("/b/c")
    assert not (top / "b").exists()
    assert serving.read(top / "a/small") == b"small"
    node.unmount("/a")
    wait_until(lambda: not node.runtime._leaving)


@requires("overlay")
def test_mounts_below_an_image(serving, image, source):
    config = DaemonConfig(LocalFsConfig(dir=image.blob_dir), serving.directory / "cache")
    options = NodeOptions(
        serving.mountpoint(), bootstrap=image.bootstrap, config=config, transport=Transport.FUSE
    )
    node = NodeDaemon(options)
    serving.stack.callback(node.stop)
    node.start()
    node.mount_image("/many/below", image.bootstrap, config)
    top = options.mountpoint
    assert serving.read(top / "many/below/small") == b"small"
    assert serving.read(top / "big") == (source / "big").read_bytes()
    node.unmount("/many/below")
    assert serving.read(top / "small") == b"small"


def test_child_is_killed_while_it_waits(serving, server, image):
    """Nothing is left of it: the request is answered, and the daemon ends."""
    daemon = start(serving, image, http(server))
    server.fault = "stall"
    reader = Child(_WAIT, daemon.mountpoint / "big", CHUNK, 3)
    assert reader.line() == b"ready"
    wait_until(lambda: server.ranges)
    reader.process.kill()
    server.fault = None
    server.released.set()
    reader.close()
    daemon.stop()
    assert mounted_at(daemon.mountpoint) is None
