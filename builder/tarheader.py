"""Records of tar archives: header blocks, and what goes with them, to `TarMember`.

Pure: bytes in, values out. Reading streams, and knowing where in one a record was,
is the business of `builder.tarstream`. Sources: POSIX.1-2017 pax "ustar Interchange
Format", GNU tar manual "Basic Tar Format", libarchive tar(5), spec rafs-v6 section 3.8
(what of a header ends in an image).
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple
from zlib import adler32

from builder.errors import TarError
from builder.tarpax import PaxFields, decode_pax
from builder.tarsparse import SPARSE_NAME, Extent, SparseMap
from erofs.base import NO_XATTRS

__all__ = [
    "BLOCK_SIZE",
    "TYPE_GLOBAL_PAX",
    "TYPE_GNU_SPARSE",
    "TYPE_LONG_LINK",
    "TYPE_LONG_NAME",
    "TYPE_PAX",
    "TYPE_SOLARIS_PAX",
    "TYPE_VOLUME_LABEL",
    "TarError",
    "TarHeader",
    "TarMember",
    "build_member",
    "byte_sum",
    "parse_header",
    "parse_sparse_extension",
]

BLOCK_SIZE = 512
_HALF_BLOCK = BLOCK_SIZE // 2

TYPE_LONG_LINK = ord("K")
TYPE_LONG_NAME = ord("L")
TYPE_GNU_SPARSE = ord("S")
TYPE_VOLUME_LABEL = ord("V")
TYPE_SOLARIS_PAX = ord("X")
TYPE_GLOBAL_PAX = ord("g")
TYPE_PAX = ord("x")
_TYPE_OLD_REGULAR = 0
_TYPE_REGULAR = ord("0")
_TYPE_HARD_LINK = ord("1")

_KINDS = {
    _TYPE_OLD_REGULAR: stat.S_IFREG,
    _TYPE_REGULAR: stat.S_IFREG,
    _TYPE_HARD_LINK: stat.S_IFREG,
    ord("2"): stat.S_IFLNK,
    ord("3"): stat.S_IFCHR,
    ord("4"): stat.S_IFBLK,
    ord("5"): stat.S_IFDIR,
    ord("6"): stat.S_IFIFO,
    ord("7"): stat.S_IFREG,
    # Of GNU's incremental backups: what it lists is for them only.
    ord("D"): stat.S_IFDIR,
    TYPE_GNU_SPARSE: stat.S_IFREG,
}
_PLAIN_KINDS = {kind: _KINDS[kind] for kind in (0, *b"025")}
# POSIX gives these no content whatever their size field says; GNU tar, Go and Python agree.
_WITHOUT_CONTENT = frozenset(b"123456")
_REFUSED = {
    ord("M"): "unsupported multi-volume archive: this is the rest of a file of another volume",
}

# name, mode with owner, size, mtime, checksum, type, link, magic, device major, minor, prefix
_HEADER = struct.Struct("100s24s12s12s8sB100s6s2x64x8s8s155s12x")
_MODE_AND_OWNER = struct.Struct("8s8s8s")
_SIGNED_BLOCK = struct.Struct("512b")
# Behind GNU's time fields: four extents, "more follow", size of the whole file.
_SPARSE_FIELDS = struct.Struct("386x96sB12s17x")
_SPARSE_EXTENSION = struct.Struct("504sB7x")
_SPARSE_EXTENT = struct.Struct("12s12s")
_CHECKSUM_PLACE = slice(148, 156)
_USTAR_MAGIC = b"ustar\0"
# star keeps access and change time in the last 24 bytes of the prefix field, and signs for it.
_STAR_TRAILER_PLACE = slice(508, 512)
_STAR_TRAILER = b"tar\0"
_STAR_PREFIX_SIZE = 131

_MAX_U32 = 0xFFFFFFFF
_MAX_SIZE = (1 << 63) - 1
_NO_FIELDS = PaxFields(None, None, None, None, {}, None, None)


class TarHeader(NamedTuple):
    """One header block, decoded; `path` has the ustar prefix in front.

    `device` are the undecoded major and minor fields: only devices need them, and
    writers leave them blank elsewhere. Of GNU's sparse files `sparse` has the first extents,
    and `continues` tells whether an extension block with others follows.
    """

    path: bytes
    type: int
    link: bytes
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    device: tuple[bytes, bytes]
    sparse: SparseMap | None = None
    continues: bool = False


class TarMember(NamedTuple):
    """One file of an archive, all headers that describe it taken together.

    `path` and `link` are raw bytes as in the archive, not normalised (they can be
    empty, absolute, have `..` or a slash at the end); `link` is empty unless the
    member is a symlink or a hard link. `kind` has the type bits of `st_mode`, of a
    hard link those of a regular file. `mode` has the permission bits (07777).

    `mtime` is the header's field alone, in signed seconds; `pax_mtime` the PAX record
    as (seconds, nanoseconds), rounded down, nanoseconds never negative. `xattrs` maps
    full names to values. `size` is that of the file, and `stored_size` counts the content
    bytes that follow at byte `offset` of the stream; they differ where `sparse` tells which
    parts of the file those are. Only directories can have stored content and be no regular
    file: those by the slash at their end, and GNU's with a list of their files.
    """

    path: bytes
    kind: int
    is_hardlink: bool
    link: bytes
    mode: int
    uid: int
    gid: int
    mtime: int
    pax_mtime: tuple[int, int] | None
    major: int
    minor: int
    size: int
    xattrs: Mapping[bytes, bytes]
    offset: int
    stored_size: int
    sparse: SparseMap | None = None


def parse_header(block: bytes) -> TarHeader:
    """Decode a header block of 512 bytes, which must not be all zeros.

    Raises:
        TarError: wrong checksum, or a number that is none or out of its range.
    """
    (name, mode_and_owner, size, mtime, checksum, kind, link, magic, major, minor, prefix) = (
        _HEADER.unpack(block)
    )
    _verify_checksum(block, checksum)
    path = name.split(b"\0", 1)[0]
    # GNU's magic is "ustar " and v7 has none: both use the prefix field for other things.
    if prefix[0] and magic == _USTAR_MAGIC:
        if block[_STAR_TRAILER_PLACE] == _STAR_TRAILER:
            prefix = prefix[:_STAR_PREFIX_SIZE]
        path = prefix.split(b"\0", 1)[0] + b"/" + path
    try:
        mode, uid, gid = _decode_mode_and_owner(mode_and_owner)
        found = TarHeader(
            path,
            kind,
            link.split(b"\0", 1)[0] if link[0] else b"",
            mode,
            uid,
            gid,
            _modification_time(mtime),
            _number(size, "size", _MAX_SIZE),
            (major, minor),
        )
        return found if kind != TYPE_GNU_SPARSE else _with_extents(found, block)
    except TarError as error:
        error.add_context(entry=path)
        raise


def _with_extents(header: TarHeader, block: bytes) -> TarHeader:
    area, continues, real_size = _SPARSE_FIELDS.unpack(block)
    found = SparseMap(_extents(area), _number(real_size, "size", _MAX_SIZE))
    return header._replace(sparse=found, continues=bool(continues))


def parse_sparse_extension(block: bytes) -> tuple[list[Extent], bool]:
    """Decode a block of further extents, and whether another one follows; raise `TarError`."""
    area, continues = _SPARSE_EXTENSION.unpack(block)
    return _extents(area), bool(continues)


def _extents(area: bytes) -> list[Extent]:
    found = []
    for offset, size in _SPARSE_EXTENT.iter_unpack(area):
        if not size[0]:
            break
        found.append(Extent(_number(offset, "offset", _MAX_SIZE), _number(size, "size", _MAX_SIZE)))
    return found


def byte_sum(block: bytes | bytearray) -> int:
    """Return the sum of the bytes of a header block.

    Adler-32 has it plus one, which of half a block is below its modulus.
    """
    return (adler32(block[:_HALF_BLOCK]) & 0xFFFF) + (adler32(block[_HALF_BLOCK:]) & 0xFFFF) - 2


def _verify_checksum(block: bytes, field: bytes) -> None:
    """Raise `TarError` unless the block has its checksum, whose own field counts as spaces."""
    blank = 8 * ord(" ")
    computed = byte_sum(block) - sum(field) + blank
    if field == b"%06o\0 " % computed:
        return
    stored = _number(field, "checksum", _MAX_U32)
    if computed != stored:
        # Old Sun tars summed signed characters.
        signed = _SIGNED_BLOCK.unpack(block)
        if sum(signed) - sum(signed[_CHECKSUM_PLACE]) + blank != stored:
            raise TarError("wrong tar header checksum", expected=stored, got=computed)


# Archives repeat the same few modes, owners and times.
@lru_cache(1024)
def _decode_mode_and_owner(fields: bytes) -> tuple[int, int, int]:
    mode, uid, gid = _MODE_AND_OWNER.unpack(fields)
    return (
        _number(mode, "mode", _MAX_U32),
        _number(uid, "uid", _MAX_U32),
        _number(gid, "gid", _MAX_U32),
    )


@lru_cache(1024)
def _number(field: bytes, what: str, maximum: int) -> int:
    """Decode a number field: octal text or, with the top bit set, GNU base-256; blank is 0."""
    if field[0] & 0x80:
        value = _base256(field)
    else:
        digits = field.split(b"\0", 1)[0].strip(b" ")
        octal = _octal(digits) if digits else 0
        if octal is None:
            raise TarError(f"unparsable {what} in tar header", got=field)
        value = octal
    if not 0 <= value <= maximum:
        raise TarError(f"{what} in tar header out of range: {value}")
    return value


def _octal(digits: bytes) -> int | None:
    # int() alone would take signs, underscores and "0o" too.
    if not digits.isdigit():
        return None
    try:
        return int(digits, 8)
    except ValueError:
        return None


def _base256(field: bytes) -> int:
    """Decode big-endian two's complement behind a marker bit; bit 6 of byte 0 is the sign."""
    if field[0] & 0x40:
        return int.from_bytes(field, "big", signed=True)
    return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)


