"""Trees that are hard to get right, as layer tars of three dialects and as a directory."""

import io
import os
import random
import socket
import stat
import struct
import subprocess
import tarfile
from pathlib import Path

__all__ = ["Layer", "make_directory", "make_layers"]

NAMES = [
    b" leading space",
    b"!before the dots",
    b"#hash",
    b"+plus",
    b"-",
    b"--help",
    b"..dots",
    b"...",
    b"new\nline",
    b"tab\tand \\ backslash",
    b"not \xff\xfe UTF-8",
    "größe 文件 🗄".encode(),
    b"*?[x]",
    b"\x01\x7f",
    b"\xff" * 255,
    b"n" * 255,
]
SIZES = [0, 1, 4095, 4096, 4097, 65535, 65536, 65537, (1 << 20) - 1, 1 << 20, (1 << 20) + 1]
LINK_LENGTHS = [1, 2, 59, 60, 100, 101, 255, 4031, 4032, 4033, 4094, 4095]
MANY = 3000
# Version 2 of the capability record: effective, cap_net_raw permitted; version 3 with an owner.
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
CAPABILITY_3 = struct.pack("<6I", 0x03000001, 1 << 10, 0, 0, 0, 1000)
BIG_ID = 4_000_000_000
HUGE_TIME = (1 << 33) + 12345
MIDDLE_TIME = (1 << 32) + 678


_MODES = {tarfile.DIRTYPE: 0o755, tarfile.SYMTYPE: 0o777}


def content(seed, size):
    """Return bytes of which a half compresses."""
    rng = random.Random(seed)
    out = bytearray()
    while len(out) < size:
        out += rng.randbytes(2048) + b"compressible text\n" * 114
    return bytes(out[:size])


class Layer:
    """A tar in the making, by Python's `tarfile`."""

    def __init__(self, path, dialect):
        self.path = path
        self._tar = tarfile.open(path, "w", format=dialect)  # noqa: SIM115

    def add(self, name, kind=tarfile.REGTYPE, data=b"", xattrs=None, pax=None, **attributes):
        info = tarfile.TarInfo(os.fsdecode(name))
        info.type = kind
        info.size = len(data)
        info.mode = _MODES.get(kind, 0o644)
        info.mtime = 1_600_000_000
        for key, value in attributes.items():
            setattr(info, key, value)
        for key, value in (xattrs or {}).items():
            info.pax_headers["SCHILY.xattr." + key] = os.fsdecode(value)
        info.pax_headers.update(pax or {})
        self._tar.addfile(info, io.BytesIO(data))

    def directory(self, name, **attributes):
        self.add(name, tarfile.DIRTYPE, **attributes)

    def link(self, name, target):
        self.add(name, tarfile.LNKTYPE, linkname=target)

    def close(self):
        self._tar.close()


def acl_records(directory):
    """Return mode and xattr records of a directory with both ACLs, as setfacl makes them."""
    probe = directory / "acl-probe"
    probe.mkdir()
    subprocess.run(["setfacl", "-m", "u:1234:rwx,g:5678:r-x,d:u:99:r,d:m::rw", probe], check=True)
    names = ("system.posix_acl_access", "system.posix_acl_default")
    records = {name: os.getxattr(probe, name) for name in names}
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir()
    return mode, records


