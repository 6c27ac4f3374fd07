"""Extended headers of tar archives in PAX format: records to values.

Pure: bytes in, values out. Source: POSIX.1-2017 pax "pax Extended Header", libarchive tar(5).
"""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from builder.errors import TarError
from builder.taracl import Acl, UnknownNameError, parse_acl
from builder.tarsparse import SPARSE_MAP, SPARSE_PAIR, SparseMap, pax_map

__all__ = ["PaxFields", "decode_pax", "parse_pax"]

logger = logging.getLogger(__name__)

_SCHILY_XATTR = b"SCHILY.xattr."
_LIBARCHIVE_XATTR = b"LIBARCHIVE.xattr."
_SPARSE_PREFIX = b"GNU.sparse."
_SUN_SPARSE = b"SUN.holesdata"
_ACCESS_ACL, _DEFAULT_ACL = b"SCHILY.acl.access", b"SCHILY.acl.default"
_ACL_XATTRS = {
    _ACCESS_ACL: b"system.posix_acl_access",
    _DEFAULT_ACL: b"system.posix_acl_default",
}
_KEPT_PREFIXES = (_SCHILY_XATTR, _LIBARCHIVE_XATTR, _SPARSE_PREFIX, _SUN_SPARSE)
_NAMES = frozenset((b"path", b"linkpath"))
_PLAIN_RECORDS = frozenset((b"uid", b"gid", b"size", b"mtime")) | _NAMES
_KEPT_RECORDS = _PLAIN_RECORDS | _ACL_XATTRS.keys()
# Digits of the longest record length that a body within our limits can need, and more.
_MAX_LENGTH_DIGITS = 20
_DECIMAL = re.compile(rb"[0-9]{1,20}")
_TIME = re.compile(rb"(-?)([0-9]{1,18})(?:\.([0-9]*))?")

_MAX_U32 = 0xFFFFFFFF
_MAX_SIZE = (1 << 63) - 1
_NANOSECONDS = 1_000_000_000


class PaxFields(NamedTuple):
    """What records say of a member, None where nothing: as in `builder.tarheader.TarMember`.

    `permissions` are those of an access ACL, which has more to say than the header.
    """

    uid: int | None
    gid: int | None
    size: int | None
    mtime: tuple[int, int] | None
    xattrs: dict[bytes, bytes]
    sparse: SparseMap | None
    permissions: int | None


def parse_pax(body: bytes) -> dict[bytes, bytes]:
    """Decode the records of a PAX header, keeping those that matter for a `TarMember`.

    Raises:
        TarError: a record without its length, keyword or newline.
    """
    records: dict[bytes, bytes] = {}
    pairs: list[bytes] = []
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
        value = body[equals + 1 : end - 1]
        if key in SPARSE_PAIR:
            if key != SPARSE_PAIR[len(pairs) % 2]:
                raise TarError("PAX records of a sparse file in the wrong order")
            pairs.append(value)
        elif key in _KEPT_RECORDS or key.startswith(_KEPT_PREFIXES):
            records[key] = value
        position = end
    if pairs:
        records[SPARSE_MAP] = b",".join(pairs)
    return records


def decode_pax(records: Mapping[bytes, bytes], path: bytes) -> PaxFields:
    """Decode the records of the member at `path`, but for its names; raise `TarError`."""
    fields = PaxFields(
        _pax_number(records, b"uid", _MAX_U32),
        _pax_number(records, b"gid", _MAX_U32),
        _pax_number(records, b"size", _MAX_SIZE),
        _pax_time(records),
        {},
        None,
        None,
    )
    if records.keys() <= _PLAIN_RECORDS:
        return fields
    xattrs = _pax_xattrs(records)
    permissions = None
    for key, name in _ACL_XATTRS.items():
        if key in records and name not in xattrs:
            acl = _acl(records[key], path)
            if acl is not None and acl.xattr is not None:
                xattrs[name] = acl.xattr
            if acl is not None and key == _ACCESS_ACL:
                permissions = acl.permissions
    return fields._replace(xattrs=xattrs, sparse=_pax_sparse(records), permissions=permissions)


def _acl(text: bytes, path: bytes) -> Acl | None:
    try:
        return parse_acl(text)
    except UnknownNameError as error:
        error.add_context(entry=path)
        logger.warning("%s: the ACL is left out", error)
        return None


def _pax_sparse(records: Mapping[bytes, bytes]) -> SparseMap | None:
    if _SUN_SPARSE in records:
        raise TarError("unsupported sparse file (PAX record SUN.holesdata)")
    if any(key.startswith(_SPARSE_PREFIX) for key in records):
        return pax_map(records)
    return None


def _pax_number(records: Mapping[bytes, bytes], key: bytes, maximum: int) -> int | None:
    text = records.get(key)
    if not text:
        return None
    if _DECIMAL.fullmatch(text) is None:
        raise TarError(f"unparsable PAX {key.decode()}", got=text[:64])
    value = int(text)
    if value > maximum:
        raise TarError(f"PAX {key.decode()} out of range: {value}")
    return value


def _pax_time(records: Mapping[bytes, bytes]) -> tuple[int, int] | None:
    """Decode the PAX mtime without going through floats, towards the past."""
    text = records.get(b"mtime")
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


def _pax_xattrs(records: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Collect xattrs; libarchive writes them twice, the encoded copy is the spare one."""
    xattrs: dict[bytes, bytes] = {}
    for key, value in records.items():
        if key.startswith(_SCHILY_XATTR):
            xattrs[key[len(_SCHILY_XATTR) :]] = value
    for key, value in records.items():
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
