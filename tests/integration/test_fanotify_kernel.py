"""The fanotify channel against the real kernel; `row N` is a row of ondemand 7.3."""

import errno
import fcntl
import gc
import os
import queue
import resource
import select
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest
from capabilities import need_tool, requires
from leftovers import no_erofs_left, no_open_file_left, open_files

from fscache import kernel
from fscache import probe as probe_module
from fscache.channel import ChannelError
from fscache.channel.fanotify import FanotifyChannel, open_group
from fscache.mounts.loop import LoopDevice
from fscache.mounts.mount import MountBusy
from fscache.probe import lazy_supported, probe
from fscache.probe_image import BLOB_SIZE
from fscache.protocol import parse_events
from fscache.store import ServeDirectory, take_stale

pytestmark = [pytest.mark.root, pytest.mark.fanotify, requires("fanotify")]

TIMEOUT = 60
HASH_TREE = """
import hashlib, os, sys
for top, directories, files in os.walk(sys.argv[1]):
    directories.sort()
    for name in sorted(files):
        path = os.path.join(top, name)
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        print(os.path.relpath(path, sys.argv[1]), digest)
"""


@pytest.fixture
def raw(rig, stack):
    """A bare group over the serve directory, driven by the test itself."""
    rig.start()
    rig.channel.close()
    group = open_group()
    stack.callback(os.close, group)
    mask = kernel.FAN_PRE_ACCESS | kernel.FAN_EVENT_ON_CHILD
    kernel.fanotify_mark(group, kernel.FAN_MARK_ADD, mask, rig.serve.directory)
    return group


def read_group(group, length=4096):
    assert select.select([group], [], [], TIMEOUT)[0], "no event"
    return os.read(group, length)


def answer(group, fd, response):
    return os.write(group, struct.pack("=iI", fd, response))


def test_row_1_only_pre_content_class_can_mark(tmp_path, stack):
    file = tmp_path / "file"
    file.touch()
    for group_class in (0x0, 0x4):
        group = kernel.fanotify_init(group_class, os.O_RDWR)
        stack.callback(os.close, group)
        with pytest.raises(OSError) as caught:
            kernel.fanotify_mark(group, kernel.FAN_MARK_ADD, kernel.FAN_PRE_ACCESS, file)
        assert caught.value.errno == errno.EINVAL
        assert caught.value.filename == str(file)
    report_fid = 0x200
    with pytest.raises(OSError) as caught:
        kernel.fanotify_init(kernel.FAN_CLASS_PRE_CONTENT | report_fid, os.O_RDWR)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("filesystem", ["tmpfs", "overlayfs"])
def test_row_1_stacked_and_memory_file_systems_are_refused(filesystem, request):
    store = request.getfixturevalue(filesystem) / "store"
    store.mkdir(mode=0o700)
    refused = pytest.raises(ChannelError, match="use ext4, xfs or btrfs")
    with no_open_file_left(), refused as caught:
        FanotifyChannel(store, lambda request, reply: reply.allow())
    assert caught.value.errno == errno.EOPNOTSUPP


def test_store_that_others_can_read_is_refused(tmp_path):
    tmp_path.chmod(0o755)
    with pytest.raises(ChannelError, match="0o755"):
        FanotifyChannel(tmp_path, lambda request, reply: reply.allow())


