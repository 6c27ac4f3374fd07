"""Records of tar archives: header blocks and PAX records to `TarMember`.

Pure: bytes in, values out. Reading streams, and knowing where in one a record was,
is the business of `builder.tarstream`. Sources: POSIX.1-2017 pax "ustar Interchange
Format" and "pax Extended Header", GNU tar manual "Basic Tar Format", libarchive
tar(5), spec rafs-v6 section 3.8 (what of a header ends in an image).
"""

from __future__ import annotations

import base64
import re
import stat
import struct
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from builder.errors import BuildError

__all__ = [
    "BLOCK_SIZE",
    "TYPE_GLOBAL_PAX",
    "TYPE_LONG_LINK",
    "TYPE_LONG_NAME",
    "TYPE_PAX",
    "TYPE_SOLARIS_PAX",
    "TYPE_VOLUME_LABEL",
    "TarError",
    "TarHeader",
    "TarMember",
    "build_member",
    "parse_header",
    "parse_pax",
]

BLOCK_SIZE = 512

TYPE_LONG_LINK = ord("K")
TYPE_LONG_NAME = ord("L")
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
}
# POSIX gives these no content whatever their size field says; GNU tar, Go and Python agree.
_WITHOUT_CONTENT = frozenset(b"123456")
_REFUSED = {
    ord("S"): "unsupported gnu sparse file extension",
    ord("M"): "unsupported multi-volume archive: this is the rest of a file of another volume",
}

# name, mode, uid, gid, size, mtime, checksum, type, link name, magic, device major, minor, prefix
_HEADER = struct.Struct("100s8s8s8s12s12s8sB100s6s2x64x8s8s155s12x")
_SIGNED_BLOCK = struct.Struct("512b")
_CHECKSUM_PLACE = slice(148, 156)
_USTAR_MAGIC = b"ustar\0"
# star keeps access and change time in the last 24 bytes of the prefix field, and signs for it.
_STAR_TRAILER_PLACE = slice(508, 512)
_STAR_TRAILER = b"tar\0"
_STAR_PREFIX_SIZE = 131

_MAX_U32 = 0xFFFFFFFF
_MAX_SIZE = (1 << 63) - 1
_NANOSECONDS = 1_000_000_000

_SCHILY_XATTR = b"SCHILY.xattr."
_LIBARCHIVE_XATTR = b"LIBARCHIVE.xattr."
_SPARSE_RECORDS = (b"GNU.sparse.", b"SUN.holesdata")
_KEPT_PREFIXES = (_SCHILY_XATTR, _LIBARCHIVE_XATTR, *_SPARSE_RECORDS)
_KEPT_RECORDS = frozenset((b"path", b"linkpath", b"uid", b"gid", b"size", b"mtime"))
# Digits of the longest record length that a body within our limits can need, and more.
_MAX_LENGTH_DIGITS = 20
_DECIMAL = re.compile(rb"[0-9]{1,20}")
_TIME = re.compile(rb"(-?)([0-9]{1,18})(?:\.([0-9]*))?")


class TarError(BuildError):
    """An archive that is damaged, or that uses what is not supported."""


class TarHeader(NamedTuple):
    """One header block, decoded; `path` has the ustar prefix in front.

    `device` are the undecoded major and minor fields: only devices need them, and
    writers leave them blank elsewhere.
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


class TarMember(NamedTuple):
    """One file of an archive, all headers that describe it taken together.

    `path` and `link` are raw bytes as in the archive, not normalised (they can be
    empty, absolute, have `..` or a slash at the end); `link` is empty unless the
    member is a symlink or a hard link. `kind` has the type bits of `st_mode`, of a
    hard link those of a regular file. `mode` has the permission bits (07777).

    `mtime` is the header's field alone, in signed seconds; `pax_mtime` the PAX record
    as (seconds, nanoseconds), rounded down, nanoseconds never negative. `xattrs` maps
    full names to values. `size` counts the content bytes that follow at byte `offset`
    of the stream; only a directory that is one by the slash at its end can have some
    and be no regular file.
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
    xattrs: dict[bytes, bytes]
    offset: int


def parse_header(block: bytes) -> TarHeader:
    """Decode a header block of 512 bytes, which must not be all zeros.

    Raises:
        TarError: wrong checksum, or a number that is none or out of its range.
    """
    (name, mode, uid, gid, size, mtime, checksum, kind, link, magic, major, minor, prefix) = (
        _HEADER.unpack(block)
    )
    _verify_checksum(block, checksum)
    path = name.split(b"\0", 1)[0]
    # GNU's magic is "ustar " and v7 has none: both use the prefix field for other things.
    if magic == _USTAR_MAGIC and prefix[0]:
        if block[_STAR_TRAILER_PLACE] == _STAR_TRAILER:
            prefix = prefix[:_STAR_PREFIX_SIZE]
        path = prefix.split(b"\0", 1)[0] + b"/" + path
    try:
        return TarHeader(
            path,
            kind,
            link.split(b"\0", 1)[0],
            _number(mode, "mode", _MAX_U32),
            _number(uid, "uid", _MAX_U32),
            _number(gid, "gid", _MAX_U32),
            _modification_time(mtime),
            _number(size, "size", _MAX_SIZE),
            (major, minor),
        )
    except TarError as error:
        error.add_context(entry=path)
        raise


