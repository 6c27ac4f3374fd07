"""What the kernel's cachefiles does once something is mounted (spec ondemand 7.2, rows 12 to 40).

What a nydusd has to rely on: another kernel that does otherwise breaks these first.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from cachefiles_rig import (
    BLOB,
    BOOT,
    DATA,
    PAGE,
    Cache,
    Call,
    Server,
    aligned,
    files,
    find,
    mount_now,
    read_file,
    unmount_now,
)

from fscache.cachefiles.names import cached_file
from fscache.cachefiles.protocol import NO_OBJECT, Close, Open, Read, parse_message
from fscache.probe_image import BLOB_SIZE


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def cache(tmp_path, stack):
    """The device, bound to a directory."""
    return Cache(tmp_path, stack).bind()


@pytest.fixture
def served(cache):
    """The image `boot1` of `dom0`, mounted and served by threads."""
    return Served(cache, Server(cache, files("dom0", "boot1", "boot1b")))


class Served:
    def __init__(self, cache, server):
        self.cache = cache
        self.server = server
        self.target = self.mount("boot1")

    def mount(self, fsid, domain="dom0", target=None):
        call = self.cache.mount(fsid, domain, target)
        assert call.result() == 0
        return call.target

    @property
    def file(self):
        return self.target / "data"

    def object(self, name):
        """Return the OPEN of the file that is open now; that of a blob may follow the mount."""
        wait_until(lambda: self._opens(name))
        (found,) = self._opens(name)
        return found

    def _opens(self, name):
        return [
            message
            for message, _ in list(self.server.objects.values())
            if message.cookie_key == name.encode() and message.object_id in self.server.answered
        ]

    def reads(self):
        """Return the READs of the blob, over all its openings."""
        ids = {item.object_id for item in self.server.seen(Open) if item.cookie_key == BLOB}
        return [item for item in self.server.seen(Read) if item.object_id in ids]

    def unmount(self):
        self.cache.unmount(self.target)
        wait_until(lambda: not self.server.objects)


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


def failed_mount(cache, answer):
    """Answer the OPEN of a bootstrap somehow; return what the mount says."""
    call = cache.mount("boot1")
    message = cache.take(Open)
    told = answer(message)
    return told, call.result()


def test_row_12_short_buffers_lose_nothing(cache):
    call = cache.mount("boot1")
    wait_until(cache.readable)
    for length in (0, 1, 15, 16, 40):
        with pytest.raises(OSError, match="too long") as failure:
            os.read(cache.device.fileno(), length)
        assert failure.value.errno == errno.EMSGSIZE
    message = cache.take(Open)
    assert message.cookie_key == b"boot1"
    assert cache.copen(message, -errno.EIO) is None
    assert call.result() in ("EIO", "ENOBUFS")


def test_row_13_open_message(cache):
    call = cache.mount("boot1", "dom0")
    wait_until(cache.readable)
    raw = os.read(cache.device.fileno(), 1024)
    message = parse_message(raw)
    assert (message.volume_key, message.cookie_key) == (b"erofs,dom0", b"boot1")
    # The NUL is counted in the volume key only; flags are 0.
    assert raw[16:32] == b"".join(
        value.to_bytes(4, sys.byteorder) for value in (11, 5, message.fd, 0)
    )
    assert os.readlink(f"/proc/self/fd/{message.fd}") == "anon_inode:[cachefiles]"
    assert os.get_inheritable(message.fd)
    cache.fds.append(message.fd)
    cache.copen(message, -errno.EIO)
    call.result()


def test_row_14_descriptor_before_the_answer(cache):
    call = cache.mount("boot1")
    message = cache.take(Open)
    for operation in (
        lambda: os.pwritev(message.fd, [aligned(BOOT)], 0),
        lambda: os.lseek(message.fd, 0, os.SEEK_DATA),
    ):
        with pytest.raises(OSError, match="buffer space") as failure:
            operation()
        assert failure.value.errno == errno.ENOBUFS
    cache.copen(message, -errno.EIO)
    call.result()


def test_row_15_answers_that_are_nobodys(cache):
    call = cache.mount("boot1")
    message = cache.take(Open)
    assert cache.command(b"copen %d,4096" % (message.msg_id + 7)) == "EINVAL"
    assert cache.copen(message, len(BOOT)) is None
    assert cache.copen(message, len(BOOT)) == "EINVAL"
    read = cache.take(Read)
    assert cache.copen(read, 4096) == "EINVAL"
    cache.cread(read, message.fd)
    cache.drain(message.fd)
    assert call.result() == "EIO"


@pytest.mark.parametrize("answer", [-errno.ENOENT, -errno.EIO])
def test_row_16_refused_bootstrap(cache, answer):
    told, result = failed_mount(cache, lambda message: cache.copen(message, answer))
    assert told is None
    assert result in ("EIO", "ENOBUFS")


@pytest.mark.parametrize(
    ("answer", "expected"), [(-4096, "EINVAL"), ("text", "EINVAL"), (1 << 63, "ERANGE")]
)
def test_row_17_answers_that_are_none(cache, answer, expected):
    told, result = failed_mount(cache, lambda message: cache.copen(message, answer))
    assert told == expected
    assert result in ("EIO", "ENOBUFS", "EINVAL")


def test_row_18_bootstrap_of_size_zero(cache):
    call = cache.mount("boot1")
    message = cache.take(Open)
    assert cache.copen(message, 0) is None
    while not call.ended_within(0.05):
        if cache.readable():
            # A page of zeros is all there could be.
            read = cache.take(Read)
            cache.write(message.fd, read.offset, bytes(PAGE))
            cache.cread(read, message.fd)
    assert call.result() == "EINVAL"


def test_row_19_descriptor_closed_before_the_answer(cache):
    def answer(message):
        cache.drop(message.fd)
        return cache.copen(message, len(BOOT))

    told, result = failed_mount(cache, answer)
    assert told is None
    assert result in ("EIO", "ENOBUFS")


def test_row_20_descriptor_is_for_writing_alone(served):
    fd = served.object("probe").fd
    for operation, code in (
        (lambda: os.pread(fd, PAGE, 0), errno.ESPIPE),
        (lambda: mmap.mmap(fd, PAGE, prot=mmap.PROT_WRITE), errno.EACCES),
        (lambda: os.ftruncate(fd, PAGE), errno.EINVAL),
        (lambda: os.fsync(fd), errno.EINVAL),
        (lambda: fcntl.ioctl(fd, 0x40049802, 0), errno.EINVAL),
    ):
        with pytest.raises(OSError, match=r".") as failure:
            operation()
        assert failure.value.errno == code


def test_row_21_only_whole_pages(cache):
    _, _, blob = cache.mounted()
    assert cache.write(blob.fd, 0, DATA[:PAGE]) is None
    page = aligned(DATA[: 2 * PAGE])
    for offset, view, code in (
        (512, page[:PAGE], errno.ENOBUFS),
        (0, page[3 : 3 + PAGE], errno.EINVAL),
        (0, page[:100], errno.EINVAL),
    ):
        with pytest.raises(OSError, match=r".") as failure:
            os.pwritev(blob.fd, [view], offset)
        assert failure.value.errno == code


def test_row_22_map_of_what_is_there(cache):
    _, _, blob = cache.mounted()
    assert cache.write(blob.fd, 8 * PAGE, DATA[: 4 * PAGE]) is None
    assert os.lseek(blob.fd, 0, os.SEEK_DATA) == 8 * PAGE
    assert os.lseek(blob.fd, 8 * PAGE, os.SEEK_HOLE) == 12 * PAGE
    assert os.lseek(blob.fd, 0, os.SEEK_HOLE) == 0
    assert os.lseek(blob.fd, 0, os.SEEK_END) == BLOB_SIZE
    with pytest.raises(OSError, match=r".") as failure:
        os.lseek(blob.fd, 12 * PAGE, os.SEEK_DATA)
    assert failure.value.errno == errno.ENXIO


def test_row_23_completions_that_are_nobodys(cache):
    target, boot, blob = cache.mounted()
    call = Call(read_file, target / "data", 0)
    read = cache.take(Read)
    assert cache.write(blob.fd, 0, DATA[:PAGE]) is None
    assert cache.cread(read._replace(msg_id=read.msg_id + 9), blob.fd) == "EINVAL"
    assert cache.cread(read, boot.fd) == "EINVAL"
    assert cache.cread(read, blob.fd) is None
    assert cache.cread(read, blob.fd) == "EINVAL"
    assert call.result() == DATA[:PAGE]


def test_row_24_completion_without_data(served):
    served.server.on_read = lambda message, fd, content: served.cache.cread(message, fd)
    assert Call(read_file, served.file, 5 * PAGE).result() == "EIO"
    wait_until(lambda: len(served.reads()) >= 2)
    assert {item.offset for item in served.reads()} == {5 * PAGE}
    assert len(served.reads()) == 2


def test_row_25_first_page_of_two(served):
    def first_page(message, fd, content):
        served.cache.write(fd, message.offset, content[message.offset : message.offset + PAGE])
        served.cache.cread(message, fd)

    served.server.on_read = first_page
    assert Call(read_file, served.file, 0, 2 * PAGE).result() == DATA[: 2 * PAGE]
    assert [(item.offset, item.length) for item in served.reads()] == [
        (0, 2 * PAGE), (PAGE, PAGE),
    ]  # fmt: skip


def test_row_26_tail_alone(served):
    def tail(message, fd, content):
        if message.length > PAGE:
            start = message.offset + PAGE
            served.cache.write(fd, start, content[start : message.offset + message.length])
        served.cache.cread(message, fd)

    served.server.on_read = tail
    assert Call(read_file, served.file, 0, 2 * PAGE).result() == "EIO"


def test_row_27_everything_written_before(served):
    assert served.cache.write(served.object("probe").fd, 0, DATA) is None
    assert Call(read_file, served.file, 0, BLOB_SIZE).result() == DATA
    assert served.reads() == []


def test_row_28_second_mount_of_a_domain(served):
    assert Call(read_file, served.file, 0, BLOB_SIZE).result() == DATA
    before = len(served.reads())
    other = served.mount("boot1b")
    assert Call(read_file, other / "data", 0, BLOB_SIZE).result() == DATA
    assert len(served.reads()) == before
    opens = [item for item in served.server.seen(Open) if item.cookie_key == BLOB]
    assert len(opens) == 1


@pytest.mark.parametrize(("domain", "expected"), [(None, "EBUSY"), ("dom0", "EEXIST")])
def test_row_29_one_name_twice(cache, domain, expected):
    Server(cache, files(domain or "boot1", "boot1"))
    assert cache.mount("boot1", domain).result() == 0
    assert cache.mount("boot1", domain).result() == expected


def test_row_30_unmount(served):
    fd = os.dup(served.object("probe").fd)
    served.cache.fds.append(fd)
    served.unmount()
    with pytest.raises(OSError, match="buffer space"):
        os.pwritev(fd, [aligned(DATA[:PAGE])], 0)
    assert sorted(closed(served)) == [b"boot1", BLOB]
    served.cache.drop(fd)
    # Blobs first as a rule; two works of the kernel may overtake each other.
    while closed(served)[-2:] != [BLOB, b"boot1"]:
        assert len(closed(served)) < 40
        served.mount("boot1", target=served.target)
        served.unmount()


def closed(served):
    """Return the names of the files that were closed so far."""
    names = {item.object_id: item.cookie_key for item in served.server.seen(Open)}
    return [names[item.object_id] for item in served.server.seen(Close)]


def test_row_31_remount_waits_for_close_and_descriptors(cache):
    target, boot, blob = cache.mounted()
    cache.unmount(target)
    again = cache.mount("boot1", "dom0", target)
    assert not again.ended_within(0.5)
    assert {cache.take(Close).object_id for _ in range(2)} == {boot.object_id, blob.object_id}
    assert not again.ended_within(0.5)
    assert not cache.readable()
    cache.drop(boot.fd)
    cache.drop(blob.fd)
    message = cache.take(Open)
    assert message.cookie_key == b"boot1"
    assert message.object_id > blob.object_id
    Server(cache, files("dom0", "boot1")).handle(message)
    assert again.result() == 0


def test_row_32_remount_uses_what_is_there_if_the_size_is_the_same(served):
    assert Call(read_file, served.file, 0, BLOB_SIZE).result() == DATA
    served.unmount()
    before = len(served.server.seen(Read))
    served.mount("boot1", target=served.target)
    assert Call(read_file, served.file, 0, BLOB_SIZE).result() == DATA
    assert len(served.server.seen(Read)) == before
    served.unmount()
    served.server.files = files("dom0", "boot1", data=DATA + DATA[:PAGE])
    before = len(served.reads())
    served.mount("boot1", target=served.target)
    assert Call(read_file, served.file, 0, BLOB_SIZE).result() == DATA
    assert sum(item.length for item in served.reads()[before:]) == BLOB_SIZE


_CULL = """
import errno, os, sys
os.chdir(sys.argv[2])
for word in sys.argv[3:]:
    try:
        os.write(int(sys.argv[1]), word.encode())
        print("0")
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