@pytest.mark.parametrize("directio", [False, True])
def test_row_2_whole_tree_is_identical_and_every_hole_asked(rig, tmp_path, directio):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    for number, size in enumerate((1, 4096, 65536, 200_001, 1_500_000)):
        (source / "deep" / f"f{number}").write_bytes(os.urandom(size))
    image, blob = tmp_path / "tree", tmp_path / "blob"
    command = [need_tool("mkfs.erofs"), "--quiet", "-Enoinline_data", "--chunksize=65536"]
    subprocess.run([*command, f"--blobdev={blob}", image, source], check=True, timeout=TIMEOUT)
    rig.use_tree(image, blob)
    rig.start()
    mount = rig.mount(directio=directio)
    assert rig.run(HASH_TREE, mount.mountpoint) == rig.run(HASH_TREE, source)
    asked = set()
    for request in rig.requests:
        asked.update(range(request.offset // 4096, (request.offset + request.length) // 4096))
    assert asked >= set(range(len(rig.truth) // 4096))


def test_row_3_mark_after_mount_gives_zeros_without_event(rig):
    rig.start()
    rig.channel.close()
    mount = rig.mount()
    with FanotifyChannel(rig.serve.directory, rig.handle):
        assert rig.read(mount, 0) == bytes(4096)
    assert rig.requests == []


def test_row_4_files_that_come_after_the_mark_raise_events(rig):
    rig.start()
    staged = rig.directory / "staged"
    os.link(rig.data, staged)
    staged.rename(rig.serve.path("renamed"))
    mount = rig.mount(rig.serve.path("renamed"))
    assert rig.read(mount, 8192) == rig.truth[8192:12288]
    assert rig.requests


def test_row_5_hard_link_outside_raises_no_events(rig):
    rig.start()
    mount = rig.mount(rig.data)
    assert rig.read(mount, 0) == bytes(4096)
    assert rig.requests == []


READERS = {
    "mmap": "data = mmap.mmap(fd, 0, prot=mmap.PROT_READ)[off:off + 4096]",
    "readahead": "os.posix_fadvise(fd, off, 4096, os.POSIX_FADV_WILLNEED);"
    " data = os.pread(fd, 4096, off)",
    "sendfile": "out = os.memfd_create('out');"
    " os.sendfile(out, fd, off, 4096); data = os.pread(out, 4096, 0)",
}


@pytest.mark.parametrize("directio", [False, True])
@pytest.mark.parametrize("way", READERS)
def test_row_6_ways_of_reading(rig, way, directio):
    rig.start()
    mount = rig.mount(directio=directio)
    code = f"""
import mmap, os, sys
fd, off = os.open(sys.argv[1], os.O_RDONLY), 65536
{READERS[way]}
sys.stdout.buffer.write(data)
"""
    assert rig.run(code, mount.mountpoint / "data") == rig.truth[65536 : 65536 + 4096]
    assert any(r.offset <= 65536 < r.offset + r.length for r in rig.requests)


def test_row_6_exec(rig, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    program = Path("/bin/true").resolve()
    (source / "true").write_bytes(program.read_bytes())
    (source / "true").chmod(0o755)
    image, blob = tmp_path / "tree", tmp_path / "blob"
    command = [need_tool("mkfs.erofs"), "--quiet", "--chunksize=65536", f"--blobdev={blob}"]
    subprocess.run([*command, image, source], check=True, timeout=TIMEOUT)
    rig.use_tree(image, blob)
    rig.start()
    mount = rig.mount()
    # By a shell: Python stands still in `vfork` until its own child has executed, and would
    # wait for itself to serve that.
    command = ["/bin/sh", "-c", 'exec "$0"', mount.mountpoint / "true"]
    assert subprocess.run(command, timeout=TIMEOUT).returncode == 0
    assert rig.requests


def test_row_7_first_denial_is_invisible_the_second_is_eio(rig):
    rig.start()
    mount = rig.mount()

    def deny_first(request, reply):
        if len(rig.requests) == 1:
            reply.deny("first")
        else:
            rig.fill(request, reply)

    rig.on_request = deny_first
    assert rig.read(mount, 0) == rig.truth[:4096]
    assert len(rig.requests) >= 2
    rig.on_request = lambda request, reply: reply.deny("always")
    assert rig.read(mount, BLOB_SIZE // 2) == b"EIO"
    rig.on_request = rig.fill
    assert rig.read(mount, BLOB_SIZE // 2) == rig.truth[BLOB_SIZE // 2 :][:4096]


@pytest.mark.parametrize("failure", ["raise", "raise ours", "drop"])
def test_handler_that_fails_or_drops_the_reply_denies(rig, failure, caplog):
    rig.start()
    mount = rig.mount()

    def fail(request, reply):
        if failure == "raise":
            raise KeyError("broken handler")
        if failure == "raise ours":
            raise ChannelError("broken handler")

    rig.on_request = fail
    assert rig.read(mount, 0) == b"EIO"
    rig.on_request = rig.fill
    assert rig.read(mount, 0) == rig.truth[:4096]
    assert ("dropped" if failure == "drop" else "broken handler") in caplog.text


def test_row_8_wrong_answers(rig, raw):
    mount = rig.mount()
    child = rig.child(
        "import os, sys; os.pread(os.open(sys.argv[1], os.O_RDONLY), 4096, 0)",
        mount.mountpoint / "data",
    )
    (event,) = parse_events(read_group(raw))
    with pytest.raises(OSError) as caught:
        answer(raw, event.fd, 2 | errno.ENOENT << 24)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(FileNotFoundError):
        answer(raw, 9999, 1)
    assert answer(raw, event.fd, 1) == 8
    with pytest.raises(FileNotFoundError):
        answer(raw, event.fd, 1)
    os.close(event.fd)
    child.finish()


def test_row_9_short_buffer_and_batch(rig, raw):
    mount = rig.mount()
    code = """
import os, sys, threading
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
threads = [threading.Thread(target=os.pread, args=(fd, 4096, n * 65536)) for n in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
"""
    child = rig.child(code, mount.mountpoint / "data")
    assert select.select([raw], [], [], TIMEOUT)[0]
    with pytest.raises(OSError) as caught:
        os.read(raw, 47)
    assert caught.value.errno == errno.EINVAL
    held, batches = [], []
    # The readers wait for answers, so all four events gather.
    while len(held) < 4:
        batches.append(parse_events(read_group(raw)))
        held += batches[-1]
    assert sorted(event.offset for event in held) == [0, 65536, 131072, 196608]
    assert {event.pid for event in held} == {child.process.pid}
    for event in held:
        answer(raw, event.fd, 1)
        os.close(event.fd)
    child.finish()


def test_row_9_several_events_in_one_read(rig, raw):
    mount = rig.mount()
    code = "import os, sys; os.pread(os.open(sys.argv[1], os.O_RDONLY), 4096, int(sys.argv[2]))"
    children = [rig.child(code, mount.mountpoint / "data", n * 262144) for n in range(3)]
    # FIONREAD tells how many bytes wait: read only when all three are there.
    deadline = time.monotonic() + TIMEOUT
    while struct.unpack("i", fcntl.ioctl(raw, 0x541B, bytes(4)))[0] < 3 * 24:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    events = parse_events(os.read(raw, 4096))
    assert len(events) == 3
    for event in events:
        answer(raw, event.fd, 1)
        os.close(event.fd)
    for child in children:
        child.finish()


TWO_READS = """
import errno, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
for _ in range(2):
    sys.stdin.readline()
    try:
        print(os.pread(fd, 4, 0).decode(), flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
"""


def test_row_10_descriptor_exhaustion_denies_and_is_survived(rig, caplog):
    rig.start()
    mount = rig.mount()
    child = rig.child(TWO_READS, mount.mountpoint / "data")
    # Nothing that earlier tests left to be collected makes room while there has to be none.
    gc.collect()
    lowest = os.dup(0)
    os.close(lowest)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        child.process.stdin.write(b"\n")
        child.process.stdin.flush()
        assert child.process.stdout.readline() == b"EIO\n"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert rig.requests == []
    assert "could not be read" in caplog.text
    child.process.stdin.write(b"\n")
    child.process.stdin.flush()
    assert child.process.stdout.readline() == rig.truth[:4] + b"\n"


def test_row_14_ignored_file_raises_no_events_until_unignored(rig):
    rig.start()
    mount = rig.mount()
    os.pwrite(rig.writer, rig.truth[:65536], 0)
    rig.channel.ignore(rig.writer)
    assert rig.read(mount, 0) == rig.truth[:4096]
    assert rig.requests == []
    rig.channel.unignore(rig.writer)
    assert rig.read(mount, BLOB_SIZE // 2) == rig.truth[BLOB_SIZE // 2 :][:4096]
    assert rig.requests


def test_two_daemons_share_a_data_file_but_no_events(rig, other_rig):
    rig.start()
    other_rig.start()
    mount, other = rig.mount(), other_rig.mount()
    assert rig.read(mount, 0) == rig.truth[:4096]
    assert rig.requests
    assert other_rig.requests == []
    rig.requests.clear()
    rig.channel.ignore(rig.writer)
    assert other_rig.read(other, BLOB_SIZE // 2) == rig.truth[BLOB_SIZE // 2 :][:4096]
    assert other_rig.requests
    assert rig.requests == []


def test_row_15_writers_through_the_unmarked_name_raise_no_events(rig):
    rig.start()
    mount = rig.mount()
    held = queue.Queue()
    rig.on_request = lambda request, reply: held.put((request, reply))
    child = rig.child(
        "import os, sys; fd = os.open(sys.argv[1], os.O_RDONLY);"
        "sys.stdout.buffer.write(os.pread(fd, 4096, 0))",
        mount.mountpoint / "data",
    )
    request, reply = held.get(timeout=TIMEOUT)
    # In a child: if one of these raised an event, it would wait for ever.
    code = f"""
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
os.pwrite(fd, b"#" * 4096, {BLOB_SIZE // 2})
os.pread(fd, 4096, {BLOB_SIZE // 4})
os.ftruncate(fd, {BLOB_SIZE})
os.posix_fallocate(fd, 0, 4096)
os.fdatasync(fd)
"""
    rig.run(code, rig.data)
    os.pwrite(rig.writer, rig.truth[:4096], 0)
    assert rig.requests == [request]
    rig.fill(request, reply)
    assert child.finish() == rig.truth[:4096]


def test_row_16_killed_reader_leaves_nothing(rig):
    rig.start()
    mount = rig.mount()
    held = queue.Queue()
    rig.on_request = lambda request, reply: held.put(reply)
    child = rig.child(
        "import os, sys; os.pread(os.open(sys.argv[1], os.O_RDONLY), 4096, 0)",
        mount.mountpoint / "data",
    )
    reply = held.get(timeout=TIMEOUT)
    during = open_files()
    child.process.kill()
    child.process.wait(TIMEOUT)
    assert reply.allow()
    assert not reply.deny("twice")
    # The event's descriptor, which is held no longer.
    assert open_files() < during
    rig.on_request = rig.fill
    assert rig.read(mount, 65536) == rig.truth[65536 : 65536 + 4096]


@requires("loop")
def test_row_18_loop_device_over_a_store_file_raises_no_events(rig):
    rig.start()
    with LoopDevice.attach(rig.link) as device:
        assert device.path.read_bytes()[:4096] == bytes(4096)
    assert rig.requests == []


def test_blob_beyond_2_gib_can_be_asked_for(rig):
    rig.make_data()
    os.ftruncate(rig.writer, 5 << 30)
    rig.start()
    mount = rig.mount()
    assert rig.read(mount, 0) == rig.truth[:4096]
    assert rig.requests


def test_long_paths_keep_the_marked_parent(rig, tmp_path):
    directory = tmp_path / ("d" * 150) / ("e" * 150)
    directory.mkdir(parents=True)
    rig.directory = directory
    rig.start()
    assert len(str(rig.link)) > 255
    mount = rig.mount()
    assert rig.read(mount, 0) == rig.truth[:4096]
    assert rig.requests


def test_parallel_readers_through_a_pool(rig):
    rig.start()
    mount = rig.mount()
    threads = []

    def in_pool(request, reply):
        thread = threading.Thread(target=rig.fill, args=(request, reply))
        threads.append(thread)
        thread.start()

    rig.on_request = in_pool
    code = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"
    children = [rig.child(code, mount.mountpoint / "data") for _ in range(4)]
    assert [child.finish() == rig.truth for child in children] == [True] * 4
    for thread in threads:
        thread.join(TIMEOUT)


def test_close_denies_what_is_unanswered(rig):
    rig.start()
    mount = rig.mount()
    held = queue.Queue()
    rig.on_request = lambda request, reply: held.put(reply)
    child = rig.child(
        "import errno, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)\n"
        "try: os.pread(fd, 4096, 0)\n"
        "except OSError as error: print(errno.errorcode[error.errno])",
        mount.mountpoint / "data",
    )
    first = held.get(timeout=TIMEOUT)
    first.deny("read-ahead")
    second = held.get(timeout=TIMEOUT)
    rig.channel.close()
    assert child.finish() == b"EIO\n"
    assert not second.allow()


def test_lazy_unmount_keeps_events_until_the_last_user_is_gone(rig):
    rig.start()
    mount = rig.mount()
    child = rig.child(TWO_READS, mount.mountpoint / "data")
    child.process.stdin.write(b"\n")
    child.process.stdin.flush()
    child.process.stdout.readline()
    with pytest.raises(MountBusy):
        mount.unmount()
    mount.detach()
    assert not mount.is_attached()
    assert not mount.is_gone()
    mount.unmount()
    child.process.stdin.write(b"\n")
    child.process.stdin.flush()
    child.finish()
    assert mount.is_gone()


def test_self_test_passes_and_leaves_nothing(tmp_path):
    with no_erofs_left(), no_open_file_left():
        findings = probe(tmp_path)
    assert [finding.name for finding in findings] == [
        "erofs",
        "privilege",
        "file-backed",
        "fanotify",
        "self-test",
    ]
    assert lazy_supported(findings).ok, findings
    assert list(tmp_path.iterdir()) == []


def test_row_3_self_test_notices_a_mark_that_does_not_work(tmp_path, monkeypatch):
    monkeypatch.setattr(ServeDirectory, "link", lambda self, blob_id, data_file: data_file)
    finding = probe_module._find("self-test", probe_module._self_test, tmp_path)
    assert not finding.ok
    assert "raised no event" in finding.detail
    assert list(tmp_path.iterdir()) == []


def test_self_test_ends_when_nobody_answers(tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(probe_module, "_TIMEOUT_SECONDS", 2.0)
    monkeypatch.setattr(
        probe_module._Filler, "__call__", lambda self, request, reply: held.append(reply)
    )
    finding = probe_module._find("self-test", probe_module._self_test, tmp_path)
    assert not finding.ok
    assert "did not end" in finding.detail
    assert held
    assert list(tmp_path.iterdir()) == []


def test_self_test_notices_wrong_data(tmp_path, monkeypatch):
    def allow_without_filling(self, request, reply):
        self.requests.append(request)
        reply.allow()

    monkeypatch.setattr(probe_module._Filler, "__call__", allow_without_filling)
    finding = probe_module._find("self-test", probe_module._self_test, tmp_path)
    assert not finding.ok
    assert "not the data" in finding.detail


@pytest.mark.parametrize("filesystem", ["tmpfs", "overlayfs"])
def test_probe_names_the_file_system_that_cannot(filesystem, request):
    findings = probe(request.getfixturevalue(filesystem))
    by_name = {finding.name: finding for finding in findings}
    assert not by_name["file-backed"].ok
    assert "takes no pre-content marks: use ext4" in by_name["fanotify"].detail
    assert not lazy_supported(findings).ok


def test_stale_serve_directory_of_a_killed_daemon_goes(rig):
    code = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from fscache.store import ServeDirectory
serve = ServeDirectory.create(Path(sys.argv[1]))
serve.link("b", Path(sys.argv[1]) / "data")
print(serve.directory, flush=True)
time.sleep(600)
"""
    data = rig.directory / "data"
    data.touch()
    root = Path(__file__).parents[2]
    child = rig.child(code, rig.directory, root)
    directory = Path(os.fsdecode(child.process.stdout.readline().strip()))
    assert take_stale(rig.directory) == []
    assert directory.exists()
    child.process.kill()
    child.process.wait(TIMEOUT)
    assert take_stale(rig.directory) == []
    assert not directory.exists()
    assert data.exists()
