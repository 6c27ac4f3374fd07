"""POSIX ACLs in their text form, as PAX records have them, to what xattrs hold.

Pure: bytes in, bytes out. Source: acl(5) "Long and short text forms", tar(5) of libarchive
(`SCHILY.acl.access`), Linux' posix_acl_xattr.h.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from builder.errors import TarError

__all__ = ["Acl", "UnknownNameError", "parse_acl"]

_VERSION = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")
_NO_ID = 0xFFFFFFFF
_USER, _GROUP, _MASK, _OTHER = 0x02, 0x08, 0x10, 0x20
_USER_OBJECT, _GROUP_OBJECT = 0x01, 0x04
# Keyword and its short form: tag with and without somebody named.
_TAGS = {
    b"user": (_USER, _USER_OBJECT),
    b"group": (_GROUP, _GROUP_OBJECT),
    b"mask": (None, _MASK),
    b"other": (None, _OTHER),
}
_REQUIRED = {_USER_OBJECT, _GROUP_OBJECT, _OTHER}
_BITS = {b"r"[0]: 4, b"w"[0]: 2, b"x"[0]: 1, b"-"[0]: 0}
_PERMISSIONS = re.compile(rb"[r-][w-][x-]")


class UnknownNameError(TarError):
    """An ACL that names somebody without a number: only the system it came from knows who."""


class Acl(NamedTuple):
    """Value of the xattr, None when the ACL says no more than a mode; permission bits of both."""

    xattr: bytes | None
    permissions: int


def parse_acl(text: bytes) -> Acl:
    """Decode an ACL.

    Entries are separated by newlines or commas; a fourth field has the number of who is named.

    Raises:
        TarError: not an ACL.
        UnknownNameError: a name without a number.
    """
    entries: dict[tuple[int, int], int] = {}
    for line in re.split(rb"[,\n]", text):
        words = line.split(b"#")[0].strip()
        if words:
            tag, number, permissions = _entry(words)
            if (tag, number) in entries:
                raise TarError("ACL with an entry twice", got=words)
            entries[tag, number] = permissions
    tags = {tag for tag, _ in entries}
    if not tags >= _REQUIRED or (tags & {_USER, _GROUP} and _MASK not in tags):
        raise TarError("ACL without one of its required entries", got=text[:100])
    group = _MASK if _MASK in tags else _GROUP_OBJECT
    owner, others = entries[_USER_OBJECT, _NO_ID], entries[_OTHER, _NO_ID]
    permissions = owner << 6 | entries[group, _NO_ID] << 3 | others
    if tags == _REQUIRED:
        return Acl(None, permissions)
    packed = [_ENTRY.pack(tag, entries[tag, number], number) for tag, number in sorted(entries)]
    return Acl(_VERSION + b"".join(packed), permissions)


def _entry(words: bytes) -> tuple[int, int, int]:
    """Return tag, number and permissions of an entry."""
    fields = [field.strip() for field in words.split(b":")]
    if fields[0] in (b"default", b"d"):
        del fields[0]
    keyword = next((key for key in _TAGS if fields and fields[0] in (key, key[:1])), None)
    if keyword is None or not 2 <= len(fields) <= 4:
        raise TarError("ACL with an unknown entry", got=words)
    named, unnamed = _TAGS[keyword]
    # `mask` and `other` may come without the field that has no meaning for them.
    if len(fields) == 2:
        fields.insert(1, b"")
    _, name, permissions, *numbers = fields
    if _PERMISSIONS.fullmatch(permissions) is None or (name and named is None):
        raise TarError("ACL with an unknown entry", got=words)
    bits = sum(_BITS[letter] for letter in permissions)
    if not name or named is None:
        return unnamed, _NO_ID, bits
    digits = numbers[0] if numbers else b"0" if name == b"root" else name
    if not digits.isdigit() or len(digits) > 10 or int(digits) >= _NO_ID:
        raise UnknownNameError("ACL with a name that has no number", got=name)
    return named, int(digits), bits
