"""Names and places in the kernel's cache directory (spec ondemand 1.14, 2.2; tools 10.5); pure."""

from __future__ import annotations

import struct
from pathlib import Path

from fscache.cachefiles.errors import CachefilesError

__all__ = [
    "VOLUME_PREFIX",
    "cached_file",
    "check_name",
    "cookie_hash",
    "scope_of",
    "volume_hash",
    "volume_key",
]

VOLUME_PREFIX = b"erofs,"

_MASK = 0xFFFFFFFF
_GOLDEN = 0x61C88647
# The volume's directory is `I` and its key, and a file name has 255 bytes.
_MAX_NAME_BYTES = 248
# What the kernel writes into names as it is; `/` is 47.
_PLAIN = frozenset(range(33, 127)) - {ord("/")}


def check_name(what: str, name: str) -> str:
    """Return a name that mount options and the cache directory can hold as it is.

    Raises:
        CachefilesError: blanks, commas, slashes, other than printable ASCII, too long, or a place.
    """
    raw = name.encode("utf-8", "surrogateescape")
    fits = 0 < len(raw) <= _MAX_NAME_BYTES and set(raw) <= _PLAIN - {ord(",")}
    # A file system has a directory of its name in sysfs.
    if not fits or raw in (b".", b".."):
        raise CachefilesError(
            f"{what} cannot be a name in the kernel's cache",
            expected=f"1 to {_MAX_NAME_BYTES} printable ASCII characters, no slash or comma",
            got=repr(name),
        )
    return name


def volume_key(scope: str) -> bytes:
    """Return the key of a volume: a domain, or the fsid of a mount without one."""
    return VOLUME_PREFIX + scope.encode()


def scope_of(key: bytes) -> str | None:
    """Return what `volume_key` was made of, None for a volume that is not of EROFS."""
    if not key.startswith(VOLUME_PREFIX):
        return None
    return key.removeprefix(VOLUME_PREFIX).decode("ascii", "backslashreplace")


def _fscache_hash(salt: int, data: bytes) -> int:
    x, y = 0, salt
    for (word,) in struct.iter_unpack("<I", data):
        x ^= word
        y ^= x
        x = (x << 7 | x >> 25) & _MASK
        x = x + y & _MASK
        y = (y << 20 | y >> 12) & _MASK
        y = y * 9 & _MASK
    return (y ^ x * _GOLDEN & _MASK) * _GOLDEN & _MASK


def _padded(data: bytes, size: int) -> bytes:
    return data + bytes(-size % 4 + size - len(data))


def volume_hash(key: bytes) -> int:
    """Return the kernel's hash of a volume key: salt of those of its cookies."""
    return _fscache_hash(0, _padded(bytes([len(key)]) + key, len(key) + 2))


def cookie_hash(volume: bytes, cookie: bytes) -> int:
    """Return the kernel's hash of a cookie key within a volume."""
    return _fscache_hash(volume_hash(volume), _padded(cookie, len(cookie)))


def cached_file(directory: Path, scope: str, name: str) -> Path:
    """Return where the kernel keeps an idle file; it has that name only while nobody has it open.

    Both names are as `check_name` wants them.
    """
    key, cookie = volume_key(scope), name.encode()
    low = cookie_hash(key, cookie) & 0xFF
    return directory / "cache" / f"I{key.decode()}" / f"@{low:02x}" / f"D{name}"