def cull(cache, directory, *commands):
    words = [sys.executable, "-I", "-S", "-c", _CULL, str(cache.device.fileno()), str(directory)]
    fd = cache.device.fileno()
    done = subprocess.run([*words, *commands], pass_fds=[fd], capture_output=True, check=True)
    return done.stdout.decode().split()


def test_row_33_culling(served):
    Call(read_file, served.file).result()
    served.unmount()
    served.mount("boot1", target=served.target)
    (path,) = find(served.cache.directory, "probe")
    where, name = path.parent, path.name
    assert cull(served.cache, where, f"inuse {name}", f"cull {name}") == ["EBUSY", "EBUSY"]
    served.unmount()
    assert cull(
        served.cache, where, "cull a/b", f"inuse {name}", f"cull {name}", f"cull {name}"
    ) == ["EINVAL", "0", "0", "ENOENT"]
    assert not path.exists()


def test_row_34_many_readers(cache):
    server = Server(cache, files("dom0", "boot1"), threads=4)
    served = Served(cache, server)
    with tempfile.TemporaryFile() as results:
        readers = [subprocess.Popen(["sha256sum", served.file], stdout=results) for _ in range(8)]
        assert [reader.wait(60) for reader in readers] == [0] * 8
        results.seek(0)
        assert len(set(results.read().split(b"\n")) - {b""}) == 1
    calls = [Call(read_file, served.file, n * PAGE, 7 * PAGE) for n in range(0, 256, 8)]
    for number, call in zip(range(0, 256, 8), calls, strict=True):
        assert call.result() == DATA[number * PAGE : (number + 7) * PAGE]
    ids = [item.msg_id for item in server.seen((Open, Read, Close))]
    assert len(set(ids)) == len(ids)


