"""Maps of sparse tar members, above all GNU's PAX forms 0.0, 0.1 and 1.0.

Pure: bytes in, values out. The fields of the old form are `builder.tarheader`'s, where the
bytes of a map are in a stream is `builder.tarstream`'s business. Source: GNU tar manual
"Storing Sparse Files", libarchive tar(5).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from builder.errors import TarError

__all__ = [
    "MAX_EXTENTS",
    "SPARSE_MAP",
    "SPARSE_NAME",
    "SPARSE_PAIR",
    "Extent",
    "MapText",
    "SparseMap",
    "check_map",
    "pax_map",
]

MAX_EXTENTS = 1 << 20
SPARSE_NAME = b"GNU.sparse.name"
SPARSE_MAP = b"GNU.sparse.map"
# Form 0.0 repeats these two; there are no other records of PAX whose order counts.
SPARSE_PAIR = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")

_MAJOR, _MINOR = b"GNU.sparse.major", b"GNU.sparse.minor"
_SIZES = (b"GNU.sparse.realsize", b"GNU.sparse.size")
_NUMBER = re.compile(rb"[0-9]{1,19}")
_LINE_MAX = 21
# Larger than any file of Linux' file systems.
_MAX_REAL_SIZE = 1 << 44


class Extent(NamedTuple):
    """Where stored bytes belong in the file."""

    offset: int
    size: int


class SparseMap(NamedTuple):
    """The extents of a file, ascending, and its whole size in bytes.

    `extents` is None as long as they are to be read from in front of the content (form 1.0).
    """

    extents: Sequence[Extent] | None
    real_size: int


def _number(text: bytes) -> int:
    if _NUMBER.fullmatch(text) is None:
        raise TarError("map of a sparse file with something that is no number", got=text[:32])
    return int(text)


def _extents(numbers: Sequence[int]) -> list[Extent]:
    if len(numbers) % 2 or len(numbers) > 2 * MAX_EXTENTS:
        raise TarError("map of a sparse file with an impossible length", got=len(numbers))
    return [Extent(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]


def pax_map(records: Mapping[bytes, bytes]) -> SparseMap:
    """Decode the map of a sparse member from its PAX records, pairs already joined.

    Raises:
        TarError: incomplete, broken or of an unknown version.
    """
    size = next((records[key] for key in _SIZES if key in records), None)
    if size is None:
        raise TarError("sparse file without its size")
    version = (records.get(_MAJOR, b"0"), records.get(_MINOR, b"1"))
    if version == (b"1", b"0"):
        return SparseMap(None, _number(size))
    if version not in ((b"0", b"0"), (b"0", b"1")):
        raise TarError("unknown version of sparse files", got=b".".join(version))
    text = records.get(SPARSE_MAP)
    if text is None:
        raise TarError("sparse file without a map")
    numbers = [_number(word) for word in text.split(b",")] if text else []
    return SparseMap(_extents(numbers), _number(size))


class MapText:
    """Takes the blocks in front of the content of form 1.0, until the map is complete."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._wanted = 1
        self._rest = b""

    @property
    def is_complete(self) -> bool:
        """Whether the last block has been seen."""
        return len(self._numbers) == self._wanted

    def feed(self, block: bytes) -> None:
        """Take the next block; raise `TarError`."""
        *lines, self._rest = (self._rest + block).split(b"\n")
        for line in lines:
            if self.is_complete:
                return
            self._numbers.append(_number(line))
            if len(self._numbers) == 1:
                self._wanted = 1 + 2 * self._numbers[0]
                if self._numbers[0] > MAX_EXTENTS:
                    raise TarError("sparse file of too many parts", got=self._numbers[0])
        if len(self._rest) > _LINE_MAX and not self.is_complete:
            raise TarError("map of a sparse file without the end of a line")

    def extents(self) -> list[Extent]:
        """Return the extents of a complete map."""
        return _extents(self._numbers[1:])


def check_map(found: SparseMap, stored_size: int) -> None:
    """Raise `TarError` unless a complete map fits into the file, and its stored bytes too."""
    if found.real_size > _MAX_REAL_SIZE:
        raise TarError("sparse file is too large", expected=_MAX_REAL_SIZE, got=found.real_size)
    end = stored = 0
    for offset, size in found.extents or ():
        if offset < end or offset + size > found.real_size:
            raise TarError("parts of a sparse file overlap, or lie outside", got=offset)
        end = offset + size
        stored += size
    if stored != stored_size:
        raise TarError("sparse file of other parts than stored", expected=stored_size, got=stored)