def _names_and_sizes(layer):
    layer.directory(b"./", mode=0o750, mtime=1_500_000_000, uid=3, gid=4)
    layer.directory(b"names")
    for name in NAMES:
        layer.add(b"names/" + name, data=name)
    for name in (b"sub\xff", b"d" * 255):
        layer.directory(b"names/" + name)
        layer.add(b"names/" + name + b"/" + name, data=b"x")
    layer.directory(b"sizes")
    for size in SIZES:
        layer.add(f"sizes/{size}".encode(), data=content(size, size))
    layer.add(b"sizes/many chunks", data=content(1, (3 << 20) + 5))
    layer.add(b"sizes/same again", data=content(1, (3 << 20) + 5))
    layer.add(b"sizes/more than 16 MiB", data=b"0123456789abcdef" * (1 << 20) + b"tail")
    layer.add(b"sizes/equal chunks", data=content(2, 65536) * 33 + b"end")
    layer.add(b"sizes/zeros", data=bytes(5 << 20))
    layer.add(b"implied/parent/file", data=b"no headers for my parents")
    layer.directory(b"many")
    for number in range(MANY):
        name = f"many/{number:x}-{'y' * (number % 40)}".encode()
        if number % 10 == 0:
            layer.add(name, data=name)
        elif number % 10 == 1:
            layer.add(name, tarfile.SYMTYPE, linkname=f"target {number}")
        else:
            layer.add(name)
    deep = b"deep"
    layer.directory(deep)
    for level in range(40):
        deep += b"/level %02d " % level + b"z" * 35
        layer.directory(deep)
    layer.add(deep + b"/bottom", data=b"here")


