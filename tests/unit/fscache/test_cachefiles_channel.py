"""The cachefiles channel with a fake device: what is filled, when, and that all is answered."""

import errno
import os
import struct
import threading
import time
from pathlib import Path

import pytest
from fakes.blob_image import CHUNK_SIZE, Blob
from fakes.cachefiles_device import FakeKernel
from fakes.memory_reader import MemoryReader

from fscache.backend import Unavailable
from fscache.backend.retry import RetryPolicy
from fscache.cache.cachedblob import CachedBlob
from fscache.cachefiles import copying
from fscache.cachefiles.cache import KernelCache
from fscache.cachefiles.errors import CachefilesError
from fscache.cachefiles.sources import PIECE_BYTES, BlobSource, BootstrapSource
from fscache.fetch.demand import Demand
from fscache.fetch.fetcher import Fetcher, FetcherOptions
from fscache.metrics import CacheMetrics

SIZES = [CHUNK_SIZE] * 4 + [5000, 100]
FAST = FetcherOptions(workers=4, negative_ttl=0.0, sync_interval=60.0)


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Rig:
    """A cache with one blob `d/<id>` and one bootstrap `d/boot`."""

    def __init__(self, directory, *, eager=False):
        (directory / "kernel").mkdir()
        self.kernel = FakeKernel(directory / "kernel")
        self.blob = Blob(SIZES)
        self.reader = MemoryReader(self.blob)
        self.fetcher = Fetcher(FAST)
        self.cached = CachedBlob.open(
            directory, self.blob.entry, self.blob.chunks, self.reader, CacheMetrics(directory)
        )
        self.cached.retry = RetryPolicy(attempts=1)
        self.fetcher.attach(self.cached)
        self.bootstrap = os.urandom(PIECE_BYTES + 5000)
        (directory / "boot").write_bytes(self.bootstrap)
        self.fd = os.open(directory / "boot", os.O_RDONLY)
        self.mounts = []
        self.source = BlobSource(self.cached, Demand(self.fetcher), eager=eager)
        self.cache = KernelCache(self.kernel.device, directory, 2)
        boot = BootstrapSource(self.fd, lambda: self.mounts.append("boot"))
        self.cache.add("d", "boot", boot, boot.digest())
        self.cache.add("d", self.blob.id, self.source)
        self.closed = False
        self.cache.start()

    def open(self):
        opened, size = self.kernel.open("d", self.blob.id)
        assert size == len(self.blob.plain)
        return opened

    def end(self, **options):
        self.closed = True
        self.cache.close(5, **options)

    def close(self):
        self.reader.gate.set()
        if not self.closed:
            self.end()
        self.fetcher.close(5)
        os.close(self.fd)
        self.kernel.close()


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def test_bootstrap_is_copied_without_being_asked_for(rig):
    opened, size = rig.kernel.open("d", "boot")
    assert size == PIECE_BYTES + 8192
    wait_until(lambda: opened.has(0, size))
    assert opened.data() == rig.bootstrap + bytes(size - len(rig.bootstrap))
    assert rig.mounts == ["boot"]
    assert not os.get_inheritable(opened.fd)


def test_read_is_fetched_and_the_rest_of_its_chunk_follows(rig):
    opened = rig.open()
    assert rig.kernel.read(opened, 8192, 4096) == rig.blob.plain[8192 : 8192 + 4096]
    wait_until(lambda: opened.has(0, CHUNK_SIZE))
    assert opened.data()[:CHUNK_SIZE] == rig.blob.plain[:CHUNK_SIZE]
    assert not opened.has(CHUNK_SIZE, 4096)
    assert rig.cached.chunks.ready_count == 1


def test_everything_can_be_read_in_any_pieces(rig):
    opened = rig.open()
    for offset in range(0, len(rig.blob.plain), 3 * 4096):
        length = min(3 * 4096, len(rig.blob.plain) - offset)
        assert rig.kernel.read(opened, offset, length) == rig.blob.plain[offset : offset + length]
    assert opened.data() == rig.blob.plain
    assert rig.cache.waiting == 0


def test_what_is_in_our_own_cache_is_not_fetched_again(rig):
    rig.fetcher.fetch_all(rig.cached)
    reads = len(rig.reader.reads)
    opened = rig.open()
    assert rig.kernel.read(opened, 0, 4096) == rig.blob.plain[:4096]
    assert len(rig.reader.reads) == reads


def test_what_is_fetched_ahead_is_copied_ahead(rig):
    opened = rig.open()
    rig.fetcher.fetch_all(rig.cached)
    wait_until(lambda: opened.has(0, len(rig.blob.plain)))
    assert opened.data() == rig.blob.plain


