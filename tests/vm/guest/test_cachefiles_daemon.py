"""`nydusd singleton --fscache` under the real kernel: whole trees, faults, kills, successors."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cachefiles_node import (
    CHECKOUT,
    CHUNK,
    Image,
    Launcher,
    Node,
    Reader,
    Supervisor,
    forget_pages,
    read,
    read_tree,
    wait_until,
)
from cachefiles_rig import mount_now

from fscache.doctor.facts import gather
from fscache.doctor.report import diagnose

KILLS = 3
PIECES = 16
SIZE = 96 * CHUNK


@pytest.fixture(scope="module")
def launcher():
    launcher = Launcher("fscache.cachefiles.service", "fscache.nbd.domain", "fscache.nbd.netlink")
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return Image(tmp_path_factory.mktemp("image"), 1, extra=(20 * CHUNK,))


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def node(tmp_path, launcher, stack, monkeypatch):
    return Node(tmp_path, launcher, stack)


@pytest.fixture(scope="module", autouse=True)
def holders(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NYDUSD_RUN_DIR", str(tmp_path_factory.mktemp("run")))
        yield


def test_tree_is_the_same_entry_by_entry(node, image):
    node.start()
    node.register(image)
    target = node.mount()
    assert read_tree(target) == image.snapshot
    # Again from the kernel's cache: nobody is asked.
    requests = node.requests()
    forget_pages()
    assert read_tree(target) == image.snapshot
    node.unmount(target)
    wait_until(lambda: list(node.cache.glob(f"cache/Ierofs,dom/@*/D{image.blob_id}")))
    assert read_tree(node.mount()) == image.snapshot
    assert node.requests() == requests


def test_without_a_domain_the_fsid_is_the_scope(node, image):
    node.start()
    node.register(image, "only", "")
    assert read_tree(node.mount("only", None)) == image.snapshot
    node.register(image, "both", "both")
    assert read_tree(node.mount("both", None)) == image.snapshot
    # One work directory: each chunk is fetched once for both.
    assert node.server.bytes_sent[image.blob_id] < 1.1 * len(image.blobs[image.blob_id])


def test_images_of_a_domain_share_a_blob(node, image):
    node.start()
    node.register(image, "a")
    other = node.directory / "other work"
    other.mkdir()
    node.register(image, "b", cache_config={"work_dir": str(other)})
    first, second = node.mount("a"), node.mount("b")
    assert read_tree(first) == image.snapshot
    forget_pages()
    requests = node.requests()
    assert read_tree(second) == image.snapshot
    assert node.requests() == requests
    # The one that was asked goes, with its files.
    node.drop("a")
    node.unmount(first)
    shutil.rmtree(node.work)
    forget_pages()
    assert read_tree(second) == image.snapshot


def test_drop_unmount_and_cull_as_the_snapshotter_does(node, image):
    node.start()
    node.register(image)
    target = node.mount()
    node.drop()
    assert read_tree(target) == image.snapshot
    status, _ = node.api("DELETE", f"/api/v2/blobs?blob_id={image.blob_id}")
    assert status == 204
    node.unmount(target)
    wait_until(lambda: len(list(node.cache.glob("cache/Ierofs,dom/@*/D*"))) == 2)
    for name in (image.blob_id, "img"):
        assert node.api("DELETE", f"/api/v2/blobs?blob_id={name}") == (204, None)
    assert list(node.cache.glob("cache/Ierofs,dom/@*/D*")) == []
    # Now the name may be another image's.
    node.register(image)
    again = node.mount()
    assert read_tree(again) == image.snapshot
    node.unmount(again)
    busy = node.mount()
    status, answer = node.api("DELETE", f"/api/v2/blobs?blob_id={image.blob_id}")
    assert (status, "is in use" in answer["message"]) == (500, True)
    assert read_tree(busy) == image.snapshot


def test_bootstrap_of_another_image_under_a_used_name(node, image, tmp_path_factory):
    """The kernel goes by name and size alone, so what it has has to be forgotten."""
    other = Image(tmp_path_factory.mktemp("other"), 2, extra=(20 * CHUNK,))
    assert other.boot.stat().st_size == image.boot.stat().st_size
    node.start()
    for each in (image, other, image):
        node.register(each)
        target = node.mount()
        assert read_tree(target) == each.snapshot
        node.drop()
        node.unmount(target)


def test_backend_that_fails_is_an_io_error_and_no_more(node, image):
    node.start()
    node.register(image, backend_config={"addr": node.server.address, "retry_limit": 1})
    target = node.mount()
    content = (image.tree / "dir/f5").read_bytes()
    node.server.fault = 404
    with pytest.raises(OSError, match=r".") as failure:
        read(target / "dir/f5", 0, 4096)
    assert failure.value.errno == errno.EIO
    node.server.fault = "wrong-range"
    with pytest.raises(OSError, match=r"."):
        read(target / "dir/f5", CHUNK, 4096)
    node.server.fault = None
    time.sleep(1.5)
    assert read(target / "dir/f5", 0, len(content)) == content
    assert read_tree(target) == image.snapshot


def test_names_that_are_not_registered(node, image):
    node.start()
    node.register(image)
    (node.directory / "mnt").mkdir()
    for options in ("fsid=nobody", "fsid=img", "fsid=img,domain_id=other"):
        assert mount_now(node.directory / "mnt", options) in ("EIO", "ENOBUFS")
    assert "not registered" in node.said


def test_prefetch_leaves_nothing_to_ask_for(node, image):
    node.start()
    prefetch = {"enable": True, "threads_count": 2, "merging_size": 1 << 20, "prefetch_all": True}
    node.register(image, prefetch_config={**prefetch, "bandwidth_rate": 0})
    target = node.mount()
    wait_until(lambda: f"blob {image.blob_id} is complete" in node.said)
    requests = node.requests()
    assert read_tree(target) == image.snapshot
    assert node.requests() == requests


def mounted_by_word(node, image, transport, look):
    """Mount by a daemon of its own, look at the mount, and end it."""
    target, words = erofs_words(node, image, "--transport", transport)
    pid = node.start(*words)
    look(target)
    assert node.kill(pid, signal.SIGTERM) == 0, node.said
    wait_until(lambda: not node.holders())


def test_cache_stays_warm_when_the_transport_changes(node, image):
    """Each fetches what the ones before it did not, and in the end nobody is asked."""
    subprocess.run(["modprobe", "nbd"], check=True)

    def reads(name):
        return lambda target: same_file(target / name, image.tree / name)

    def same(target):
        assert read_tree(target) == image.snapshot

    mounted_by_word(node, image, "nbd", reads("dir/f5"))
    mounted_by_word(node, image, "fuse", reads("dir/f4"))
    first = node.server.bytes_sent[image.blob_id]
    mounted_by_word(node, image, "cachefiles", same)
    (stored,) = image.blobs.values()
    # The chunks of the two files that were read; what is fetched ahead may be lost at an end.
    assert 0 < node.server.bytes_sent[image.blob_id] - first < len(stored) - 4 * CHUNK
    node.server.fault = 404
    shutil.rmtree(node.work / "cachefiles")
    for transport in ("nbd", "eager"):
        mounted_by_word(node, image, transport, same)
    # The one that clients mount has another cache of the kernel, and ours again.
    node.start()
    node.register(image)
    same(node.mount())


def same_file(path, other):
    assert path.read_bytes() == other.read_bytes()


# Ends


class Long:
    """An image with one large file, read in steps by several readers."""

    def __init__(self, image):
        self.image = image
        self.path = max((image.tree / "dir").iterdir(), key=lambda path: path.stat().st_size)
        self.content = self.path.read_bytes()

    def readers(self, target, rng, count, step, steps):
        """Start readers that each read chunks of one step, in their own order.

        From the end of the file, as what is behind a missing chunk is fetched with it.
        """
        length = len(self.content) // steps
        end = len(self.content) - step * length
        offsets = range(end - length, end, CHUNK // 2)
        path = target / "dir" / self.path.name
        found = []
        for _ in range(count):
            order = rng.sample(offsets, min(PIECES, len(offsets)))
            found.append(Reader([(path, at, self.content[at : at + 4096]) for at in order]))
        return found


@pytest.fixture(scope="module")
def long_image(tmp_path_factory):
    return Long(Image(tmp_path_factory.mktemp("long"), 3, extra=(SIZE,)))


class SlowServer:
    """Makes each request of a blob server take a moment, or wait after `hold` for `release`."""

    def __init__(self, server, seconds):
        self.find = server.find
        self.seconds = seconds
        self.asked = 0
        self.open = threading.Event()
        self.open.set()
        server.find = self

    def __call__(self, path):
        self.asked += 1
        self.open.wait(60)
        time.sleep(self.seconds)
        return self.find(path)

    def hold(self):
        self.asked = 0
        self.open.clear()

    def release(self):
        self.open.set()


def kill_series(node, long_image, kills, seed=0):
    """Kill the daemon in the middle of READs; no error, no wrong byte, no reader that is stuck."""
    rng = random.Random(seed)
    server = SlowServer(node.server, 0.01)
    pid = node.start()
    node.register(long_image.image)
    target = node.mount()
    for step in range(kills):
        server.hold()
        readers = long_image.readers(target, rng, 4, step, kills)
        # Some of them have a READ in hand, and nothing for it.
        wait_until(lambda: server.asked)
        if rng.random() < 0.7:
            # Anywhere between its fetch, the copy, the completion, and the next ones.
            server.release()
            time.sleep(rng.uniform(0, 0.3))
        node.kill(pid)
        server.release()
        pid = node.start()
        for reader in readers:
            reader.finish()
    forget_pages()
    assert read_tree(target) == long_image.image.snapshot
    node.unmount(target)
    assert node.kill(pid, signal.SIGTERM) == 0
    assert node.said.count("took over the cache") == kills


def test_killed_in_the_middle_of_reads(node, long_image):
    kill_series(node, long_image, KILLS)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_killed_in_the_middle_of_reads_fifty_times(node, long_image):
    kill_series(node, long_image, 50, seed=1)


def test_nobody_comes_after_a_kill(node, long_image):
    node.environment["NYDUSD_HOLDER_SECONDS"] = "4"
    pid = node.start()
    node.register(long_image.image)
    target = node.mount()
    node.server.fault = "stall"
    path = target / "dir" / long_image.path.name
    reader = Reader([(path, 0, long_image.content[:4096])])
    wait_until(lambda: node.requests() > 0)
    node.kill(pid)
    reader.join(60)
    assert not reader.is_alive()
    ((_, _, error),) = reader.wrong
    assert error.errno in (errno.EIO, errno.ENOBUFS)
    # The next one says what is dead, and serves anew.
    node.server.fault = None
    node.server.released.set()
    node.start()
    assert f"{target} is the dead mount of an earlier daemon" in node.said
    node.unmount(target)
    node.register(long_image.image)
    assert read_tree(node.mount()) == long_image.image.snapshot


def test_orderly_end_leaves_what_is_mounted(node, long_image):
    pid = node.start()
    node.register(long_image.image)
    target = node.mount()
    assert node.kill(pid, signal.SIGTERM) == 0
    assert "a successor has to come" in node.said
    path = target / "dir" / long_image.path.name
    reader = Reader([(path, 0, long_image.content[:4096])])
    pid = node.start()
    reader.finish()
    # Clients repeat themselves, once.
    node.register(long_image.image)
    status, _ = node.api("PUT", "/api/v2/blobs", node.entry(long_image.image, "img"))
    assert status == 500
    assert read_tree(target) == long_image.image.snapshot
    node.unmount(target)
    assert node.kill(pid, signal.SIGTERM) == 0
    wait_until(lambda: not node.holders())


def test_failover_by_a_supervisor(node, long_image, stack):
    supervisor = Supervisor(node.directory / "supervisor", stack)
    words = node.words("--id", "i", "--supervisor", supervisor.path)
    pid = node.start(*words)
    node.register(long_image.image)
    target = node.mount()
    supervisor.keep(lambda: node.api("PUT", "/api/v1/daemon/fuse/sendfd"))
    node.kill(pid)
    path = target / "dir" / long_image.path.name
    reader = Reader([(path, 0, long_image.content[:4096])])
    # The same command line: that the predecessor crashed is seen by the device and the socket.
    node.start(*words, state="INIT")
    takeover = "/api/v1/daemon/fuse/takeover"
    assert supervisor.give(lambda: node.api("PUT", takeover)) == (204, None)
    assert node.state() == "READY"
    assert node.api("PUT", "/api/v1/daemon/start") == (204, None)
    reader.finish()
    _, listed = node.api("GET", "/api/v2/blobs?domain_id=dom")
    assert [item["id"] for item in listed] == ["img", long_image.image.blob_id]
    assert read_tree(target) == long_image.image.snapshot


def test_upgrade_under_load(node, long_image, stack):
    supervisor = Supervisor(node.directory / "supervisor", stack)
    SlowServer(node.server, 0.05)
    names = ("--id", "i", "--supervisor", supervisor.path)
    old = node.start(*node.words(*names))
    node.register(long_image.image)
    target = node.mount()
    supervisor.keep(lambda: node.api("PUT", "/api/v1/daemon/fuse/sendfd"))
    readers = long_image.readers(target, random.Random(5), 4, 0, 1)
    sock = node.directory / "api1"
    node.start(*node.words(*names, "--upgrade", sock=sock), state="INIT", sock=sock)
    takeover = "/api/v1/daemon/fuse/takeover"
    assert supervisor.give(lambda: node.api("PUT", takeover, sock=sock)) == (204, None)
    assert node.api("PUT", "/api/v1/daemon/start", sock=sock) == (204, None)
    assert node.wait(old) == 0
    for reader in readers:
        reader.finish()
    assert node.state(sock) == "RUNNING"
    assert read_tree(target) == long_image.image.snapshot


def test_full_disk_is_an_error_that_heals(node, image):
    disk = node.directory / "disk"
    with disk.open("wb") as file:
        file.truncate(24 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-m", "0", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, node.cache], check=True)
    node.mounts.append(node.cache)
    node.start()
    node.register(image)
    target = node.mount()
    ballast = node.cache / "ballast"
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 20)):
            file.flush()
    with pytest.raises(OSError, match=r".") as failure:
        read(target / "dir/f6", 0, 4096)
    assert failure.value.errno == errno.EIO
    assert "of the kernel's cache is full" in node.said or "takes no data" in node.said
    ballast.unlink()
    wait_until(lambda: shutil.disk_usage(node.cache).free > 12 << 20)
    assert read_tree(target) == image.snapshot
    node.unmount(target)


def test_doctor_finds_it(tmp_path):
    report = diagnose(gather(tmp_path))
    assert (report.chosen.name, report.lazy) == ("cachefiles", True)
    found = {row.name: row for row in report.rows}["cachefiles on demand"]
    assert (found.verdict, found.remedy) == ("yes", "")


# Mounted by the daemon


def write_config(node, image):
    node.server.blobs.update(image.blobs)
    backend = {"type": "http-proxy", "config": {"addr": node.server.address, "path": "/blobs"}}
    cache = {"type": "blobcache", "config": {"work_dir": str(node.work)}}
    path = node.directory / "config.json"
    path.write_text(json.dumps({"device": {"backend": backend, "cache": cache}, "mode": "direct"}))
    return path


def erofs_words(node, image, *more):
    target = node.directory / f"mnt{len(node.mounts)}"
    target.mkdir()
    node.mounts.append(target)
    config = write_config(node, image)
    words = ("erofs", "-B", image.boot, "-C", config, "-M", target, "-A", node.sock)
    return target, [*words, *more]


def test_daemon_mounts_over_cachefiles_by_itself(node, image):
    target, words = erofs_words(node, image)
    pid = node.start(*words)
    # Before Linux 6.14 it is the best of what this kernel has.
    assert (node.work / "cachefiles/cache/Ierofs,nydusd").is_dir()
    assert read_tree(target) == image.snapshot
    assert node.kill(pid, signal.SIGTERM) == 0
    assert not target.is_mount()
    wait_until(lambda: not node.holders())
    # Again by word, and now without a backend.
    node.server.fault = 404
    again, words = erofs_words(node, image, "--transport", "cachefiles")
    pid = node.start(*words)
    assert read_tree(again) == image.snapshot
    assert node.kill(pid, signal.SIGTERM) == 0


def test_daemon_that_mounts_is_killed(node, long_image):
    """Nobody starts it again but its holder."""
    SlowServer(node.server, 0.05)
    target, words = erofs_words(node, long_image.image, "--transport", "cachefiles")
    pid = node.start(*words)
    readers = long_image.readers(target, random.Random(2), 4, 0, 2)
    time.sleep(0.3)
    node.kill(pid)
    for reader in readers:
        reader.finish()
    wait_until(lambda: node.state() == "RUNNING")
    (pid,) = served_by(node.cache.parent)
    assert read_tree(target) == long_image.image.snapshot
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not node.holders())
    assert not target.is_mount()


def served_by(directory):
    """Return the daemons that were started for a mount below a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"fscache" in words and any(os.fsencode(directory) in word for word in words):
                found.append(int(path.parent.name))
    return found


@pytest.mark.kernel("6.12", "6.1")
def test_kernel_without_it_is_told_what_there_is_instead(tmp_path):
    # Another test loads the module, which has no on-demand mode here.
    subprocess.run(["modprobe", "-r", "cachefiles"], check=True)
    words = ["singleton", "--fscache", tmp_path]
    environment = {"PATH": "/usr/bin", "NYDUSD_RUN_DIR": str(tmp_path / "run")}
    done = subprocess.run(
        [sys.executable, "-m", "fscache", *words],
        cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "not available on this kernel" in done.stderr
    assert "nydusd erofs" in done.stderr
    assert not Path("/dev/cachefiles").exists()