def test_row_35_closed_descriptor_of_a_live_object(cache):
    target, _, blob = cache.mounted()
    cache.drop(blob.fd)
    call = Call(read_file, target / "data", 3 * PAGE)
    again = cache.take(Open)
    assert again.cookie_key == BLOB
    assert again.object_id != blob.object_id
    assert cache.copen(again, BLOB_SIZE) is None
    read = cache.take(Read)
    assert (read.object_id, read.offset) == (again.object_id, 3 * PAGE)
    assert cache.write(again.fd, read.offset, DATA[3 * PAGE : 4 * PAGE]) is None
    assert cache.cread(read, again.fd) is None
    assert call.result() == DATA[3 * PAGE : 4 * PAGE]


# Serves a mount until the first READ of the blob, and is killed with it in hand.
_VICTIM = """
import contextlib, os, sys
from pathlib import Path
from cachefiles_rig import *
cache = Cache(Path(sys.argv[2]), contextlib.ExitStack(), int(sys.argv[1]))
server = Server(cache, files("dom0", "boot1"))
def wait(message, fd, content):
    if content is BOOT:
        server.fill(message, fd, content)
    else:
        print("READ", flush=True)
server.on_read = wait
print("ready", flush=True)
time.sleep(1000)
"""


def test_row_36_killed_within_a_read(cache):
    fd = cache.device.fileno()
    os.set_inheritable(fd, True)
    path = os.pathsep.join(sys.path)
    with subprocess.Popen(
        [sys.executable, "-c", _VICTIM, str(fd), str(cache.top)],
        stdout=subprocess.PIPE,
        pass_fds=[fd],
        env={**os.environ, "PYTHONPATH": path},
    ) as victim:
        assert victim.stdout.readline() == b"ready\n"
        call = cache.mount("boot1", "dom0")
        assert call.result() == 0
        reader = Call(read_file, call.target / "data", 7 * PAGE)
        assert victim.stdout.readline() == b"READ\n"
        victim.kill()
    assert not reader.ended_within(0.3)
    assert cache.command(b"restore") is None
    server = Server(cache, files("dom0", "boot1"))
    assert reader.result() == DATA[7 * PAGE : 8 * PAGE]
    (opened,) = server.seen(Open)
    assert opened.cookie_key == BLOB