@pytest.mark.parametrize("eager", [True, False])
def test_what_was_ready_before_is_copied_when_there_is_a_prefetch(tmp_path, eager):
    rig = Rig(tmp_path, eager=eager)
    try:
        rig.fetcher.ensure(rig.cached, 0, 2 * CHUNK_SIZE)
        opened = rig.open()
        if eager:
            wait_until(lambda: opened.has(0, 2 * CHUNK_SIZE))
        else:
            rig.end()
            assert not opened.has(0, 4096)
        assert not opened.has(2 * CHUNK_SIZE, 4096)
    finally:
        rig.close()


def test_what_the_kernel_has_is_not_written_again(rig, monkeypatch):
    opened = rig.open()
    rig.kernel.read(opened, 0, CHUNK_SIZE)
    rig.kernel.withdraw(opened)
    wait_until(lambda: not opened.is_open)
    written = []
    monkeypatch.setattr(os, "pwritev", lambda *args: written.append(args))
    again, _ = rig.kernel.open("d", rig.blob.id, opened.path)
    assert rig.kernel.read(again, 4096, 8192) == rig.blob.plain[4096 : 4096 + 8192]
    assert not written


@pytest.mark.parametrize(
    ("scope", "name"), [("d", "nobody"), ("other", "boot"), ("", "boot"), ("d", "bo\udcffot")]
)
def test_unknown_names_are_refused(rig, scope, name):
    raw = name.encode(errors="surrogateescape").decode("latin-1")
    opened, answer = rig.kernel.open(scope, raw)
    assert answer == -errno.ENOENT
    wait_until(lambda: not opened.is_open)
    assert rig.cache.open_files == 0


def test_volume_of_another_file_system_is_refused(rig):
    opened, answer = rig.kernel.open("d", "boot")
    assert answer > 0
    fd = os.open(opened.path, os.O_RDONLY)
    raw = bytearray(b"afs,d\0boot")
    message = struct.pack("=IIIIIIII", 77, 0, 32 + len(raw), 9, 6, 4, fd, 0) + raw
    rig.kernel.end.send(message)
    assert rig.kernel.command() == b"copen 77,-2"


def test_failed_fetch_is_answered_without_data(rig):
    opened = rig.open()
    rig.reader.error = Unavailable("away")
    assert rig.kernel.read(opened, 0, 8192) is None
    rig.reader.error = None
    assert rig.kernel.read(opened, 0, 8192) == rig.blob.plain[:8192]


def test_wrong_chunk_never_gets_into_the_kernels_cache(rig):
    opened = rig.open()
    rig.reader.stored[10] ^= 1
    assert rig.kernel.read(opened, 0, 4096) is None
    assert not opened.has(0, 4096)


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 1 << 40),
        (len(SIZES) << 40, 4096),
        (512, 4096),
        (5 * CHUNK_SIZE, CHUNK_SIZE),
        (0, 0),
        ((1 << 64) - 4096, (1 << 64) - 1),
    ],
)
def test_ranges_that_cannot_be_are_answered_without_data(rig, offset, length):
    opened = rig.open()
    msg_id = rig.kernel.begin_read(opened, offset, length)
    assert rig.kernel.answered() == (opened.inode, msg_id)
    assert rig.cache.waiting == 0
    assert rig.reader.reads == []


def test_slow_fetch_stops_nobody_else(rig):
    opened = rig.open()
    rig.reader.gate.clear()
    waiting = [rig.kernel.begin_read(opened, number * CHUNK_SIZE, 4096) for number in range(4)]
    other, size = rig.kernel.open("d", "boot")
    wait_until(lambda: other.has(0, size))
    assert rig.kernel.completed.empty()
    rig.reader.gate.set()
    assert {rig.kernel.answered()[1] for _ in waiting} == set(waiting)


def test_two_reads_of_one_chunk_fetch_it_once(rig):
    opened = rig.open()
    rig.reader.gate.clear()
    ids = {rig.kernel.begin_read(opened, offset, 4096) for offset in (0, 8192, 0)}
    rig.reader.entered.wait(20)
    rig.reader.gate.set()
    assert {rig.kernel.answered()[1] for _ in ids} == ids
    assert len(rig.reader.reads) == 1


