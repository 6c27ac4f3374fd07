"""The journal of taken events: shared memory that outlives the process which writes it.

An event that was read from a fanotify group is never delivered again, and its only key is
the number that its descriptor had in the process which read it (spec ondemand 5.10). The
kernel therefore writes each event straight into a slot of this memory: the system call ends
with the event in the journal, so that there is no moment at which a kill loses one. Which
file an event is about is added right afterwards; if that is missing, it may be any.

A slot is free when its event length is 0. It is cleared after the answer and before the
event's descriptor is closed, so no two slots wait with the same number, except when a worker
was killed in between: an answered number and a waiting one, which a successor answers alike.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import NamedTuple

__all__ = ["EVENT_BYTES", "Journal", "JournalError", "Taken"]

# Room for one event of 48 bytes, not for two: a read returns one.
EVENT_BYTES = 64
_SLOT_BYTES = 128
_DEFAULT_SLOTS = 8192
_MAX_SLOTS = 1 << 20

# Event: length, version, reserved, metadata length, mask, descriptor, process.
_METADATA = struct.Struct("=IBBHQii")
# Range record: type, padding, length, padding, offset, count.
_RANGE = struct.Struct("=BBHIQQ")
_LENGTH = struct.Struct("=I")
_FILE = struct.Struct("=QQ")
_RANGE_TYPE = 6
_NOWHERE = _FILE.pack(0, 0)


class JournalError(Exception):
    """The memory is no journal."""


class Taken(NamedTuple):
    """An event without an answer; `device` and `inode` are 0 when they are not known.

    `offset` is -1 when the event has no range in the place where all ours have it.
    """

    slot: int
    fd: int
    device: int
    inode: int
    offset: int
    length: int


class Journal:
    """Slots in shared memory; `fd` is its descriptor, owned by this object."""

    def __init__(self, fd: int) -> None:
        size = os.fstat(fd).st_size
        if size <= 0 or size % _SLOT_BYTES or size > _MAX_SLOTS * _SLOT_BYTES:
            raise JournalError(f"journal of {size} bytes")
        self.fd = fd
        self._memory = mmap.mmap(fd, size)
        self._view = memoryview(self._memory)
        self._free = [
            slot
            for slot in reversed(range(size // _SLOT_BYTES))
            if not _LENGTH.unpack_from(self._memory, slot * _SLOT_BYTES)[0]
        ]

    @classmethod
    def create(cls, slots: int = _DEFAULT_SLOTS) -> Journal:
        """Make an empty journal; memory is used as slots are."""
        fd = os.memfd_create("nydusd-journal", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, slots * _SLOT_BYTES)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    def reserve(self) -> int | None:
        """Return a free slot, None when every slot has an event."""
        try:
            return self._free.pop()
        except IndexError:
            return None

    def unreserve(self, slot: int) -> None:
        """Give a slot back into which nothing was read."""
        self._free.append(slot)

    def room(self, slot: int) -> memoryview:
        """Return the memory of a slot that an event is read into."""
        start = slot * _SLOT_BYTES
        return self._view[start : start + EVENT_BYTES]

    def identify(self, slot: int, device: int, inode: int) -> None:
        """Note which file the event in a slot is about."""
        _FILE.pack_into(self._memory, slot * _SLOT_BYTES + EVENT_BYTES, device, inode)

    def clear(self, slot: int) -> None:
        """Forget an answered event, and free its slot."""
        start = slot * _SLOT_BYTES
        # In this order: a free slot never has the file of an earlier event.
        self._memory[start + EVENT_BYTES : start + EVENT_BYTES + _FILE.size] = _NOWHERE
        _LENGTH.pack_into(self._memory, start, 0)
        self._free.append(slot)

    def taken(self) -> list[Taken]:
        """Return the events that wait for answers, those of a dead process included."""
        return [
            self._read(slot)
            for slot in range(len(self._memory) // _SLOT_BYTES)
            if _LENGTH.unpack_from(self._memory, slot * _SLOT_BYTES)[0]
        ]

    def _read(self, slot: int) -> Taken:
        start = slot * _SLOT_BYTES
        _, _, _, metadata_length, _, fd, _ = _METADATA.unpack_from(self._memory, start)
        device, inode = _FILE.unpack_from(self._memory, start + EVENT_BYTES)
        offset, length = -1, -1
        if metadata_length == _METADATA.size:
            kind, _, size, _, first, count = _RANGE.unpack_from(self._memory, start + 24)
            if kind == _RANGE_TYPE and size == _RANGE.size:
                offset, length = first, count
        return Taken(slot, fd, device, inode, offset, length)

    def close(self) -> None:
        """Give the memory back; what other processes share of it stays."""
        self._view.release()
        self._memory.close()
        os.close(self.fd)