@lru_cache(1024)
def _modification_time(field: bytes) -> int:
    """Decode mtime as the real builder does: 8 bytes of a base-256 number, unreadable is 0."""
    if field[0] & 0x80:
        return int.from_bytes(field[-8:], "big", signed=True)
    return _octal(field.split(b"\0", 1)[0].strip(b" ")) or 0


def build_member(
    header: TarHeader,
    long_name: bytes | None,
    long_link: bytes | None,
    pax: Mapping[bytes, bytes],
    offset: int,
    sparse: SparseMap | None = None,
) -> TarMember:
    """Combine a header with what the extended headers in front of it said.

    GNU long names win over PAX, as in the real builder and in containerd (Go). A PAX
    record with an empty value gives way to the header's field.

    Args:
        header: of the member itself.
        long_name: content of a GNU `L` member, if there was one.
        long_link: content of a GNU `K` member, if there was one.
        pax: global records overridden by local ones.
        offset: byte position of the content in the stream.
        sparse: the complete map of a member in GNU's old sparse form.

    Raises:
        TarError: unsupported type, or unparsable PAX or device number.
    """
    if not (pax or long_name or long_link or sparse):
        member = _plain_member(header, offset)
        if member is not None:
            return member
    path = _name(header.path, long_name, pax, b"path")
    if SPARSE_NAME in pax:
        path = _name(path, None, pax, SPARSE_NAME)
    try:
        kind = _kind(header.type, path)
        link = b""
        if kind == stat.S_IFLNK or header.type == _TYPE_HARD_LINK:
            link = _name(header.link, long_link, pax, b"linkpath")
        major = minor = 0
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            major, minor = map(_device_number, header.device)
        fields = decode_pax(pax, path) if pax else _NO_FIELDS
        size = _override(header.size, fields.size)
        sparse = sparse or fields.sparse
        if header.type in _WITHOUT_CONTENT:
            size = 0
        if kind != stat.S_IFREG:
            sparse = None
        mode = header.mode & 0o7777
        if fields.permissions is not None and kind != stat.S_IFLNK:
            mode = mode & ~0o777 | fields.permissions
    except TarError as error:
        error.add_context(entry=path)
        raise
    return TarMember(
        path,
        kind,
        header.type == _TYPE_HARD_LINK,
        link,
        mode,
        _override(header.uid, fields.uid),
        _override(header.gid, fields.gid),
        header.mtime,
        fields.mtime,
        major,
        minor,
        size if sparse is None else sparse.real_size,
        dict(fields.xattrs),
        offset,
        size,
        sparse,
    )


