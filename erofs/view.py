"""Checked access to bytes that come from outside: every slice goes through here."""

from __future__ import annotations

import struct
from typing import Any, Protocol

from erofs.errors import OutOfBounds

__all__ = ["ReadAt", "View", "align_down", "align_up"]


def align_up(value: int, alignment: int) -> int:
    """Round `value` up to a multiple of `alignment`."""
    return -(-value // alignment) * alignment


def align_down(value: int, alignment: int) -> int:
    """Round `value` down to a multiple of `alignment`."""
    return value // alignment * alignment


class ReadAt(Protocol):
    """Something that reads at explicit offsets; there is no file position."""

    def size(self) -> int:
        """Return the length in bytes."""

    def read_at(self, offset: int, length: int) -> bytes | memoryview:
        """Return exactly `length` bytes from `offset`, or raise."""


class View:
    """A read-only window on bytes whose every access is checked.

    Args:
        data: bytes, a memoryview or an mmap; kept as it is, never copied.
    """

    __slots__ = ("data", "length")

    def __init__(self, data: Any) -> None:
        self.data = memoryview(data)
        self.length = len(self.data)

    def size(self) -> int:
        """Return the length in bytes."""
        return self.length

    def check(self, offset: int, length: int, what: str) -> None:
        """Raise `OutOfBounds` unless `length` bytes at `offset` lie inside."""
        if offset < 0 or length < 0 or offset + length > self.length:
            raise OutOfBounds(
                f"{what} outside of the data",
                offset=offset,
                expected=f"{length} bytes below {self.length:#x}",
                got=f"{max(0, self.length - offset) if offset >= 0 else 0} bytes",
            )

    def slice(self, offset: int, length: int, what: str) -> memoryview:
        """Return `length` bytes at `offset` without a copy; raise `OutOfBounds`."""
        self.check(offset, length, what)
        return self.data[offset : offset + length]

    def read_at(self, offset: int, length: int) -> memoryview:
        """Return `length` bytes at `offset` without a copy; raise `OutOfBounds`."""
        return self.slice(offset, length, "range")

    def unpack(self, record: struct.Struct, offset: int, what: str) -> tuple[Any, ...]:
        """Decode one record at `offset`; raise `OutOfBounds`."""
        self.check(offset, record.size, what)
        return record.unpack_from(self.data, offset)