def test_row_37_device_closed_for_good(cache, tmp_path, stack):
    target, _, _ = cache.mounted()
    waiting = Call(read_file, target / "data")
    cache.take(Read)
    cache.device.close()
    for fd in cache.fds:
        os.close(fd)
    cache.fds = []
    # The read that waited fails with EIO, and is tried once more, by pages.
    assert waiting.result() in ("EIO", "ENOBUFS")
    assert Call(read_file, target / "data", 9 * PAGE).result() == "ENOBUFS"
    other = Cache(tmp_path, stack).bind()
    assert unmount_now(target) == 0
    server = Server(other, files("dom0", "boot1"))
    assert other.mount("boot1", "dom0", target).result() == 0
    assert Call(read_file, target / "data", 9 * PAGE).result() == DATA[9 * PAGE : 10 * PAGE]
    assert server.seen(Open)


@pytest.mark.parametrize("closed", [False, True])
def test_row_37a_restore_with_an_open_in_hand(cache, closed):
    call = cache.mount("boot1", "dom0")
    message = cache.take(Open)
    if closed:
        cache.drop(message.fd)
    assert cache.command(b"restore") is None
    if not closed:
        with pytest.raises(OSError, match="exists"):
            os.read(cache.device.fileno(), 1024)
        assert call.result() in ("EIO", "ENOBUFS")
        return
    again = cache.take(Open)
    assert again.msg_id == message.msg_id
    assert again.object_id != message.object_id
    Server(cache, files("dom0", "boot1")).handle(again)
    assert call.result() == 0


