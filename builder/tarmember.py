"""Headers of tar members in PAX format, made from nodes; the way back is `builder.tarheader`.

Pure: values in, bytes out. What fits into a plain ustar header stays there, so that
readers which know nothing else, as the real builder for times, see it.
"""

from __future__ import annotations

import stat
import struct

from builder.tarheader import BLOCK_SIZE, byte_sum
from erofs import CorruptStructure, Node
from erofs.layout import decode_device_number

__all__ = ["BLOCK_SIZE", "END_OF_ARCHIVE", "fits_tar", "pack_member"]

END_OF_ARCHIVE = bytes(2 * BLOCK_SIZE)

_TYPES = {
    stat.S_IFREG: b"0",
    stat.S_IFDIR: b"5",
    stat.S_IFLNK: b"2",
    stat.S_IFCHR: b"3",
    stat.S_IFBLK: b"4",
    stat.S_IFIFO: b"6",
}
_LINK_TYPE = b"1"
_PLAIN_TYPES = frozenset({stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK})
# name, mode with owner, size with time, checksum, type, link, magic
_HEADER = struct.Struct("100s24s24s8sc100s8s")
_NAME_SIZE = 100
_MAX_OWNER = 8**7
_MAX_NUMBER = 8**11
_CHECKSUM = slice(148, 156)
_DEVICE_FIELDS = slice(329, 345)
_NANOSECONDS = 1_000_000_000


def fits_tar(node: Node) -> bool:
    """Tell whether tar has a type for the node; it has none for sockets."""
    return stat.S_IFMT(node.mode) in _TYPES


def pack_member(path: bytes, node: Node, link: bytes | None = None) -> bytes:
    """Return the header blocks of a member, extended ones included.

    Args:
        path: name in the archive, without a slash at the front; empty for the root.
        node: a node of which `fits_tar` is true.
        link: makes a hard link to this path of the archive.

    Raises:
        CorruptStructure: a symlink target that no tar and no kernel takes.
    """
    kind = stat.S_IFMT(node.mode)
    if b"\0" in node.target:
        raise CorruptStructure("symlink target with a zero byte")
    plain = _plain_header(path, node, kind, node.target if link is None else link, link is None)
    if plain is not None:
        return plain
    # Imported here: nearly all members are plain.
    import tarfile

    info = tarfile.TarInfo(_text(path) or ".")
    info.mode = stat.S_IMODE(node.mode)
    info.uid, info.gid = node.uid, node.gid
    info.mtime = node.mtime
    records = {"mtime": _decimal_time(node)} if node.mtime_nsec else {}
    if link is not None:
        info.type = _LINK_TYPE
        info.linkname = _text(link)
    else:
        info.type = _TYPES[kind]
        info.size = node.size if kind == stat.S_IFREG else 0
        info.linkname = _text(node.target)
        info.devmajor, info.devminor = decode_device_number(node.rdev)
        records.update(_xattr_record(*item) for item in node.xattrs.items())
    info.pax_headers = records
    header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    return _with_device_fields(header) if kind == stat.S_IFIFO else header


def _plain_header(path: bytes, node: Node, kind: int, link: bytes, is_first: bool) -> bytes | None:
    """Return the header of a member that fits into one block of ustar; None for others.

    The bytes are those of `tarfile`, which takes ten times as long for them.
    """
    name = path or b"."
    if kind == stat.S_IFDIR and is_first:
        name += b"/"
    if (
        kind not in _PLAIN_TYPES
        or node.mtime_nsec
        or node.xattrs
        or len(name) > _NAME_SIZE
        or len(link) > _NAME_SIZE
        or not (name.isascii() and link.isascii())
        or not (node.uid < _MAX_OWNER and node.gid < _MAX_OWNER)
        or not 0 <= node.mtime < _MAX_NUMBER
        or node.size >= _MAX_NUMBER
    ):
        return None
    is_file = kind == stat.S_IFREG and is_first
    block = bytearray(BLOCK_SIZE)
    _HEADER.pack_into(
        block, 0, name, b"%07o\0%07o\0%07o\0" % (node.mode & 0o7777, node.uid, node.gid),
        b"%011o\0%011o\0" % (node.size if is_file else 0, node.mtime), b" " * 8,
        _TYPES[kind] if is_first else _LINK_TYPE, link, b"ustar\x0000",
    )  # fmt: skip
    block[_CHECKSUM] = b"%06o\0 " % byte_sum(block)
    return bytes(block)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _decimal_time(node: Node) -> str:
    total = node.mtime * _NANOSECONDS + node.mtime_nsec
    seconds, fraction = divmod(abs(total), _NANOSECONDS)
    return f"{'-' if total < 0 else ''}{seconds}.{fraction:09d}".rstrip("0")


def _xattr_record(name: bytes, value: bytes) -> tuple[str, str]:
    """Return keyword and value; names that PAX cannot hold take libarchive's encoded form."""
    if name.isascii() and b"=" not in name:
        return "SCHILY.xattr." + name.decode("ascii"), _text(value)
    # Imported here: no name is known that takes this way.
    import base64
    from urllib.parse import quote_from_bytes

    encoded = base64.b64encode(value).rstrip(b"=")
    return "LIBARCHIVE.xattr." + quote_from_bytes(name), encoded.decode("ascii")


def _with_device_fields(header: bytes) -> bytes:
    """Put zeros where `tarfile` leaves device fields blank: the real builder wants a FIFO's."""
    block = bytearray(header[-BLOCK_SIZE:])
    block[_DEVICE_FIELDS] = b"0000000\0" * 2
    block[_CHECKSUM] = b" " * 8
    block[_CHECKSUM] = b"%06o\0 " % byte_sum(block)
    return header[:-BLOCK_SIZE] + bytes(block)