def _plain_member(header: TarHeader, offset: int) -> TarMember | None:
    """Return a file, directory or symlink that its header describes alone; None for others.

    Most members are, so that they are spared all the questions.
    """
    path, header_type, link, mode, uid, gid, mtime, size, *_ = header
    kind = _PLAIN_KINDS.get(header_type)
    if kind is None or (path.endswith(b"/") and kind == stat.S_IFREG):
        return None
    if kind != stat.S_IFREG:
        size = 0
    if kind != stat.S_IFLNK:
        link = b""
    return TarMember(
        path,
        kind,
        False,
        link,
        mode & 0o7777,
        uid,
        gid,
        mtime,
        None,
        0,
        0,
        size,
        NO_XATTRS,
        offset,
        size,
    )


def _override(field: int, record: int | None) -> int:
    return field if record is None else record


def _name(field: bytes, gnu: bytes | None, pax: Mapping[bytes, bytes], key: bytes) -> bytes:
    if gnu is not None:
        return gnu.split(b"\0", 1)[0]
    if not pax:
        return field
    name = pax.get(key) or field
    if b"\0" in name:
        raise TarError(f"PAX {key.decode()} has a zero byte", got=name, entry=field)
    return name


def _kind(header_type: int, path: bytes) -> int:
    kind = _KINDS.get(header_type)
    if kind is None:
        reason = _REFUSED.get(header_type)
        if reason is None and chr(header_type).isupper() and header_type < 0x80:
            # POSIX leaves capitals to vendors, whose tools do not mean a regular file by them.
            reason = f"unsupported tar member type {chr(header_type)!r}"
        if reason is not None:
            raise TarError(reason)
        return stat.S_IFREG
    if header_type in (_TYPE_OLD_REGULAR, _TYPE_REGULAR) and path.endswith(b"/"):
        return stat.S_IFDIR
    return kind


def _device_number(field: bytes) -> int:
    if not field.strip(b" \0"):
        raise TarError("blank device number in tar header")
    return _number(field, "device number", _MAX_U32)
