"""The list of mounts, in which others choose names."""

import os

import pytest

from fscache import probe
from fscache.mounts import mountinfo
from fscache.mounts.mountinfo import parse_mountinfo
from fscache.mounts.place import Mounted, mounted_at, mounted_below

# What Python takes for white space or the end of a line, and the kernel for parts of a name.
NAMES = [
    b"a\rb",
    b"a\x0bb",
    b"a\x0cb",
    b"a\x1cb",
    b"a\xc2\x85b",
    "a\u2028b".encode(),
    b"a\xffb",
    b"- b",
]


def line(number, place, *, parent=1, kind="tmpfs", source=b"none"):
    place = place.replace(b"\\", b"\\134").replace(b" ", b"\\040")
    head = b"%d %d 0:%d / %s rw,relatime shared:7 master:2 - " % (number, parent, number, place)
    return head + kind.encode() + b" " + source + b" rw,size=1024k\n"


@pytest.fixture
def mounts(tmp_path, monkeypatch):
    path = tmp_path / "mountinfo"
    monkeypatch.setattr(mountinfo, "_MOUNTINFO", path)
    return lambda *lines: path.write_bytes(b"".join(lines))


def test_fields():
    (found,) = parse_mountinfo(line(36, b"/mnt/with blank", source=b"nydusd\\040x"))
    assert found.mountpoint == b"/mnt/with blank"
    assert (found.id, found.parent, found.device) == (b"36", b"1", os.makedev(0, 36))
    assert (found.kind, found.source, found.options) == ("tmpfs", "nydusd x", b"rw,size=1024k")


def test_a_mount_without_a_source():
    (found,) = parse_mountinfo(line(36, b"/mnt", source=b""))
    assert (found.kind, found.source, found.options) == ("tmpfs", "", b"rw,size=1024k")


@pytest.mark.parametrize("name", NAMES)
def test_names_that_others_have_chosen(mounts, name):
    mounts(
        line(1, b"/", parent=0, kind="ext4"),
        line(40, b"/mnt/" + name, kind="fuse.user"),
        line(41, b"/mnt/ours", source=b"nydusd"),
        line(42, b"/mnt/ours/" + name, parent=41),
    )
    assert mounted_at(os.fsdecode(b"/mnt/" + name)) == Mounted("fuse.user", "none")
    assert mounted_at("/mnt/ours") == Mounted("tmpfs", "nydusd")
    assert mounted_below("/mnt/ours") == [(name,)]
    assert probe.filesystem_type(os.fsdecode(b"/mnt/" + name + b"/below")) == "fuse.user"
    assert probe.filesystem_type("/elsewhere") == "ext4"
