"""An image as files: names, attributes and content, from data files that fill on demand."""

import errno
import os
import random
import stat

import pytest
from fakes.built import built, member, tar_of
from fakes.image_files import OpenImage

from erofs import CorruptStructure, open_bootstrap
from erofs.layout import ChunkIndex
from fscache.backend import NotFound

CHUNK = 0x1000
RANDOM = random.Random(4)
SHARED = RANDOM.randbytes(CHUNK)
BIG = RANDOM.randbytes(3 * CHUNK) + SHARED + RANDOM.randbytes(CHUNK) + SHARED + b"end"
NANOSECONDS = 1_700_000_001_123_456_789
MEMBERS = [
    member("d", "dir", mode=0o1755, uid=7, gid=70000),
    member("d/shared", data=SHARED, mode=0o4755),
    member("d/big", data=BIG, mtime=NANOSECONDS / 10**9, uid=1 << 20),
    member("d/again", "link", linkname="d/big"),
    member("d/name\udcff", data=b"one"),
    member("empty"),
    member("soft", "symlink", linkname="/any\udcfe/where"),
    member("char", "char", devmajor=300, devminor=70_000),
    member("fifo", "fifo"),
    member("old", data=b"x", mtime=-5),
    member("noted", data=b"y", xattrs={"user.note": "text", "trusted.t": "secret"}),
]


@pytest.fixture(scope="module")
def bootstrap(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return built(folder, tar_of(*MEMBERS))


@pytest.fixture
def image(bootstrap, tmp_path):
    image = OpenImage(bootstrap, bootstrap.parent, tmp_path)
    yield image
    image.close()


def test_names(image):
    files = image.files
    assert files.find(b"/") == files.root == files.find(b"")
    names = [name for name, _ in files.directory(files.root).order]
    expected = sorted([b".", b"..", b"d", b"empty", b"soft", b"char", b"fifo", b"old", b"noted"])
    assert names == expected
    assert dict(files.directory(files.root).order)[b".."] == files.root
    d = files.find(b"/d")
    assert files.directory(d).numbers[b"name\xff"] == files.find(b"/d/name\xff")
    assert dict(files.directory(d).order)[b".."] == files.root
    assert files.find(b"//d///big") == files.find(b"/d/again")


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (b"/nothing", errno.ENOENT),
        (b"/d/nothing", errno.ENOENT),
        (b"/d/.", errno.ENOENT),
        (b"/empty/x", errno.ENOTDIR),
        (b"/soft/x", errno.ENOTDIR),
    ],
)
def test_names_that_are_not_there(image, path, code):
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        image.files.find(path)
    assert caught.value.errno == code


def test_attributes(image):
    def of(path):
        return image.files.attributes(image.files.find(path))

    big = of(b"/d/big")
    assert big == of(b"/d/again")
    assert big["st_ino"] == image.files.find(b"/d/big")
    assert (big["st_nlink"], big["st_size"], big["st_uid"]) == (2, len(BIG), 1 << 20)
    # Whole blocks, as the kernel's EROFS counts them.
    assert (big["st_blksize"], big["st_blocks"]) == (4096, 7 * 8)
    assert abs(big["st_mtime"] - NANOSECONDS) < 1000
    assert big["st_atime"] == big["st_ctime"] == big["st_mtime"]
    assert of(b"/d/shared")["st_mode"] == stat.S_IFREG | 0o4755
    assert of(b"/d")["st_mode"] == stat.S_IFDIR | 0o1755
    assert (of(b"/d")["st_uid"], of(b"/d")["st_gid"]) == (7, 70000)
    assert (of(b"/empty")["st_size"], of(b"/empty")["st_blocks"]) == (0, 0)
    assert of(b"/char")["st_rdev"] == os.makedev(300, 70_000)
    assert stat.S_ISCHR(of(b"/char")["st_mode"])
    assert stat.S_ISFIFO(of(b"/fifo")["st_mode"])
    assert of(b"/old")["st_mtime"] == -5 * 10**9


def test_links_and_xattrs(image):
    files = image.files
    assert files.readlink(files.find(b"/soft")) == b"/any\xfe/where"
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        files.readlink(files.find(b"/empty"))
    noted = {b"user.note": b"text", b"trusted.t": b"secret"}
    assert files.xattrs(files.find(b"/noted")) == noted
    assert files.xattrs(files.find(b"/empty")) == {}


def test_space(image, bootstrap):
    space = image.files.space()
    with open_bootstrap(bootstrap) as opened:
        assert space["f_files"] == opened.inode_count
    data = sum(blob.cache.size for blob in image.blobs)
    assert space["f_blocks"] * space["f_frsize"] > data
    assert space["f_namemax"] == 255


def test_every_range(image):
    number = image.files.find(b"/d/big")
    assert not image.blobs[0].chunks.ready_count
    edges = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 4 * CHUNK + 7, len(BIG) - 1, len(BIG)]
    ranges = [(start, end - start) for start in edges for end in edges if end >= start]
    RANDOM.shuffle(ranges)
    for offset, length in ranges:
        assert image.files.read(number, offset, length) == BIG[offset : offset + length]
    # Behind the end there is nothing, and nobody is asked.
    for offset, length in ((len(BIG), 1), (len(BIG) + CHUNK, 1 << 20), (1 << 62, 5)):
        assert image.files.read(number, offset, length) == b""
    assert image.files.read(number, len(BIG) - 3, 1 << 20) == b"end"
    assert image.files.read(image.files.find(b"/empty"), 0, 100) == b""


def test_only_what_is_read_is_fetched(image):
    number = image.files.find(b"/d/big")
    image.files.read(number, 4 * CHUNK, 10)
    assert image.blobs[0].chunks.ready_count == 1
    assert image.files.read(number, 4 * CHUNK + 10, 10) == BIG[4 * CHUNK + 10 :][:10]
    assert image.blobs[0].chunks.ready_count == 1
    assert image.metrics.reads.counts().bytes_read == 20


def test_what_cannot_be_read(image):
    for path in (b"/d", b"/soft", b"/char"):
        with pytest.raises(OSError, match=os.strerror(errno.EISDIR)):
            image.files.read(image.files.find(path), 0, 1)
    with pytest.raises(OSError, match=os.strerror(errno.ENOTDIR)):
        image.files.directory(image.files.find(b"/empty"))


def test_blob_that_is_missing_and_comes_back(image, bootstrap):
    (blob,) = (path for path in bootstrap.parent.iterdir() if path != bootstrap)
    away = bootstrap.parent.with_name("away")
    number = image.files.find(b"/d/big")
    blob.rename(away)
    try:
        with pytest.raises(NotFound):
            image.files.read(number, 0, len(BIG))
    finally:
        away.rename(blob)
    assert image.files.read(number, 0, len(BIG)) == BIG


def test_chunk_of_a_blob_that_is_not_there(bootstrap, tmp_path):
    data = bytearray(bootstrap.read_bytes())
    with open_bootstrap(bytes(data)) as view:
        start, count = view.lookup(b"/d/big").index_area()
    assert count == 7
    data[start : start + 8] = ChunkIndex.of_chunk(5, 0, 0).pack()
    (tmp_path / "boot").write_bytes(data)
    image = OpenImage(tmp_path / "boot", bootstrap.parent, tmp_path / "cache")
    try:
        number = image.files.find(b"/d/big")
        with pytest.raises(CorruptStructure, match="not in the table: got 5"):
            image.files.read(number, 0, 1)
        assert image.files.read(number, CHUNK, 1) == BIG[CHUNK : CHUNK + 1]
    finally:
        image.close()