def _attributes(layer, acl_mode, acl):
    layer.directory(b"links")
    for length in LINK_LENGTHS:
        target = ("t" * 200 + "/") * (length // 201 + 1)
        layer.add(b"links/%d" % length, tarfile.SYMTYPE, linkname=target[:length])
    layer.directory(b"modes")
    for mode in (0o000, 0o4755, 0o2755, 0o1777, 0o7777, 0o111):
        layer.add(f"modes/{mode:o}".encode(), data=b"x", mode=mode)
    layer.directory(b"modes/sticky", mode=0o1777)
    layer.add(b"modes/owner", data=b"x", uid=BIG_ID, gid=BIG_ID - 1)
    layer.directory(b"times")
    for number, mtime in enumerate((0, 1, -1, -77, MIDDLE_TIME, HUGE_TIME)):
        layer.add(b"times/%d" % number, data=b"x", mtime=mtime)
    layer.add(b"times/fraction", data=b"x", mtime=1_234_567_890.25)
    layer.directory(b"devices")
    numbers = [(1, 3), (4095, (1 << 20) - 1), (0, 1), (259, 256), (8, 255)]
    for major, minor in numbers:
        for prefix, kind in ((b"c", tarfile.CHRTYPE), (b"b", tarfile.BLKTYPE)):
            name = prefix + b"%d:%d" % (major, minor)
            layer.add(b"devices/" + name, kind, devmajor=major, devminor=minor)
    layer.add(b"devices/fifo", tarfile.FIFOTYPE, mode=0o600)
    layer.directory(b"xattrs", mode=acl_mode, xattrs={**acl, "user.of directory": b"1"})
    access = {"system.posix_acl_access": acl["system.posix_acl_access"]}
    layer.add(b"xattrs/acl", data=b"x", mode=acl_mode, xattrs=access)
    layer.add(b"xattrs/capability", data=b"x", xattrs={"security.capability": CAPABILITY})
    layer.add(b"xattrs/capability 3", data=b"x", xattrs={"security.capability": CAPABILITY_3})
    several = {f"user.{'n' * n}": b"v" * (n * 7 % 50) for n in (1, 2, 3, 4, 50, 200)}
    several |= {"trusted.secret": b"\x00\x01\xff binary\n", "security.other": b""}
    layer.add(b"xattrs/several", data=b"x", xattrs=several)
    layer.add(b"xattrs/large", data=b"x", xattrs={"user.large": bytes(range(256)) * 14})
    layer.add(b"xattrs/link", tarfile.SYMTYPE, linkname="several", xattrs={"trusted.l": b"link"})
    layer.add(b"xattrs/fifo", tarfile.FIFOTYPE, xattrs={"trusted.f": b"fifo"})


def _for_upper_layers(layer):
    """What the layers above delete, replace and bring back."""
    layer.directory(b"hard")
    layer.directory(b"hard/other directory")
    layer.add(b"hard/1", data=content(3, 70000))
    layer.link(b"hard/2", "hard/1")
    layer.link(b"hard/3", "hard/1")
    layer.link(b"hard/other directory/4", "hard/1")
    layer.directory(b"change")
    for name in (b"directory", b"directory to link", b"hidden", b"kept", b"mixed", b"opaque"):
        layer.directory(b"change/" + name, mode=0o700)
        layer.add(b"change/" + name + b"/below", data=b"of layer 1 in " + name)
        layer.directory(b"change/" + name + b"/deeper")
        layer.add(b"change/" + name + b"/deeper/file", data=b"deep in " + name)
    layer.add(b"change/file", data=content(4, 5000))
    layer.add(b"change/file back", data=content(5, 5000))
    layer.add(b"change/file gone", data=content(6, 9000))
    layer.add(b"change/link", tarfile.SYMTYPE, linkname="kept")
    layer.add(b"change/.wh.stays in the lowest layer", data=b"visible")


def _second_layer(tree):
    """Build the second layer as files and folders."""
    change = tree / "change"
    (tree / "hard").mkdir(parents=True)
    change.mkdir()
    (tree / "hard/.wh.2").touch()
    for name in ("file back", "file gone", "hidden", "never there"):
        (change / f".wh.{name}").touch()
    (change / "directory").write_bytes(b"now a file")
    (change / "directory to link").symlink_to("kept/deeper")
    (change / "file").mkdir()
    (change / "file/new").write_bytes(b"in what was a file")
    (change / "link").mkdir(mode=0o711)
    (change / "mixed").mkdir()
    (change / ".wh.mixed").touch()
    (change / "mixed/new").write_bytes(b"beside the whiteout of my directory")
    (change / "opaque").mkdir()
    (change / "opaque/.wh..wh..opq").touch()
    (change / "opaque/new").write_bytes(b"all that is left")
    fresh = tree / "fresh"
    fresh.mkdir()
    (fresh / ".wh.nothing below").touch()
    (fresh / "sparse").touch()
    with (fresh / "sparse").open("r+b") as file:
        file.truncate((6 << 20) + 100)
        file.seek(3 << 20)
        file.write(content(7, 70000))
    program = fresh / "program"
    program.write_bytes(content(8, 12345))
    program.chmod(0o755)
    subprocess.run(["setcap", "cap_net_bind_service,cap_sys_ptrace=ep", program], check=True)
    subprocess.run(["setfattr", "-n", "user.colour", "-v", "blue", program], check=True)
    subprocess.run(["setfattr", "-n", "trusted.two", "-v", "0x00ff", program], check=True)
    os.link(program, fresh / "linked")
    os.link(program, change / "linked across")
    os.mknod(fresh / "device", 0o020600, os.makedev(511, 70000))
    os.mkfifo(fresh / "fifo")
    for number, seconds in enumerate((-1.5, 0.5, 1.999999999, MIDDLE_TIME + 0.25)):
        path = fresh / f"time {number}"
        path.write_bytes(b"x")
        nanoseconds = round(seconds * 1_000_000_000)
        os.utime(path, ns=(nanoseconds, nanoseconds))


def _third_layer(layer):
    """Without xattrs, whose dialect has base-256 numbers and no PAX records."""
    layer.directory(b"./", mode=0o711, uid=7)
    layer.directory(b"change", mode=0o751)
    layer.directory(b"change/hidden")
    layer.add(b"change/hidden/new", data=b"what was below must not come back")
    layer.add(b"change/file back", data=b"back again")
    layer.directory(b"change/kept", mode=0o705, uid=BIG_ID, gid=12)
    layer.directory(b"change/directory", mtime=-3)
    layer.add(b"change/directory/again", data=b"directory, file, directory")
    layer.add(b"change/file", data=b"file, directory, file")
    layer.directory(b"change/opaque", mode=0o500)
    layer.add(b"change/opaque/third", data=b"over an opaque directory")
    layer.directory(b"change/mixed")
    layer.add(b"change/mixed/.wh.new")
    layer.directory(b"hard", mtime=1)
    layer.add(b"hard/3", data=b"no longer linked")
    layer.directory(b"times")
    for number, mtime in enumerate((-1, -(1 << 31), MIDDLE_TIME, HUGE_TIME)):
        layer.add(b"times/gnu %d" % number, data=b"x", mtime=mtime)
    layer.directory(b"names")
    layer.add(b"names/.wh." + NAMES[0])
    layer.add(b"names/.wh." + "größe 文件 🗄".encode())
    layer.directory(b"g" * 200)
    layer.directory(b"g" * 200 + b"/" + b"h" * 255, mode=0o777)
    layer.add(b"g" * 200 + b"/" + b"h" * 255 + b"/i", tarfile.SYMTYPE, linkname="l" * 3000)


def make_layers(directory: Path) -> list[Path]:
    """Write three layers, lowest first: PAX by Python, PAX by GNU tar, GNU format by Python."""
    paths = [directory / f"layer{number}.tar" for number in (1, 2, 3)]
    first = Layer(paths[0], tarfile.PAX_FORMAT)
    _names_and_sizes(first)
    _attributes(first, *acl_records(directory))
    _for_upper_layers(first)
    first.close()
    tree = directory / "second"
    tree.mkdir()
    _second_layer(tree)
    command = ["tar", "--format=posix", "--xattrs", "--xattrs-include=*", "--numeric-owner"]
    subprocess.run([*command, "--sort=name", "-cf", paths[1], "-C", tree, "."], check=True)
    third = Layer(paths[2], tarfile.GNU_FORMAT)
    _third_layer(third)
    third.close()
    return paths


def make_directory(top: Path) -> None:
    """Fill a directory with what only a directory as source can have, and what is awkward."""
    top.mkdir(mode=0o751)
    for name in NAMES:
        (top / os.fsdecode(name)).write_bytes(name)
    for size in SIZES:
        (top / f"size {size}").write_bytes(content(size, size))
    (top / "sub").mkdir()
    (top / "sub/linked").write_bytes(content(9, 1 << 21))
    os.link(top / "sub/linked", top / "linked")
    os.link(top / "sub/linked", top / "sub/zlinked")
    with (top / "sparse").open("wb") as file:
        file.truncate(20 << 20)
        for offset in (5 << 20, (11 << 20) + 4096):
            file.seek(offset)
            file.write(content(offset, 10000))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(top / "sub/socket"))
    os.mkfifo(top / "sub/fifo")
    os.mknod(top / "sub/block", 0o060640, os.makedev(4095, (1 << 20) - 1))
    os.mknod(top / "sub/char", 0o020640, os.makedev(10, 229))
    for length in LINK_LENGTHS:
        (top / "sub" / f"link {length}").symlink_to((("u" * 99 + "/") * 41)[:length])
    (top / "acl").mkdir()
    subprocess.run(["setfacl", "-m", "u:77:rx,d:g:88:rw", top / "acl"], check=True)
    (top / "acl/inherits").write_bytes(b"x")
    for name, value in {"user.a": b"1", "user.b" * 40: b"", "trusted.c": bytes(range(256))}.items():
        os.setxattr(top / "acl/inherits", name, value)
    os.setxattr(top / "linked", "security.capability", CAPABILITY)
    os.chown(top / "size 1", BIG_ID, BIG_ID)
    (top / "size 4096").chmod(0o6755)
    number = 0
    for parent, directories, files in os.walk(os.fsencode(top), topdown=False):
        for name in directories + files:
            number += 1
            nanoseconds = (number * 7 - 50) * 10**9 + number * 12345677 % 10**9
            path = os.path.join(parent, name)
            os.utime(path, ns=(nanoseconds, nanoseconds), follow_symlinks=False)