def test_withdrawn_while_it_is_fetched(rig):
    opened = rig.open()
    rig.reader.gate.clear()
    rig.kernel.begin_read(opened, 0, 4096)
    rig.kernel.withdraw(opened)
    # The next mount of the name waits for that, not for the backend.
    wait_until(lambda: not opened.is_open)
    rig.reader.gate.set()
    wait_until(lambda: rig.cached.chunks.ready_count == 1)
    again = rig.open()
    assert rig.kernel.read(again, 0, 4096) == rig.blob.plain[:4096]
    assert rig.kernel.completed.empty()


def test_kernel_that_does_not_want_the_file_any_more(rig):
    rig.kernel.device.refuse_commands = True
    opened, _ = rig.kernel.begin_open("d", "boot")
    wait_until(lambda: not opened.is_open)
    assert rig.cache.open_files == 0
    rig.kernel.device.refuse_commands = False
    assert rig.open().is_open


def test_bad_messages_and_failed_reads_do_not_end_it(rig):
    fd = os.open(os.devnull, os.O_RDONLY)
    bad = struct.pack("=IIIIIIII", 5, 0, 40, 9, 4, 4, fd, 0) + b"badxname"
    rig.kernel.end.send(bad)
    assert rig.kernel.command() == b"copen 5,-5"
    wait_until(lambda: not Path(f"/proc/self/fd/{fd}").exists())
    # An OPEN without its descriptor.
    rig.kernel.end.send(bad[:20])
    assert rig.kernel.command() == b"copen 5,-5"
    rig.kernel.end.send(b"short")
    rig.kernel.device.read_errors = [errno.EMFILE, errno.EEXIST]
    rig.kernel.end.send(struct.pack("=IIIIQQ", 5, 2, 32, 999, 0, 4096))
    assert rig.open().is_open
    assert rig.cache.trouble == ""


def test_bad_reads_are_answered_without_data(rig):
    opened = rig.open()
    header = struct.pack("=IIII", 77, 2, 24, opened.object_id)
    rig.kernel.end.send(header + bytes(8))
    assert rig.kernel.answered() == (opened.inode, 77)
    # One of nobody's: there is no descriptor by which it could be answered.
    rig.kernel.end.send(struct.pack("=IIIIQ", 78, 2, 24, 999, 0))
    assert rig.kernel.read(opened, 0, 4096) == rig.blob.plain[:4096]
    assert rig.cache.waiting == 0


def test_bug_of_a_callback_is_an_answer(rig, monkeypatch):
    opened = rig.open()
    monkeypatch.setattr(rig.source, "copy", lambda *args: 1 / 0)
    assert rig.kernel.read(opened, 0, 4096) is None
    monkeypatch.setattr(rig.source, "around", lambda *args: 1 / 0)
    assert rig.kernel.read(opened, 0, 4096) is None


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.EROFS, "is read-only"),
        (errno.ENOSPC, "is full"),
        (errno.ENOBUFS, "less than 1 %"),
        (errno.EIO, "cannot be written"),
    ],
)
def test_cache_that_takes_no_data(rig, monkeypatch, caplog, code, text):
    opened = rig.open()
    write = os.pwritev

    def refuse(fd, *args):
        if fd == opened.fd:
            raise OSError(code, os.strerror(code))
        return write(fd, *args)

    monkeypatch.setattr(os, "pwritev", refuse)
    assert rig.kernel.read(opened, 0, 4096) is None
    assert text in caplog.text
    monkeypatch.setattr(os, "pwritev", write)
    assert rig.kernel.read(opened, 0, 4096) == rig.blob.plain[:4096]


def test_kernel_that_needs_a_moment(rig, monkeypatch):
    opened = rig.open()
    write, refused = os.pwritev, []

    def hesitate(fd, *args):
        if fd == opened.fd and len(refused) < 3:
            refused.append(fd)
            raise OSError(errno.ENOBUFS, "not yet")
        return write(fd, *args)

    monkeypatch.setattr(os, "pwritev", hesitate)
    assert rig.kernel.read(opened, 0, 4096) == rig.blob.plain[:4096]
    assert len(refused) == 3


def test_part_of_a_page_is_an_error(rig, monkeypatch):
    opened = rig.open()
    monkeypatch.setattr(os, "pwritev", lambda *args: 100)
    with rig.cache._channel._held(rig.cache._channel._machine.objects[0]):
        target = rig.cache._channel._machine.objects[0]
        with pytest.raises(CachefilesError, match="part of a page"):
            copying.copy(target, BootstrapSource(rig.fd), (0, 4096))
    assert opened.is_open


def test_orderly_end_answers_all(rig):
    opened = rig.open()
    rig.reader.gate.clear()
    msg_id = rig.kernel.begin_read(opened, 0, 4096)
    rig.reader.entered.wait(20)
    rig.cache._channel.close(0.01)
    rig.closed = True
    assert rig.kernel.answered() == (opened.inode, msg_id)
    assert not opened.is_open


