"""Faults under a real mount: readers get EIO, never zeros; later everything works again.

Rows of spec ondemand 7.4, and the ends of daemons and mounts that nobody planned.
"""

import contextlib
import errno
import logging
import os
import random
import signal
import ssl
import subprocess
from pathlib import Path

import pytest
from capabilities import need_tool, requires
from fakes.blob_server import BlobServer
from leftovers import open_files
from serving import TIMEOUT, Serving, build_image, http, unmount, wait_until, write_config

import fscache.image
import fscache.runtime
from erofs import CorruptStructure, IntegrityError, NydusError, open_bootstrap
from fscache.backend.retry import RetryPolicy
from fscache.fetch.fetcher import Fetcher, FetcherOptions
from fscache.mounts.place import mounted_at
from fscache.transport import Transport

pytestmark = [
    pytest.mark.root,
    pytest.mark.fanotify,
    pytest.mark.erofs_mount,
    requires("root", "erofs_mount", "fanotify"),
]

CHUNK = 1 << 20
CHUNKS = 4
PAGE = 4096
# Seconds: for answers that do not come, and how long failures are remembered.
SHORT = 0.3
FORGET = 0.3

# Opens a file, says so, waits for a line, then reads the rest; errno as exit status.
_OPEN_THEN_READ = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
first = os.pread(fd, int(sys.argv[2]), 0)
print("open", flush=True)
sys.stdin.readline()
try:
    while data := os.read(fd, 1 << 20):
        sys.stdout.buffer.write(data)
except OSError as error:
    sys.exit(error.errno)
"""
_READ_NOW = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print("reading", flush=True)
try:
    sys.stdout.buffer.write(os.pread(fd, 4096, 0))
except OSError as error:
    sys.exit(error.errno)
"""
_FORGET_PAGES = """
import os, sys
os.posix_fadvise(os.open(sys.argv[1], os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
"""
_TOUCH_MAPPED_PAGE = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as pages:
    print(pages[0])
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    top = tmp_path_factory.mktemp("faults") / "source"
    top.mkdir()
    rng = random.Random(5)
    for name in ("a", "b", "c"):
        (top / name).write_bytes(rng.randbytes(CHUNKS * CHUNK - 1000))
    return top


@pytest.fixture(scope="module")
def image(source, tmp_path_factory):
    return build_image(source, tmp_path_factory.mktemp("faults") / "image")


@pytest.fixture
def blob_id(image):
    return next(iter(image.blobs()))


@pytest.fixture
def server(image, stack):
    server = BlobServer(image.blobs())
    stack.callback(server.stop)
    return server


@pytest.fixture
def serving(tmp_path, stack, monkeypatch):
    """Serving with few and quick repetitions, and failures that are soon forgotten."""
    options = FetcherOptions(negative_ttl=FORGET, sync_interval=0.1)
    monkeypatch.setattr(fscache.runtime, "Fetcher", lambda *_: Fetcher(options))
    retry = RetryPolicy(attempts=2, first_delay=0.01)
    monkeypatch.setattr(fscache.image, "retry_policy", lambda _: retry)
    return Serving(tmp_path, stack)


def chunk_infos(image, name):
    with open_bootstrap(image.bootstrap) as bootstrap:
        return list(bootstrap.file_chunks(bootstrap.lookup(name)))