def test_row_37b_restore_with_a_read_in_hand(cache):
    target, _, blob = cache.mounted()
    call = Call(read_file, target / "data")
    read = cache.take(Read)
    assert cache.command(b"restore") is None
    assert cache.take(Read) == read
    assert cache.write(blob.fd, 0, DATA[:PAGE]) is None
    assert cache.cread(read, blob.fd) is None
    assert cache.cread(read, blob.fd) == "EINVAL"
    assert call.result() == DATA[:PAGE]


def test_row_37c_close_of_what_was_closed(cache):
    target, boot, blob = cache.mounted()
    cache.unmount(target)
    cache.drop(boot.fd)
    cache.drop(blob.fd)
    assert [cache.take(Close).object_id for _ in range(2)] == [NO_OBJECT] * 2


def open_null():
    """Return a descriptor, None when there is none left."""
    try:
        return os.open("/dev/null", os.O_RDONLY)
    except OSError:
        return None


def test_row_37d_no_descriptor_left(cache):
    call = cache.mount("boot1", "dom0")
    wait_until(cache.readable)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
    # What is free below the limit.
    held = list(iter(open_null, None))
    try:
        with pytest.raises(OSError, match="Too many open files") as failure:
            os.read(cache.device.fileno(), 1024)
        assert failure.value.errno == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
    assert call.result() in ("EIO", "ENOBUFS")
    Server(cache, files("dom0", "boot1"))
    assert cache.mount("boot1", "dom0").result() == 0


def test_row_38_reader_killed_while_it_waits(cache):
    target, _, blob = cache.mounted()
    with subprocess.Popen(["cat", target / "data"], stdout=subprocess.DEVNULL) as reader:
        read = cache.take(Read)
        reader.kill()
        assert reader.wait(60) == -signal.SIGKILL
    assert cache.write(blob.fd, read.offset, DATA[: read.length]) is None
    assert cache.cread(read, blob.fd) == "EINVAL"
    assert Call(read_file, target / "data").result() == DATA[:PAGE]


def test_row_39_names_of_cached_files(cache):
    names = [("boot1", "boot1"), ("dom0", "boot1"), ("dom0", "boot1b")]
    server = Server(cache, {**files("boot1", "boot1"), **files("dom0", "boot1", "boot1b")})
    for domain, fsid in names:
        call = cache.mount(fsid, domain if domain != fsid else None)
        assert call.result() == 0
        cache.unmount(call.target)
        wait_until(lambda: not server.objects)
        for name in (fsid, "probe"):
            path = cached_file(cache.directory, domain, name)
            wait_until(path.exists)
            size = os.getxattr(path, "user.CacheFiles.cache")[:8]
            assert int.from_bytes(size) == (len(BOOT) if name == fsid else BLOB_SIZE)


@pytest.mark.kernel("6.12", "6.1")
def test_row_40_kernel_without_the_option(tmp_path, monkeypatch):
    (tmp_path / "mnt").mkdir()
    monkeypatch.chdir(tmp_path)
    assert mount_now(tmp_path / "mnt", "fsid=x") == "ENOENT"


def test_reads_do_not_wait_for_each_other(cache):
    """A check of the rig: several threads may wait in the kernel at once."""
    target, _, blob = cache.mounted()
    calls = [Call(read_file, target / "data", number * 16 * PAGE) for number in range(4)]
    reads = [cache.take(Read) for _ in calls]
    assert threading.active_count() >= len(calls)
    for read in reads:
        cache.write(blob.fd, read.offset, DATA[read.offset : read.offset + read.length])
        assert cache.cread(read, blob.fd) is None
    assert [call.result() for call in calls] == [
        DATA[number * 16 * PAGE :][:PAGE] for number in range(4)
    ]