def test_end_that_leaves_answers_what_it_can(rig):
    opened = rig.open()
    rig.reader.gate.clear()
    msg_id = rig.kernel.begin_read(opened, 0, 4096)
    rig.reader.entered.wait(20)
    threading.Timer(0.05, rig.reader.gate.set).start()
    rig.end(leave=True)
    assert rig.kernel.answered() == (opened.inode, msg_id)
    assert opened.has(0, 4096)
    assert not opened.is_open


def test_end_that_leaves_answers_nothing_without_data(rig):
    opened = rig.open()
    rig.reader.gate.clear()
    rig.kernel.begin_read(opened, 0, 4096)
    rig.reader.entered.wait(20)
    rig.closed = True
    rig.cache._channel.close(0.01, leave=True)
    rig.reader.gate.set()
    assert not opened.is_open
    assert rig.kernel.completed.empty()


def test_other_sources_of_a_name(rig, tmp_path):
    (tmp_path / "other").mkdir()
    cached = CachedBlob.open(
        tmp_path / "other", rig.blob.entry, rig.blob.chunks, rig.reader, CacheMetrics(tmp_path)
    )
    rig.fetcher.attach(cached)
    other = BlobSource(cached, Demand(rig.fetcher), eager=False)
    rig.cache.add("d", rig.blob.id, other)
    opened = rig.open()
    assert not rig.cache.is_alone("d", rig.blob.id)
    rig.cache.put_last("d", rig.blob.id, rig.source)
    assert rig.kernel.read(opened, 0, 4096) == rig.blob.plain[:4096]
    assert cached.chunks.ready_count == 1
    rig.cache.remove("d", rig.blob.id, rig.source)
    assert rig.cache.is_alone("d", rig.blob.id)
    assert rig.cache.is_open("d", rig.blob.id)
    with pytest.raises(CachefilesError, match="another content"):
        rig.cache.add("d", "boot", BootstrapSource(rig.fd), b"other")


def test_name_that_is_not_served_any_more(rig):
    """An image may be closed before the kernel has told that its files are."""
    opened = rig.open()
    (filling,) = rig.cache._channel._fillings.values()
    rig.cache.remove("d", rig.blob.id, rig.source)
    assert rig.kernel.read(opened, 0, 4096) is None
    # The threads that copy ahead are alive afterwards.
    for _ in range(8):
        filling.add((0, 4096))
    rig.cache.add("d", rig.blob.id, rig.source)
    again = rig.open()
    assert rig.kernel.read(again, 0, 4096) == rig.blob.plain[:4096]
    rig.fetcher.fetch_all(rig.cached)
    wait_until(lambda: again.has(0, len(rig.blob.plain)))


def test_bootstrap_is_copied_from_its_own_file(tmp_path):
    """Whoever copies in the background may be at it when the image is closed."""
    place = tmp_path / "boot"
    place.write_bytes(b"bootstrap" * 1000)
    fd = os.open(place, os.O_RDONLY)
    source = BootstrapSource(fd)
    os.close(fd)
    page = memoryview(bytearray(4096))
    source.copy(4096, page)
    assert page == place.read_bytes()[4096:8192]
    (link,) = [path for path in Path("/proc/self/fd").iterdir() if points_to(path, place)]
    del source
    assert not link.exists()


def points_to(link, place):
    try:
        return link.readlink() == place
    except OSError:
        return False


def test_idle_files_are_culled_by_another_process(rig, monkeypatch):
    place = Path.cwd()
    cached = rig.cache.directory / "cache/Ierofs,d/@00"
    assert rig.cache.cull("d", "boot")
    # Of the fake kernel a cull takes nothing away: all that is seen is who asks for what.
    monkeypatch.setattr("fscache.cachefiles.cache.cached_file", lambda *args: cached / "Dboot")
    cached.mkdir(parents=True)
    (cached / "Dboot").touch()
    assert rig.cache.cull("d", "boot")
    assert [rig.kernel.command() for _ in range(2)] == [b"inuse Dboot", b"cull Dboot"]
    rig.cache.cull_everywhere("boot")
    assert [rig.kernel.command() for _ in range(2)] == [b"inuse Dboot", b"cull Dboot"]
    assert Path.cwd() == place
    assert (cached / "Dboot").exists()
    for name in ("", "a/b", "../x", "\udcff"):
        with pytest.raises(CachefilesError, match="blob_id cannot be a name"):
            rig.cache.cull_everywhere(name)
