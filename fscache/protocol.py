"""Codec of fanotify events and answers: bytes in, values out, no descriptor touched.

All numbers are in the machine's byte order. Source: Linux `include/uapi/linux/fanotify.h`;
spec ondemand 5.2.
"""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple

from erofs.errors import NydusError

__all__ = [
    "NO_FD",
    "Event",
    "KernelMessageError",
    "ProtocolError",
    "pack_response",
    "parse_events",
]

# FAN_NOFD: an event that carries no descriptor and expects no answer.
NO_FD = -1

_VERSION = 3
_INFO_RANGE = 6
_ALLOW = 1
_DENY = 2
_DENY_ERRNO_SHIFT = 24

# FAN_DENY_ERRNO(EIO): what EROFS reports for any denial, so direct readers see the same.
_DENY_EIO = _DENY | errno.EIO << _DENY_ERRNO_SHIFT

_METADATA = struct.Struct("=IBBHQii")
_INFO_HEADER = struct.Struct("=BBH")
_RANGE = struct.Struct("=BBHIQQ")
_RESPONSE = struct.Struct("=iI")


class Event(NamedTuple):
    """One event: `fd` is owned by whoever takes the event; offset and length are in bytes.

    `offset` and `length` are -1 when the event has no readable range record; `fd` is
    negative when there is nothing to answer.
    """

    mask: int
    fd: int
    pid: int
    offset: int
    length: int


class ProtocolError(NydusError):
    """A message that breaks the rules of its protocol."""


class KernelMessageError(ProtocolError):
    """The kernel sent what this code cannot read.

    `events` are the events in front of the bad one: their descriptors are open and wait
    for answers.
    """

    def __init__(self, what: str, events: list[Event], **where: object) -> None:
        super().__init__(what, **where)
        self.events = events


def _find_range(records: memoryview) -> tuple[int, int]:
    """Return offset and length of the first range record, or (-1, -1)."""
    position = 0
    while position + _INFO_HEADER.size <= len(records):
        kind, _, length = _INFO_HEADER.unpack_from(records, position)
        if length < _INFO_HEADER.size or position + length > len(records):
            break
        if kind == _INFO_RANGE and length >= _RANGE.size:
            _, _, _, _, offset, count = _RANGE.unpack_from(records, position)
            return offset, count
        position += length
    return -1, -1


def parse_events(buffer: bytes | bytearray | memoryview) -> list[Event]:
    """Split what one `read` of a fanotify group returned.

    Raises:
        KernelMessageError: for a length that does not fit or an unknown version; it
            carries the events before that place.
    """
    view = memoryview(buffer)
    events: list[Event] = []
    position = 0
    while position < len(view):
        left = len(view) - position
        if left < _METADATA.size:
            raise KernelMessageError(
                "truncated fanotify event",
                events,
                offset=position,
                expected=f"{_METADATA.size} bytes",
                got=left,
            )
        length, version, _, metadata_length, mask, fd, pid = _METADATA.unpack_from(view, position)
        if version != _VERSION:
            raise KernelMessageError(
                "unknown version of a fanotify event",
                events,
                offset=position,
                expected=_VERSION,
                got=version,
            )
        if not _METADATA.size <= metadata_length <= length <= left:
            raise KernelMessageError(
                "impossible lengths in a fanotify event",
                events,
                offset=position,
                expected=f"{_METADATA.size} <= metadata <= event <= {left}",
                got=f"metadata {metadata_length}, event {length}",
            )
        records = view[position + metadata_length : position + length]
        events.append(Event(mask, fd, pid, *_find_range(records)))
        position += length
    return events


def pack_response(fd: int, allow: bool) -> bytes:
    """Encode the answer to the event that came with `fd`; a denial is `EIO` (8 bytes)."""
    return _RESPONSE.pack(fd, _ALLOW if allow else _DENY_EIO)
