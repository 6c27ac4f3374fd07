import io
import stat
import tarfile

import pytest

from builder import tarmember
from builder.tarmember import END_OF_ARCHIVE, fits_tar, pack_member
from builder.tarstream import TarStream
from erofs import CorruptStructure, Node
from erofs.layout import encode_device_number


def parsed(*blocks):
    """Read headers back with Python's tarfile, and with our own walker."""
    data = b"".join(blocks) + END_OF_ARCHIVE
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as archive:
        theirs = archive.getmembers()
    ours = list(TarStream(io.BytesIO(data), "test"))
    assert len(theirs) == len(ours) == len(blocks)
    return theirs[0], ours[0]


def test_plain_file_is_one_block():
    node = Node(stat.S_IFREG | 0o4755, uid=1, gid=2, mtime=1700000000)
    block = pack_member(b"a/b", node)
    assert len(block) == 512
    info, ours = parsed(block)
    assert (info.name, info.mode, info.uid, info.gid, info.mtime) == (
        "a/b", 0o4755, 1, 2, 1700000000,
    )  # fmt: skip
    assert ours.pax_mtime is None
    assert ours.mtime == 1700000000


@pytest.mark.parametrize(
    ("seconds", "nsec", "record", "field"),
    [
        (1600000000, 123456789, "1600000000.123456789", 1600000000),
        (5, 500000000, "5.5", 5),
        (-2, 500000000, "-1.5", 0),
        (-1, 999999999, "-0.000000001", 0),
        (-77, 0, "-77", 0),
        (8**11, 0, str(8**11), 0),
        (0, 1, "0.000000001", 0),
    ],
)
def test_times_that_need_a_record(seconds, nsec, record, field):
    node = Node(stat.S_IFREG | 0o644, mtime=seconds, mtime_nsec=nsec)
    info, ours = parsed(pack_member(b"f", node))
    assert info.pax_headers["mtime"] == record
    assert ours.pax_mtime == (seconds, nsec)
    assert ours.mtime == field


@pytest.mark.parametrize("name", [b"\xff\xfe", "été".encode(), b"n" * 255, b"d/" * 200 + b"f"])
def test_names(name):
    info, ours = parsed(pack_member(name, Node(stat.S_IFREG | 0o644)))
    assert ours.path == name
    assert info.name.encode("utf-8", "surrogateescape") == name


def test_big_numbers():
    node = Node(stat.S_IFREG | 0o644, uid=0xFFFFFFFF, gid=8**7)
    # Content of that size does not follow, so only the record is looked at.
    node.size = 8**11
    info = tarfile.TarInfo.frombuf(pack_member(b"f", node)[:512], "utf-8", "strict")
    assert info.type == tarfile.XHDTYPE
    body = pack_member(b"f", node)[512:1024]
    for record in (b"uid=4294967295\n", b"gid=2097152\n", b"size=8589934592\n"):
        assert record in body


def test_directory_and_root():
    node = Node.directory(0o700)
    info, _ = parsed(pack_member(b"d", node))
    assert info.isdir()
    info, ours = parsed(pack_member(b"", node))
    assert info.isdir()
    assert ours.path == b"./"


def test_links():
    target = b"t" * 4095
    info, ours = parsed(pack_member(b"s", Node(stat.S_IFLNK | 0o777, target=target)))
    assert info.issym()
    assert ours.link == target
    node = Node(stat.S_IFREG | 0o644, size=7, xattrs={b"user.a": b"1"})
    info, ours = parsed(pack_member(b"l", node, b"first"))
    assert info.islnk()
    assert (ours.link, ours.size, ours.xattrs) == (b"first", 0, {})


def test_zero_byte_in_a_target_is_refused():
    with pytest.raises(CorruptStructure, match="zero byte"):
        pack_member(b"s", Node(stat.S_IFLNK | 0o777, target=b"a\0b"))


@pytest.mark.parametrize(("kind", "test"), [(stat.S_IFCHR, "ischr"), (stat.S_IFBLK, "isblk")])
def test_devices(kind, test):
    node = Node(kind | 0o600, rdev=encode_device_number(8, 0x12345))
    info, ours = parsed(pack_member(b"dev", node))
    assert getattr(info, test)()
    assert (info.devmajor, info.devminor) == (ours.major, ours.minor) == (8, 0x12345)


def test_fifo_has_device_fields():
    block = pack_member(b"p", Node(stat.S_IFIFO | 0o600, mtime=1, mtime_nsec=5))
    assert block[-512:][329:345] == b"0000000\0" * 2
    info, _ = parsed(block)
    assert info.isfifo()


def test_xattrs():
    xattrs = {
        b"user.empty": b"",
        b"user.bin": b"\xff\0\n=\x80",
        b"security.capability": bytes(range(256)),
        b"user.a=b": b"x=y",
        b"user.\xff": b"z",
    }
    _, ours = parsed(pack_member(b"f", Node(stat.S_IFREG | 0o644, xattrs=xattrs)))
    assert ours.xattrs == xattrs


def test_sockets_do_not_fit():
    assert not fits_tar(Node(stat.S_IFSOCK | 0o600))
    assert fits_tar(Node(stat.S_IFIFO | 0o600))


_KINDS = (
    Node(stat.S_IFREG | 0o4755, uid=1000, gid=8**7 - 1, mtime=1_700_000_000, size=12345),
    Node(stat.S_IFREG, size=8**11 - 1, mtime=8**11 - 1),
    Node.directory(0o1777),
    Node(stat.S_IFLNK | 0o777, target=b"../" + b"t" * 90, mtime=1),
    Node(stat.S_IFLNK | 0o777, target=b"t" * 101),
    Node(stat.S_IFREG, uid=8**7),
    Node(stat.S_IFREG, mtime=-1),
    Node(stat.S_IFREG, xattrs={b"user.a": b"b"}),
    Node(stat.S_IFIFO | 0o600),
    Node(stat.S_IFCHR | 0o600, rdev=encode_device_number(1, 3)),
)


@pytest.mark.parametrize("path", [b"", b"a/b", b"n" * 99, b"n" * 100, b"n" * 101, b"\xc3\xa9"])
@pytest.mark.parametrize("node", _KINDS, ids=lambda node: f"{node.mode:o}")
def test_short_headers_are_those_of_tarfile(monkeypatch, path, node):
    links = [None, b"l" * 100, b"l" * 101] if stat.S_ISREG(node.mode) else [None]
    quick = [pack_member(path, node, link) for link in links]
    monkeypatch.setattr(tarmember, "_plain_header", lambda *arguments: None)
    assert quick == [pack_member(path, node, link) for link in links]
