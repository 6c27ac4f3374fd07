"""Lazy means lazy: what a mount fetches is what its readers need, each chunk once.

Counted where the bytes leave: by the ranges that a real HTTP server was asked for.
"""

import contextlib
import hashlib
import json
import os
import random
import re
from pathlib import Path

import pytest
from capabilities import requires
from fakes.blob_server import BlobServer
from serving import build_image, http, wait_until
from treecompare import differences, read_tree

from erofs import open_bootstrap
from fscache.image import ImageOptions
from fscache.mounts.mount import MountError

pytestmark = [
    pytest.mark.root,
    pytest.mark.fanotify,
    pytest.mark.erofs_mount,
    requires("root", "erofs_mount", "fanotify"),
]

CHUNK = 1 << 20
BIG = 64
READERS = 16
PAGE = 4096

# Waits for a line, then hashes ranges of a file in the order given.
_READ_RANGES = """
import hashlib, json, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print("ready", flush=True)
sys.stdin.readline()
for offset, length in json.loads(sys.argv[2]):
    print(hashlib.sha256(os.pread(fd, length, offset)).hexdigest())
"""
_DROP_AND_READ = """
import os, sys
for name in sys.argv[1:]:
    fd = os.open(name, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    while os.read(fd, 1 << 20):
        pass
"""
_MAP = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as pages:
    sys.stdout.buffer.write(pages[int(sys.argv[2]) : int(sys.argv[2]) + 4096])
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    top = tmp_path_factory.mktemp("lazy") / "source"
    top.mkdir()
    rng = random.Random(64)
    # Half random, so that compressed and uncompressed sizes differ.
    half = b"half of each chunk compresses well " * (CHUNK // 70)
    with (top / "big").open("wb") as file:
        for _ in range(BIG):
            file.write(rng.randbytes(CHUNK - len(half)) + half)
    (top / "medium").write_bytes(rng.randbytes(5 * CHUNK + 12345))
    for number in range(50):
        directory = top / f"directory {number}"
        directory.mkdir()
        (directory / "small").write_bytes(rng.randbytes(1000 + number))
        (directory / "link").symlink_to("small")
        os.setxattr(directory, "user.x", b"in the bootstrap")
    return top


@pytest.fixture(scope="module")
def image(source, tmp_path_factory):
    return build_image(source, tmp_path_factory.mktemp("lazy") / "image")


@pytest.fixture
def server(image, stack):
    server = BlobServer(image.blobs())
    stack.callback(server.stop)
    return server


def stored_chunks(image, name):
    """Return (offset, end) in the stored blob of each chunk of a file, in file order."""
    with open_bootstrap(image.bootstrap) as bootstrap:
        inode = bootstrap.lookup(name)
        return [
            (info.compressed_offset, info.compressed_offset + info.compressed_size)
            for info in bootstrap.file_chunks(inode)
        ]


def asked_ranges(server):
    """Return (offset, end) of every request, in order of offset."""
    found = [re.fullmatch(r"bytes=(\d+)-(\d+)", header) for _, header in server.ranges]
    return sorted((int(match[1]), int(match[2]) + 1) for match in found)


def joined(ranges):
    """Join ranges that touch; assert that no two overlap: no byte is asked for twice."""
    result = []
    for start, end in sorted(ranges):
        if result and start < result[-1][1]:
            raise AssertionError(f"bytes {start} to {result[-1][1]} were fetched twice")
        if result and start == result[-1][1]:
            result[-1] = (result[-1][0], end)
        else:
            result.append((start, end))
    return result


def test_mounting_and_walking_fetch_nothing(serving, server, image, source):
    daemon = serving.start(image, http(server))
    got = serving.snapshot(daemon.mountpoint, content=False)
    expected = read_tree(source, content=False)
    links = {name: entry.content for name, entry in got.items()}
    assert links == dict.fromkeys(expected, "")
    expected[b"/"] = expected[b"/"]._replace(mtime_ns=0)
    assert differences(expected, got) == []
    assert serving.child(
        "import os, sys; print(os.readlink(sys.argv[1]))", daemon.mountpoint / "directory 7/link"
    ).finish() == (b"small\n")
    assert (server.ranges, server.connections) == ([], 0)
    daemon.stop()
    assert (server.ranges, server.connections) == ([], 0)


@pytest.mark.parametrize("how", ["read", "mmap"])
def test_one_page_of_a_big_file_is_one_chunk(serving, server, image, source, how):
    mountpoint = serving.start(image, http(server)).mountpoint
    offset = 31 * CHUNK + CHUNK // 2
    if how == "read":
        got = serving.read(mountpoint / "big", offset, PAGE)
    else:
        got = serving.child(_MAP, mountpoint / "big", offset).finish()
    with (source / "big").open("rb") as file:
        assert got == os.pread(file.fileno(), PAGE, offset)
    chunk = stored_chunks(image, b"/big")[31]
    assert chunk[1] - chunk[0] < CHUNK
    assert asked_ranges(server) == [chunk]
    # Again, and another page of the same chunk: it is there.
    serving.read(mountpoint / "big", offset, PAGE)
    serving.read(mountpoint / "big", offset - CHUNK // 4, PAGE)
    assert asked_ranges(server) == [chunk]
    wait_until(lambda: sum(server.bytes_sent.values()) == chunk[1] - chunk[0])


def test_sequential_reading_fetches_exactly_the_file(serving, server, image, source):
    mountpoint = serving.start(image, http(server), amplify=0).mountpoint
    assert serving.read(mountpoint / "medium") == (source / "medium").read_bytes()
    chunks = stored_chunks(image, b"/medium")
    assert len(chunks) == 6
    assert joined(asked_ranges(server)) == joined(chunks)
    assert len(server.ranges) <= len(chunks)


def test_second_mount_with_the_same_cache_fetches_nothing(serving, server, image, source):
    daemon = serving.start(image, http(server), amplify=0)
    serving.read(daemon.mountpoint / "medium")
    daemon.stop()
    asked = list(server.ranges)
    assert asked
    mountpoint = serving.start(image, http(server), amplify=0).mountpoint
    assert serving.read(mountpoint / "medium") == (source / "medium").read_bytes()
    assert server.ranges == asked
    # What the first did not read is fetched now, and only that.
    serving.read(mountpoint / "directory 3/small")
    assert len(server.ranges) == len(asked) + 1
    assert joined(asked_ranges(server))


def _patterns():
    """Return what each reader reads: the same, overlapping, and in any order."""
    rng = random.Random(16)
    everything = [(number * CHUNK, CHUNK) for number in range(BIG)]
    shuffled = [
        (rng.randrange(BIG * CHUNK // PAGE) * PAGE, rng.choice((PAGE, 100_000, 3 * CHUNK)))
        for _ in range(40)
    ]
    across = [(CHUNK // 2 + number * 2 * CHUNK, 2 * CHUNK) for number in range(BIG // 2)]
    kinds = [everything, list(reversed(everything)), shuffled, across]
    return [kinds[number % len(kinds)] for number in range(READERS)]


def test_no_byte_is_fetched_twice_with_16_readers(serving, server, image, source):
    mountpoint = serving.start(image, http(server)).mountpoint
    patterns = _patterns()
    readers = [
        serving.child(_READ_RANGES, mountpoint / "big", json.dumps(ranges)) for ranges in patterns
    ]
    for reader in readers:
        assert reader.line() == b"ready"
    assert server.ranges == []
    for reader in readers:
        reader.go()
    with (source / "big").open("rb") as file:
        for reader, ranges in zip(readers, patterns, strict=True):
            expected = [
                hashlib.sha256(os.pread(file.fileno(), length, offset)).hexdigest()
                for offset, length in ranges
            ]
            assert reader.finish().decode().split() == expected
    assert joined(asked_ranges(server)) == joined(stored_chunks(image, b"/big"))
    assert len(server.ranges) <= BIG


def is_ignored(serving, image):
    """Return whether this process has a mark that ignores events of the image's data file."""
    (blob_id,) = image.blobs()
    inode = (serving.directory / "cache" / f"{blob_id}.blob.data").stat().st_ino
    mark = re.compile(f"^fanotify ino:{inode:x} .*ignored_mask:100000", re.MULTILINE)
    for path in Path("/proc/self/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if mark.search(path.read_text()):
                return True
    return False


def test_complete_blob_raises_no_more_events(serving, server, image, source):
    daemon = serving.start(image, http(server))
    top = daemon.mountpoint
    tree = serving.snapshot(top)
    assert differences(tree, read_tree(source), ignore=frozenset({"mtime_ns"})) == []
    wait_until(lambda: is_ignored(serving, image))
    assert daemon.served.cache_metrics.as_dict()["data_all_ready"] is True
    before = daemon.served.cache_metrics.as_dict()["total"]
    asked = len(server.ranges)
    serving.child(_DROP_AND_READ, top / "big", top / "medium").finish()
    assert daemon.served.cache_metrics.as_dict()["total"] == before
    assert len(server.ranges) == asked


def test_incomplete_blob_raises_events_for_what_was_dropped(serving, server, image):
    """The counterpart: the counters of the test above would tell."""
    daemon = serving.start(image, http(server))
    serving.read(daemon.mountpoint / "medium")
    assert not is_ignored(serving, image)
    before = daemon.served.cache_metrics.as_dict()["total"]
    asked = list(server.ranges)
    serving.child(_DROP_AND_READ, daemon.mountpoint / "medium").finish()
    assert daemon.served.cache_metrics.as_dict()["total"] > before
    assert server.ranges == asked


def test_stop_right_after_the_last_chunk_is_silent(serving, server, image, caplog):
    """The blob becomes durable when its channel has closed already."""
    daemon = serving.start(image, http(server))
    serving.snapshot(daemon.mountpoint)
    served = daemon.served
    daemon.stop()
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
    assert served.cache_metrics.digest_failures == 0
    asked = len(server.ranges)
    assert serving.snapshot(serving.start(image, http(server)).mountpoint)
    assert len(server.ranges) == asked


def test_row_17_sparse_bootstrap_is_refused(serving, tmp_path, image):
    """Its hole would be read as metadata."""
    content = image.bootstrap.read_bytes()
    sparse = tmp_path / "sparse.boot"
    with sparse.open("wb") as file:
        file.write(content)
        file.truncate(len(content) + (1 << 20))
    with pytest.raises(MountError, match=r"offset 0x[0-9a-f]*: bootstrap has a hole"):
        serving.start(image._replace(bootstrap=sparse))


def test_row_17_marked_bootstrap_is_refused(serving, image):
    daemon = serving.start(image)
    (marked,) = (serving.directory / "cache").glob("serve-*/")
    inside = marked / "image.boot"
    # Moved into it: a file that is written there would wait for this very process.
    (serving.directory / "copy").write_bytes(image.bootstrap.read_bytes())
    (serving.directory / "copy").rename(inside)
    with pytest.raises(MountError, match="marked directory"):
        daemon.runtime.mount(
            daemon.served.config, inside, serving.mountpoint("other"), ImageOptions()
        )
    inside.unlink()