def data_in_cache(cache, blob_id, info):
    """Tell whether the data file holds anything where a chunk belongs."""
    with (cache / f"{blob_id}.blob.data").open("rb") as file:
        try:
            start = os.lseek(file.fileno(), info.uncompressed_offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return False
    return start < info.uncompressed_offset + info.uncompressed_size


def bit_on_disk(cache, blob_id, index):
    path = cache / f"{blob_id}.blob.data.chunk_map"
    if not path.exists():
        return False
    return bool(path.read_bytes()[4096 + index // 8] & 0x80 >> index % 8)


def assert_nothing_kept(serving, blob_id, infos):
    for info in infos:
        assert not data_in_cache(serving.directory / "cache", blob_id, info)
        assert not bit_on_disk(serving.directory / "cache", blob_id, info.chunk_index)


def read_in_the_end(serving, path, expected):
    """Read until failures are forgotten; what is read before that is short, never wrong."""

    def right():
        try:
            got = serving.read(path)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        assert expected.startswith(got)
        return len(got) == len(expected)

    wait_until(right)


def flip(blobs, blob_id, offset):
    broken = bytearray(blobs[blob_id])
    broken[offset] ^= 0x01
    return {blob_id: bytes(broken)}


def test_corrupted_chunk_is_refused_and_harms_no_other(serving, server, image, source, blob_id):
    infos = chunk_infos(image, b"/b")
    good = dict(server.blobs)
    server.blobs = flip(good, blob_id, infos[1].compressed_offset + 1000)
    daemon = serving.start(image, http(server))
    top = daemon.mountpoint
    content = (source / "b").read_bytes()
    serving.read_fails(top / "b", CHUNK)
    assert daemon.served.cache_metrics.digest_failures > 0
    # The neighbours in the same file, and other files.
    assert serving.read(top / "b", 0, CHUNK) == content[:CHUNK]
    assert serving.read(top / "b", 2 * CHUNK) == content[2 * CHUNK :]
    assert serving.read(top / "a") == (source / "a").read_bytes()
    # A read that begins before the chunk ends at it.
    assert serving.read(top / "b") == content[:CHUNK]
    assert_nothing_kept(serving, blob_id, [infos[1]])
    server.blobs = good
    read_in_the_end(serving, top / "b", content)


def test_mapped_page_of_a_corrupted_chunk_is_a_bus_error(serving, server, image, source, blob_id):
    server.blobs = flip(server.blobs, blob_id, chunk_infos(image, b"/b")[0].compressed_offset)
    top = serving.start(image, http(server)).mountpoint
    status, out, _ = serving.child(_TOUCH_MAPPED_PAGE, top / "b").end()
    assert (status, out) == (-signal.SIGBUS, b"")


def test_truncated_blob(serving, server, image, source, blob_id):
    infos = chunk_infos(image, b"/b")
    good = dict(server.blobs)
    server.blobs = {blob_id: good[blob_id][: infos[2].compressed_offset + 100]}
    top = serving.start(image, http(server)).mountpoint
    content = (source / "b").read_bytes()
    serving.read_fails(top / "b", 2 * CHUNK)
    serving.read_fails(top / "c")
    assert serving.read(top / "b") == content[: 2 * CHUNK]
    assert serving.read(top / "a") == (source / "a").read_bytes()
    assert_nothing_kept(serving, blob_id, [*infos[2:], *chunk_infos(image, b"/c")])
    server.blobs = good
    read_in_the_end(serving, top / "b", content)
    read_in_the_end(serving, top / "c", (source / "c").read_bytes())


def test_dead_server(serving, server, image, source, blob_id):
    top = serving.start(image, http(server)).mountpoint
    assert serving.read(top / "a") == (source / "a").read_bytes()
    server.stop()
    serving.read_fails(top / "b")
    # What is in the cache needs no server.
    assert serving.read(top / "a") == (source / "a").read_bytes()
    assert_nothing_kept(serving, blob_id, chunk_infos(image, b"/b"))
    server.start()
    read_in_the_end(serving, top / "b", (source / "b").read_bytes())


FAULTS = [
    *(403, 404, 416, 500, 503),
    *("ignore-range", "wrong-range", "truncate", "long", "long-length", "short-length", "reset"),
    *("stall", "drip"),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_misbehaving_server(serving, server, image, source, blob_id, fault):
    slow = fault in ("stall", "drip")
    options = {"timeout": SHORT, "transfer_timeout": SHORT} if slow else {}
    top = serving.start(image, http(server, **options)).mountpoint
    server.fault = fault
    serving.read_fails(top / "b")
    serving.read_fails(top / "b", CHUNK, PAGE)
    assert_nothing_kept(serving, blob_id, chunk_infos(image, b"/b"))
    server.fault = None
    read_in_the_end(serving, top / "b", (source / "b").read_bytes())


def test_one_failure_is_repeated_and_not_seen(serving, server, image, source):
    server.fault, server.fault_count = 503, 1
    top = serving.start(image, http(server)).mountpoint
    assert serving.read(top / "b") == (source / "b").read_bytes()
    assert server.fault_count == 0


def test_stalled_chunk_does_not_hold_others(serving, server, image, source):
    top = serving.start(image, http(server)).mountpoint
    server.fault, server.fault_count = "stall", 1
    waiting = serving.child(_READ_NOW, top / "b")
    assert waiting.line() == b"reading"
    wait_until(lambda: server.fault_count == 0)
    assert serving.read(top / "a") == (source / "a").read_bytes()
    assert waiting.process.poll() is None
    # A reader can be killed while it waits for the chunk.
    waiting.process.kill()
    assert waiting.process.wait(TIMEOUT) == -signal.SIGKILL
    server.released.set()
    read_in_the_end(serving, top / "b", (source / "b").read_bytes())


def test_tls_that_fails_and_heals(serving, image, source, stack, tmp_path, caplog):
    """A certificate nobody trusts: EIO and one line, no data, no plain HTTP; then it is trusted."""
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    need_tool("openssl")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=nobody",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = BlobServer(image.blobs(), tls=context)
    stack.callback(server.stop)
    top = serving.start(image, http(server)).mountpoint
    serving.read_fails(top / "a")
    assert not server.ranges
    assert "certificate" in caplog.text
    trusting = http(server, ca_cert_files=(certificate,))
    top = serving.start(image, trusting, work_dir=tmp_path / "other").mountpoint
    assert serving.read(top / "a") == (source / "a").read_bytes()


@pytest.fixture
def small_disk(tmp_path, stack):
    """An ext4 of its own, too small for the blob."""
    for tool in ("mkfs.ext4", "mount"):
        need_tool(tool)
    disk, top = tmp_path / "disk", tmp_path / "small"
    top.mkdir()
    with disk.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, top], check=True)
    stack.callback(unmount, top)
    return top


@requires("loop")
def test_full_disk(serving, server, image, source, small_disk, blob_id, caplog, monkeypatch):
    monkeypatch.setattr("fscache.fetch.complaints._TELL_SECONDS", 3600)
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast = small_disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - 6 * CHUNK)
    cache = small_disk / "cache"
    daemon = serving.start(image, http(server), work_dir=cache)
    top = daemon.mountpoint
    assert serving.read(top / "a") == (source / "a").read_bytes()
    for name in ("b", "c"):
        got = b""
        with contextlib.suppress(OSError):
            got = serving.read(top / name)
        assert len(got) < CHUNKS * CHUNK - 1000
        assert (source / name).read_bytes().startswith(got)
    # One clear line, however many chunks have no room (spec ondemand 7.4).
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert sum("chunks failed)" in text for text in told) == 1
    assert sum(text.startswith("reads fail: ") for text in told) == 1
    assert serving.read(top / "a") == (source / "a").read_bytes()
    ballast.unlink()
    for name in ("b", "c"):
        read_in_the_end(serving, top / name, (source / name).read_bytes())
    daemon.stop()
    # Chunk map and data survived: nothing has to be fetched again.
    asked = len(server.ranges)
    top = serving.start(image, http(server), work_dir=cache).mountpoint
    assert serving.snapshot(top)
    assert len(server.ranges) == asked


@requires("loop")
def test_disk_that_turns_read_only(serving, server, image, source, small_disk, blob_id, caplog):
    daemon = serving.start(image, http(server), work_dir=small_disk / "cache")
    top = daemon.mountpoint
    # All of it: the kernel reads ahead, and one event for what is there and what is not fails.
    content = (source / "a").read_bytes()
    assert serving.read(top / "a") == content
    numbers = [chunk.chunk_index for chunk in chunk_infos(image, b"/a")]
    wait_until(lambda: all(bit_on_disk(small_disk / "cache", blob_id, n) for n in numbers))
    device = mounted_at(small_disk).source
    trigger = Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error")
    subprocess.run(["mount", "-o", "remount,errors=remount-ro", small_disk], check=True)
    trigger.write_text("test")
    serving.read_fails(top / "b")
    assert "Read-only file system" in caplog.text
    # What was there is still right.
    serving.child(_FORGET_PAGES, top / "a").finish()
    assert serving.read(top / "a") == content
    with pytest.raises(NydusError, match="Read-only file system"):
        daemon.stop()
    assert not os.path.ismount(top)


def test_unknown_file_in_the_serve_directory_is_denied(serving, server, image, source, caplog):
    top = serving.start(image, http(server)).mountpoint
    stranger = serving.directory / "stranger"
    stranger.write_bytes(b"of nobody")
    serve = next((serving.directory / "cache").glob("serve-*/"))
    os.link(stranger, serve / "stranger")
    serving.read_fails(serve / "stranger")
    assert "not of a served image" in caplog.text
    assert serving.read(top / "a") == (source / "a").read_bytes()


@pytest.mark.parametrize("change", ["truncated", "deleted"])
def test_cache_file_changed_under_the_daemon(serving, server, image, source, blob_id, change):
    """Somebody else touches the store: an error, no zeros (row 7.4)."""
    top = serving.start(image, http(server)).mountpoint
    assert serving.read(top / "a", 0, PAGE) == (source / "a").read_bytes()[:PAGE]
    cache = serving.directory / "cache"
    paths = [cache / f"{blob_id}.blob.data", next(cache.glob("serve-*/")) / blob_id]
    if change == "truncated":
        os.truncate(paths[0], PAGE)
    else:
        for path in paths:
            path.unlink()
    serving.read_fails(top / "b")


def test_unmounted_by_somebody_else(serving, server, image, source):
    daemon = serving.start(image, http(server))
    top = daemon.mountpoint
    reader = serving.child(_OPEN_THEN_READ, top / "b", PAGE)
    assert reader.line() == b"open"
    unmount(top)
    assert list(top.iterdir()) == []
    # Its open file is served on.
    reader.go()
    assert reader.finish() == (source / "b").read_bytes()
    daemon.stop()
    assert not list((serving.directory / "cache").glob("serve-*"))


def test_unmounted_during_a_fetch(serving, server, image, source):
    """The reader is gone, its chunk comes late: nothing leaks, and the cache is right."""
    daemon = serving.start(image, http(server))
    server.fault, server.fault_count = "stall", 1
    reader = serving.child(_READ_NOW, daemon.mountpoint / "a")
    assert reader.line() == b"reading"
    wait_until(lambda: server.fault_count == 0)
    subprocess.run(["umount", "-l", daemon.mountpoint], check=True)
    reader.process.kill()
    reader.process.wait()
    # A descriptor that something else gets while the fetch still knows its number.
    innocent = serving.directory / "innocent"
    innocent.write_bytes(b"untouched")
    with innocent.open("r+b"):
        server.released.set()
        daemon.stop()
    assert innocent.read_bytes() == b"untouched"
    assert not [path for path in (serving.directory / "cache").glob("serve-*") if path.is_dir()]
    assert not [file for file in open_files() if str(serving.directory / "cache") in file]
    top = serving.start(image, http(server)).mountpoint
    assert serving.read(top / "a") == (source / "a").read_bytes()


def test_two_daemons_share_a_work_directory(serving, server, image, source):
    first, second = (serving.start(image, http(server)) for _ in range(2))
    got = serving.snapshot(first.mountpoint)
    assert serving.snapshot(second.mountpoint) == got
    for name in ("a", "b", "c"):
        assert serving.read(first.mountpoint / name) == (source / name).read_bytes()
    first.stop()
    assert serving.snapshot(second.mountpoint) == got
    second.stop()
    asked = len(server.ranges)
    assert serving.snapshot(serving.start(image, http(server)).mountpoint) == got
    assert len(server.ranges) == asked


def test_two_daemons_read_at_once(serving, server, image, source):
    daemons = [serving.start(image, http(server)) for _ in range(2)]
    readers = [
        serving.child(_OPEN_THEN_READ, daemon.mountpoint / name, 0)
        for daemon in daemons
        for name in ("a", "b", "c")
    ]
    for reader in readers:
        assert reader.line() == b"open"
    for reader in readers:
        reader.go()
    for reader, name in zip(readers, "abcabc", strict=True):
        assert reader.finish() == (source / name).read_bytes()


# A daemon of its own, because it gets a signal


def start_nydusd(serving, image, server, command="erofs", **options):
    backend = {"type": "http-proxy", "config": {"addr": server.address, **options}}
    config = write_config(serving.directory / "config.json", image, backend)
    top = serving.mountpoint()
    daemon = serving.nydusd(command, "-B", image.bootstrap, "-M", top, "-C", config)
    daemon.wait_for("serving ")
    return daemon, top


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_terminated_while_readers_use_the_mount(serving, server, image, source, number):
    daemon, top = start_nydusd(serving, image, server)
    readers = [serving.child(_OPEN_THEN_READ, top / name, PAGE) for name in ("a", "b", "c")]
    for reader in readers:
        assert reader.line() == b"open"
    before = len(server.ranges)
    daemon.send(number)
    daemon.wait_for("unmounted lazily")
    assert not os.path.ismount(top)
    # A second signal must not leave the readers alone.
    daemon.send(number)
    for reader, name in zip(readers, "abc", strict=True):
        assert daemon.process.poll() is None
        reader.go()
        assert reader.finish() == (source / name).read_bytes()
    assert daemon.end() == 0
    assert len(server.ranges) > before
    assert not list((serving.directory / "cache").glob("serve-*"))


def test_terminated_with_a_pending_fetch_that_ends_well(serving, server, image, source):
    daemon, top = start_nydusd(serving, image, server, timeout=TIMEOUT)
    server.fault, server.fault_count = "stall", 1
    reader = serving.child(_READ_NOW, top / "b")
    assert reader.line() == b"reading"
    wait_until(lambda: server.fault_count == 0)
    daemon.send(signal.SIGTERM)
    daemon.wait_for("unmounted lazily")
    # The connection ends without an answer, and the repetition succeeds.
    server.released.set()
    assert reader.finish() == (source / "b").read_bytes()[:PAGE]
    assert daemon.end() == 0


def test_terminated_with_a_pending_fetch_that_fails(serving, server, image):
    daemon, top = start_nydusd(serving, image, server, timeout=0.5)
    server.fault = "stall"
    reader = serving.child(_READ_NOW, top / "b")
    assert reader.line() == b"reading"
    wait_until(lambda: server.ranges)
    daemon.send(signal.SIGTERM)
    assert reader.end()[0] == errno.EIO
    assert daemon.end() == 0
    assert not os.path.ismount(top)


def test_cache_of_a_killed_daemon_is_good(serving, server, image, source):
    """Killed while readers are served; the next daemon serves the right bytes from its cache."""
    daemon, top = start_nydusd(serving, image, server, "fuse")
    assert serving.read(top / "a") == (source / "a").read_bytes()
    readers = [serving.child(_OPEN_THEN_READ, top / name, 0) for name in ("b", "c")]
    for reader in readers:
        reader.line()
        reader.go()
    daemon.process.kill()
    daemon.process.wait(TIMEOUT)
    for reader in readers:
        reader.close()
    unmount(top)
    top = serving.start(image, http(server)).mountpoint
    for name in ("a", "b", "c"):
        assert serving.read(top / name) == (source / name).read_bytes()
    # The holder of the killed one gives up for want of a successor at its mount point.
    wait_until(lambda: len(list((serving.directory / "cache").glob("serve-*/"))) == 1)


# Eager: everything first, then nobody is needed


def test_eager_fetches_and_verifies_everything_before_the_mount(serving, server, image, source):
    daemon = serving.start(image, http(server), transport=Transport.EAGER)
    assert daemon.served.cache_metrics.as_dict()["data_all_ready"] is True
    sent = len(server.ranges)
    server.stop()
    for name in ("a", "b", "c"):
        assert serving.read(daemon.mountpoint / name) == (source / name).read_bytes()
    assert len(server.ranges) == sent
    total = sum(path.stat().st_size for path in image.blob_dir.iterdir())
    assert sum(server.bytes_sent.values()) <= total


def test_eager_refuses_a_corrupted_chunk(serving, server, image, source, blob_id):
    infos = chunk_infos(image, b"/b")
    good = dict(server.blobs)
    server.blobs = flip(good, blob_id, infos[1].compressed_offset + 1000)
    with pytest.raises(IntegrityError, match="wrong digest") as caught:
        serving.start(image, http(server), transport=Transport.EAGER)
    assert blob_id in str(caught.value)
    assert f"chunk {infos[1].chunk_index}" in str(caught.value)
    assert not os.path.ismount(serving.directory / "mnt0")
    assert_nothing_kept(serving, blob_id, [infos[1]])
    server.blobs = good
    top = serving.start(image, http(server), transport=Transport.EAGER).mountpoint
    assert serving.read(top / "b") == (source / "b").read_bytes()


def test_eager_mount_outlives_a_killed_daemon(serving, server, image, source):
    config = write_config(
        serving.directory / "config.json",
        image,
        {"type": "http-proxy", "config": {"addr": server.address}},
    )
    top = serving.mountpoint()
    daemon = serving.nydusd("erofs", "-B", image.bootstrap, "-M", top, "-C", config, "--eager")
    daemon.wait_for("serving ")
    daemon.process.kill()
    daemon.process.wait(TIMEOUT)
    server.stop()
    for name in ("a", "b", "c"):
        assert serving.read(top / name) == (source / name).read_bytes()


def test_eager_stops_although_the_mount_is_in_use(serving, server, image, source):
    daemon = serving.start(image, http(server), transport=Transport.EAGER)
    reader = serving.child(_OPEN_THEN_READ, daemon.mountpoint / "b", 0)
    assert reader.line() == b"open"
    daemon.stop()
    assert not os.path.ismount(daemon.mountpoint)
    reader.go()
    assert reader.finish() == (source / "b").read_bytes()


def test_wrong_size_in_the_device_table_is_refused(serving, server, image):
    data = bytearray(image.bootstrap.read_bytes())
    # Block count of the first device slot (rafs-v6 1.8).
    offset = 1408 + 64
    blocks = int.from_bytes(data[offset : offset + 4], "little")
    data[offset : offset + 4] = (blocks + 1).to_bytes(4, "little")
    broken = serving.directory / "broken.boot"
    broken.write_bytes(data)
    with pytest.raises(CorruptStructure, match="differ in size"):
        serving.start(image._replace(bootstrap=broken), http(server))
    assert not os.path.ismount(serving.directory / "mnt0")