def _verify_checksum(block: bytes, field: bytes) -> None:
    """Raise `TarError` unless the block has its checksum, whose own field counts as spaces."""
    stored = _number(field, "checksum", _MAX_U32)
    blank = 8 * ord(" ")
    computed = sum(block) - sum(field) + blank
    if computed != stored:
        # Old Sun tars summed signed characters.
        signed = _SIGNED_BLOCK.unpack(block)
        if sum(signed) - sum(signed[_CHECKSUM_PLACE]) + blank != stored:
            raise TarError("wrong tar header checksum", expected=stored, got=computed)


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


def _modification_time(field: bytes) -> int:
    """Decode mtime as the real builder does: 8 bytes of a base-256 number, unreadable is 0."""
    if field[0] & 0x80:
        return int.from_bytes(field[-8:], "big", signed=True)
    return _octal(field.split(b"\0", 1)[0].strip(b" ")) or 0


def parse_pax(body: bytes) -> dict[bytes, bytes]:
    """Decode the records of a PAX header, keeping those that matter for a `TarMember`.

    Raises:
        TarError: a record without its length, keyword or newline.
    """
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(body):
        space = body.find(b" ", position, position + _MAX_LENGTH_DIGITS)
        digits = body[position:space] if space > 0 else b""
        if not digits.isdigit():
            raise TarError(f"PAX record at byte {position} has no length")
        end = position + int(digits)
        if not space + 1 < end <= len(body):
            raise TarError(f"PAX record at byte {position} has a wrong length", got=int(digits))
        if body[end - 1] != ord("\n"):
            raise TarError(f"PAX record at byte {position} does not end with a newline")
        equals = body.find(b"=", space + 1, end - 1)
        if equals <= space + 1:
            raise TarError(f"PAX record at byte {position} has no keyword")
        key = body[space + 1 : equals]
        if key in _KEPT_RECORDS or key.startswith(_KEPT_PREFIXES):
            records[key] = body[equals + 1 : end - 1]
        position = end
    return records


def build_member(
    header: TarHeader,
    long_name: bytes | None,
    long_link: bytes | None,
    pax: Mapping[bytes, bytes],
    offset: int,
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

    Raises:
        TarError: unsupported type, sparse file, or unparsable PAX or device number.
    """
    path = _name(header.path, long_name, pax, b"path")
    try:
        kind = _kind(header.type, path)
        link = b""
        if kind == stat.S_IFLNK or header.type == _TYPE_HARD_LINK:
            link = _name(header.link, long_link, pax, b"linkpath")
        major = minor = 0
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            major, minor = map(_device_number, header.device)
        uid, gid, size = header.uid, header.gid, header.size
        pax_mtime = None
        xattrs: dict[bytes, bytes] = {}
        if pax:
            uid = _pax_number(pax, b"uid", uid, _MAX_U32)
            gid = _pax_number(pax, b"gid", gid, _MAX_U32)
            size = _pax_number(pax, b"size", size, _MAX_SIZE)
            pax_mtime = _pax_time(pax)
            others = [key for key in pax if key not in _KEPT_RECORDS]
            if others:
                _refuse_pax_sparse(others)
                xattrs = _pax_xattrs(pax)
        if header.type in _WITHOUT_CONTENT:
            size = 0
    except TarError as error:
        error.add_context(entry=path)
        raise
    return TarMember(
        path,
        kind,
        header.type == _TYPE_HARD_LINK,
        link,
        header.mode & 0o7777,
        uid,
        gid,
        header.mtime,
        pax_mtime,
        major,
        minor,
        size,
        xattrs,
        offset,
    )


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


def _refuse_pax_sparse(keys: list[bytes]) -> None:
    for key in keys:
        if key.startswith(_SPARSE_RECORDS):
            raise TarError(
                f"unsupported sparse file (PAX record {key.decode('ascii', 'replace')}); "
                "nydus-image stores such files wrongly"
            )


def _pax_number(pax: Mapping[bytes, bytes], key: bytes, default: int, maximum: int) -> int:
    text = pax.get(key)
    if not text:
        return default
    if _DECIMAL.fullmatch(text) is None:
        raise TarError(f"unparsable PAX {key.decode()}", got=text[:64])
    value = int(text)
    if value > maximum:
        raise TarError(f"PAX {key.decode()} out of range: {value}")
    return value


def _pax_time(pax: Mapping[bytes, bytes]) -> tuple[int, int] | None:
    """Decode the PAX mtime without going through floats, towards the past."""
    text = pax.get(b"mtime")
    if not text:
        return None
    match = _TIME.fullmatch(text)
    if match is None:
        raise TarError("unparsable PAX mtime", got=text[:64])
    sign, seconds, fraction = match.group(1), match.group(2), match.group(3) or b""
    total = int(seconds) * _NANOSECONDS + int(fraction[:9].ljust(9, b"0"))
    if sign:
        total = -total - bool(fraction[9:].strip(b"0"))
    return divmod(total, _NANOSECONDS)


def _pax_xattrs(pax: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Collect xattrs; libarchive writes them twice, the encoded copy is the spare one."""
    xattrs: dict[bytes, bytes] = {}
    for key, value in pax.items():
        if key.startswith(_SCHILY_XATTR):
            xattrs[key[len(_SCHILY_XATTR) :]] = value
    for key, value in pax.items():
        if key.startswith(_LIBARCHIVE_XATTR):
            name = unquote_to_bytes(key[len(_LIBARCHIVE_XATTR) :])
            if name not in xattrs:
                xattrs[name] = _unpadded_base64(name, value)
    return xattrs


def _unpadded_base64(name: bytes, text: bytes) -> bytes:
    text = text.rstrip(b"=")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise TarError("xattr is not base64", got=name) from error
